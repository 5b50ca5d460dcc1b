"""A folder with a Hugging Face model: what kind it is, what it takes, and the model itself."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.checkpoint import Checkpoint, Stored
from weightsmith.core.errors import UsageError
from weightsmith.tools import _calibration

_NAMED = 3
_WEIGHT_FILES = {".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"}


class Source:
    """Reads the configuration at once and everything else when it is asked for.

    Args:
        folder: Holds ``config.json`` and weights.

    Raises:
        UsageError: It does not, or the model is of a kind that cannot be quantised here.
    """

    def __init__(self, folder: Path) -> None:
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder} is no folder with a Hugging Face model: it has no config.json")
        self.folder = folder
        self.config = transformers.AutoConfig.from_pretrained(folder)
        if getattr(self.config, "quantization_config", None) or (folder / "quantization_config.json").exists():
            raise UsageError(f"{folder} is quantised already: start from the trained model")
        if not weight_bytes(folder):
            raise UsageError(f"{folder} holds no weights")
        architecture = next(iter(self.config.architectures or ()), "")
        self._class: Any = getattr(transformers, architecture, None)
        if self._class is None:
            raise UsageError(
                f"{folder}/config.json names architecture {architecture!r}, which transformers does not have"
            )
        self.input_name: str = self._class.main_input_name
        if self.config.is_encoder_decoder or self.input_name not in ("input_ids", "pixel_values"):
            raise UsageError(
                f"{architecture} is neither a causal language model, a text encoder nor an image model: quantise it in "
                "code, with weightsmith.quantize.flexround_"
            )
        self.is_causal = architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values()

    @property
    def nbytes(self) -> int:
        """Of the weight files."""
        return weight_bytes(self.folder)

    @property
    def longest(self) -> int:
        """Most tokens that the model takes."""
        return getattr(self.config, "max_position_embeddings", None) or 2**31

    def tokenizer(self) -> Any:
        """The model's own."""
        from transformers import AutoTokenizer

        try:
            return AutoTokenizer.from_pretrained(self.folder)
        except (OSError, ValueError) as error:
            raise UsageError(f"{self.folder} holds no tokeniser, which texts need: {error}") from error

    def inputs(self, path: Path, samples: int, length: int) -> list[Tensor] | dict[str, Tensor]:
        """Calibration data for this model.

        Args:
            path: A file of texts, or a folder of images.
            samples: At most so many.
            length: Tokens per sequence.

        Raises:
            UsageError: There is too little, or it is not of the model's kind.
        """
        if self.input_name == "pixel_values":
            if not path.is_dir():
                raise UsageError(f"calibration for {self._class.__name__} must be a folder of images, got {path}")
            return _calibration.images(_calibration.image_processor(self.folder), path, samples=samples)
        texts = _calibration.read_texts(path)
        cut = _calibration.token_windows if self.is_causal else _calibration.sentences
        return cut(self.tokenizer(), texts, samples=samples, length=min(length, self.longest))

    def load(self) -> Any:
        """The model in the precision of its files, in evaluation mode, its weights read when they are needed."""
        model, found = self._class.from_pretrained(self.folder, dtype="auto", output_loading_info=True)
        model.eval()
        if lacking := sorted(found["missing_keys"]):
            held = ", ".join(sorted(found["unexpected_keys"])[:_NAMED]) or "nothing else"
            raise UsageError(
                f"{self.folder} holds no {', '.join(lacking[:_NAMED])}{', ...' * (len(lacking) > _NAMED)} of "
                f"{self._class.__name__}, but {held}: save the model again with save_pretrained; a .bin file must hold "
                "the state dict itself, not one inside of a checkpoint"
            )
        if any(self.folder.glob("*.safetensors")):
            _map_one_by_one_(model, Checkpoint(self.folder).stored())
        return model

    def copy_others(self, target: Path) -> None:
        """Copy what is neither weights nor in ``target`` yet: tokeniser, processor, licence."""
        for path in self.folder.iterdir():
            skip = path.suffix in _WEIGHT_FILES or path.name.endswith(".index.json") or (target / path.name).exists()
            if path.is_file() and not skip:
                shutil.copy2(path, target / path.name)

    def fingerprint(self) -> list[list[Any]]:
        """Configuration, and names, sizes and times of the weight files: changes when they do."""
        files = sorted(path for path in self.folder.iterdir() if path.suffix in _WEIGHT_FILES)
        facts = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        return [[json.loads((self.folder / "config.json").read_text())], *facts]


@torch.no_grad()
def _map_one_by_one_(model: nn.Module, stored: Mapping[str, Stored]) -> None:
    """Let each parameter be a view of the file by itself: what is written to one is then freed together with it."""
    for name, parameter in model.named_parameters():
        place = stored.get(name)
        if place and parameter.numel() and (place.dtype, place.shape) == (parameter.dtype, parameter.shape):
            mapped = place.map()
            if torch.equal(mapped, parameter):  # transformers may have rearranged what it has read
                parameter.data = mapped


def weight_bytes(folder: Path) -> int:
    """Bytes of all files under a folder that hold weights transformers reads, or those of our own layout."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.suffix in {".safetensors", ".bin"})
