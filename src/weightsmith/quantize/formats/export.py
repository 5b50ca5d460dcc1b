"""Quantized weights that leave the process: save them packed, load them back, hand them to other libraries.

``save_quantized`` writes real integers of 2 to 8 bits. What the ``compressed-tensors`` format can hold is written in it
and loads with ``transformers`` alone; everything else goes into this package's own safetensors layout (described in
``native.py``). On request it writes GPTQ's layout (``gptq.py``), which many inference engines read. Through every
path the codes stay what they were, bit for bit.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightsmith.core.errors import UsageError, brief, reason, require, unknown
from weightsmith.core.files import folder_atomically
from weightsmith.core.json_files import read_json
from weightsmith.core.pretrained import load_pretrained, model_class
from weightsmith.quantize.after_training.targets import adapted_layers
from weightsmith.quantize.formats import compressed_tensors, gptq, native
from weightsmith.quantize.formats.onnx import export_onnx
from weightsmith.quantize.grid import QuantizedWeight, attach_quantized_, quantized_weights
from weightsmith.quantize.in_training.weight_quantizer import sites

__all__ = ["Format", "export_onnx", "load_quantized", "save_quantized"]

Format = Literal["auto", "compressed-tensors", "gptq", "weightsmith"]

_CONFIG = {"quantization_config?": ({"quant_method?": str}, None)}
_SAID = 300  # characters of another library's error
_FOREIGN: dict[str, Any] = {"compressed-tensors": compressed_tensors, gptq.METHOD: gptq}


def save_quantized(model: nn.Module, folder: Path | str, format: Format = "auto") -> Path:
    """Write a quantized model as a folder that appears whole or not at all; an existing one is replaced as a whole.

    Args:
        model: Carries quantized weights, as every verb of this package that quantizes leaves it. Weights that are not
            quantized are saved as they are.
        folder: The folder to make or replace.
        format: ``"compressed-tensors"``: transformers models whose linear layers are all on one kind of integer grid;
            ``"gptq"``: those among them of 2, 3, 4 or 8 bits whose sizes fill whole 32-bit words, with scales in the
            precision in which they were found (GPTQ files usually have float16, which would change the weights; one
            scale per tensor is repeated for every channel); ``"weightsmith"``: everything; ``"auto"``:
            ``"compressed-tensors"`` where it can, else ``"weightsmith"``.

    Returns:
        ``folder``.

    Raises:
        UsageError: The format is unknown or cannot hold this model, there are no quantized weights or they have been
            trained since, or the model is wrapped or carries an adapter.
        MissingExtra: ``compressed-tensors`` is needed and not installed.
        OSError: It cannot be written or the disk is full; what was at ``folder`` is as it was.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"model must be a module, got {type(model).__name__}: what is saved comes first, then the folder"
        )
    if format not in get_args(Format):
        raise unknown("format", format, get_args(Format))
    _refuse_half_way(model)
    weights = quantized_weights(model)
    if not weights and next(sites(model), None) is not None:
        raise UsageError("the model is being trained on its grid: finish_ofq_ first, which leaves quantized weights")
    if not weights:
        raise UsageError("the model has no quantized weights: quantize it first, for example with round_to_nearest_")
    computed = next((name for name, module in model.named_modules() if parametrize.is_parametrized(module)), None)
    if computed is not None and hasattr(model, "save_pretrained"):
        raise UsageError(
            f"{computed} has a parametrization, which transformers would not load: weightsmith.fold_ it first"
        )
    layout = _FOREIGN.get(format, compressed_tensors)
    obstacle = layout.obstacle(model, weights)
    if format in _FOREIGN and obstacle:
        raise UsageError(f"format={format!r} cannot hold this model, {obstacle}: use 'auto' or 'weightsmith'")
    write: Callable[..., None] = native.write if obstacle or format == "weightsmith" else layout.write
    target = Path(folder)
    with folder_atomically(target) as fresh:
        write(model, weights, fresh)
    return target


