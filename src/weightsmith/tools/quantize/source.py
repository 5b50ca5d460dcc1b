"""A folder with a Hugging Face model: what kind it is, what it takes, and the model itself."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.adapters import refuse_adapter_tensors
from weightsmith.core.checkpoint import WEIGHT_FILES, Checkpoint, Stored
from weightsmith.core.errors import UsageError
from weightsmith.core.files import say_where_link_leads
from weightsmith.core.json_files import read_json
from weightsmith.core.pickles import read_pickles
from weightsmith.core.pretrained import load_pretrained, model_class
from weightsmith.tools.quantize import calibration

_NAMED = 3
_CONFIG = {"auto_map?": {str: object}, "architectures?": ([str], None)}


class Source:
    """Reads the configuration at once and everything else when it is asked for.

    Args:
        folder: Holds ``config.json`` and weights.
        trust_remote_code: Whether Python files that it brings may be run.
        allow_pickle: Whether its weights may be read from ``.bin`` files.

    Raises:
        UsageError: It does not, or it needs what is not allowed, or the model is of a kind that cannot be quantized
            here.
    """

    def __init__(self, folder: Path, *, trust_remote_code: bool = False, allow_pickle: bool = False) -> None:
        import transformers
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        refuse_adapter_tensors(folder, ())
        if not (folder / "config.json").is_file():
            raise UsageError(f"{folder} is no folder with a Hugging Face model: it has no config.json")
        self.folder, self._trusted = folder, trust_remote_code
        content = read_json(say_where_link_leads(folder / "config.json"), _CONFIG)
        self.config = self._pretrained(transformers.AutoConfig)
        if getattr(self.config, "quantization_config", None) or (folder / "quantization_config.json").exists():
            raise UsageError(f"{folder} is quantized already: start from the trained model")
        if not weight_bytes(folder):
            raise UsageError(f"{folder} holds no weights")
        self._check_weights(allow_pickle)
        own = _own_class(folder, content.get("auto_map", {})) if trust_remote_code else None
        self._class: Any = own or model_class(folder, self.config.architectures)
        architecture = self._class.__name__
        self.input_name: str = self._class.main_input_name
        if self.config.is_encoder_decoder or self.input_name not in ("input_ids", "pixel_values"):
            raise UsageError(
                f"{architecture} is neither a causal language model, a text encoder nor an image model: quantize it in "
                "code, with weightsmith.quantize.flexround_"
            )
        self.is_causal = (
            architecture.endswith("ForCausalLM")
            if own
            else (architecture in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        )

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

        return self._pretrained(AutoTokenizer)

    def inputs(self, path: Path, samples: int, length: int) -> list[Tensor] | dict[str, Tensor]:
        """Calibration data for this model.

        Args:
            path: A file of texts, or a folder of images.
            samples: Maximum number of samples.
            length: Tokens per sequence.

        Raises:
            UsageError: There is too little, or it is not of the model's kind.
        """
        if self.input_name == "pixel_values":
            if not path.is_dir():
                raise UsageError(f"calibration for {self._class.__name__} must be a folder of images, got {path}")
            processor = calibration.image_processor(self.folder, self._pretrained)
            return calibration.images(processor, path, samples=samples)
        texts = calibration.read_texts(path)
        cut = calibration.token_windows if self.is_causal else calibration.sentences
        return cut(self.tokenizer(), texts, samples=samples, length=min(length, self.longest))

    def load(self) -> Any:
        """The model in the precision of its files, in evaluation mode, its weights read when they are needed."""
        options = {"dtype": "auto", "use_safetensors": self._is_safe, "output_loading_info": True}
        model, found = self._pretrained(self._class, **options)
        model.eval()
        if lacking := sorted(found["missing_keys"]):
            held = ", ".join(sorted(found["unexpected_keys"])[:_NAMED]) or "nothing else"
            raise UsageError(
                f"{self.folder} holds no {', '.join(lacking[:_NAMED])}{', ...' * (len(lacking) > _NAMED)} of "
                f"{self._class.__name__}, but {held}: save the model again with save_pretrained; a .bin file must hold "
                "the state dict itself, not one inside of a checkpoint"
            )
        if self._is_safe:
            _map_one_by_one_(model, Checkpoint(self.folder).stored())
        return model

    def fingerprint(self) -> list[list[Any]]:
        """Configuration, and names, sizes and times of the weight files: changes when they do."""
        files = sorted(path for path in self.folder.iterdir() if path.suffix in WEIGHT_FILES)
        facts = [[path.name, path.stat().st_size, path.stat().st_mtime_ns] for path in files]
        return [[read_json(self.folder / "config.json")], *facts]

    def _pretrained(self, loader: Any, **options: Any) -> Any:
        return load_pretrained(loader, self.folder, trust_remote_code=self._trusted, **options)

    def _check_weights(self, allow_pickle: bool) -> None:
        """Look at the files before ``transformers`` reads them: it follows any name in an index."""
        self._is_safe = any(self.folder.glob("*.safetensors"))
        refuse_adapter_tensors(
            self.folder,
            Checkpoint(self.folder)
            if self._is_safe
            else read_pickles(self.folder, "pytorch_model", allow_pickle=allow_pickle),
        )


def _own_class(folder: Path, auto_map: Mapping[str, Any]) -> Any:
    """The model class that a folder brings along, or ``None``; runs its code."""
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    name = next((auto_map[auto] for auto in auto_map if auto.startswith("AutoModel")), None)
    return name and get_class_from_dynamic_module(name, folder)


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