def _refuse_half_way(model: nn.Module) -> None:
    """What would come back without its adapter, or under names that no model has."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        raise UsageError(f"the model is wrapped in {type(model).__name__}: pass model.module")
    if hasattr(model, "_orig_mod"):
        raise UsageError("the model is wrapped by torch.compile: pass model._orig_mod")
    if adapted := adapted_layers(model):
        raise UsageError(
            f"{adapted[0]} carries an adapter, which a folder of quantized weights does not hold: save the adapter by "
            "itself and take it off first (PEFT: model = model.unload(); Bone: unload_bone_), or merge it before "
            "quantizing (PEFT: model = model.merge_and_unload(); Bone: unload_bone_(model, merge=True))"
        )


def load_quantized(folder: Path | str, model: nn.Module | None = None) -> nn.Module:
    """Load what `save_quantized` wrote, in any format, as a plain model that carries its quantized weights.

    Args:
        folder: The folder.
        model: Filled in place; needed when the folder holds no transformers model.

    Returns:
        ``model``, or the transformers model, in evaluation mode. Its weights equal the saved model's bit for bit.

    Raises:
        UsageError: The folder holds no quantized model, or ``model`` does not fit it.
        MissingExtra: ``transformers`` or ``compressed-tensors`` is needed and not installed.
    """
    if isinstance(folder, nn.Module):
        raise TypeError(f"folder must be a path, got {type(folder).__name__}: load_quantized takes the folder first")
    source = Path(folder)
    layout, state, weights = read_folder(source)
    if model is None:
        model = _from_config(source, state, weights, layout)
    else:
        _fill(model, state, weights, layout, source)
    for name, quantized in weights.items():
        owner, _, tensor = name.rpartition(".")
        attach_quantized_(model.get_submodule(owner), quantized, tensor)
    return model


def read_folder(folder: Path) -> tuple[Any, dict[str, Tensor], dict[str, QuantizedWeight]]:
    """Read the module of a folder's format, the tensors that are not quantized, and the quantized weights.

    Raises:
        UsageError: It holds no quantized model, or is damaged.
    """
    layout: Any = _layout(folder)
    try:
        return layout, *layout.read(folder)
    except (LookupError, TypeError, ValueError, ArithmeticError, RuntimeError, AttributeError) as error:
        if isinstance(error, UsageError):
            raise
        raise UsageError(f"{folder} is damaged: {reason(error)}") from error


def _layout(folder: Path) -> Any:
    if (folder / native.CONFIG).is_file():
        return native
    config = folder / "config.json"
    content = read_json(config, _CONFIG) if config.is_file() else {}
    method = content.get("quantization_config") or {}
    if method.get("quant_method") in _FOREIGN:
        return _FOREIGN[method["quant_method"]]
    found = (
        f"its config.json says quant_method {brief(method.get('quant_method'))}" if method else "nothing in it says so"
    )
    raise UsageError(f"{folder} holds no quantized model that save_quantized has written: {found}")


def _from_config(folder: Path, state: dict[str, Tensor], weights: dict[str, QuantizedWeight], layout: Any) -> nn.Module:
    if not (folder / "config.json").is_file():
        raise UsageError(f"{folder} holds weights of a model that is not from transformers: pass model=, an instance")
    transformers = require("transformers", extra="hf", purpose=f"the model in {folder}")
    config = load_pretrained(transformers.AutoConfig, folder)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    loader = model_class(folder, config.architectures)
    full = state | {name: quantized.dequantize() for name, quantized in weights.items()}
    if layout is native and native.changes_modules(folder):
        model: nn.Module = loader(config).to(config.dtype)
        _fill(model, state, weights, layout, folder)
        _set_generation(model, folder)
        return model.eval()
    later = {name: full.pop(name) for name in list(full) if ".input_quantizer." in name}
    model = loader.from_pretrained(None, config=config, state_dict=full, dtype=config.dtype or "auto")
    _set_generation(model, folder)
    if later:
        layout.quantize_inputs_(model, folder)
        model.load_state_dict(later, strict=False)
    return model.eval()


def _set_generation(model: Any, folder: Path) -> None:
    if (folder / "generation_config.json").is_file():
        transformers = require("transformers", extra="hf", purpose=f"the model in {folder}")
        model.generation_config = load_pretrained(transformers.GenerationConfig, folder)


def _fill(
    model: nn.Module, state: dict[str, Tensor], weights: dict[str, QuantizedWeight], layout: Any, folder: Path
) -> None:
    if layout is not native:
        raise UsageError(f"{folder} holds a transformers model: leave model= out")
    full = state | {name: quantized.dequantize() for name, quantized in weights.items()}
    for name, owner in native.tied(folder).items():
        if owner not in full:
            raise UsageError(f"{folder} is damaged: {brief(name)} is said to be {brief(owner)}, which is not there")
        full[name] = full[owner]
    try:
        native.quantize_inputs_(model, folder)
        model.load_state_dict(full)
    except (AttributeError, RuntimeError) as error:
        said = " ".join(str(error).split())  # torch lists the names of tensors on lines of their own
        raise UsageError(f"model= does not fit what is in {folder}: {said[:_SAID]}") from error
