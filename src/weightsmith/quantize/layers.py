"""Which layers have a weight that can be put on a grid, and whether each of them may be."""

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from weightsmith.core.errors import UsageError
from weightsmith.core.select import Where, select

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def is_quantisable(_name: str, module: nn.Module) -> bool:
    """Whether a module is a linear layer, a convolution or GPT-2's ``Conv1D``."""
    return isinstance(module, _LAYERS) or _is_gpt2_conv(module)


def output_axis(module: nn.Module) -> int:
    """Where the output channels of a layer's weight are."""
    return 1 if isinstance(module, _TRANSPOSED) or _is_gpt2_conv(module) else 0


def parameter_name(layer: str) -> str:
    """Qualified name of a layer's weight."""
    return f"{layer}.weight".lstrip(".")


def weight_of(layer: nn.Module) -> Tensor:
    """A layer's weight."""
    weight = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def output_head(model: nn.Module) -> nn.Module | None:
    """The output embedding of a Hugging Face language model."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def choose_layers(model: nn.Module, where: Where) -> dict[str, nn.Module]:
    """Choose the layers to quantise and check their weights.

    Args:
        model: Nothing in it is changed.
        where: ``None``: every linear layer and convolution, but neither the output embedding of a language model nor
            weights that are tied.

    Returns:
        The chosen layers by name.

    Raises:
        UsageError: A chosen weight is tied to another module's, parametrised, not materialised, not floating point, or
            holds NaN or infinity; or nothing matches.
    """
    owners: dict[int, list[str]] = {}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                owners.setdefault(id(parameter), []).append(name)
    head = output_head(model)

    def usual(name: str, module: nn.Module) -> bool:
        tied = len(owners.get(id(module._parameters.get("weight")), ())) > 1
        return is_quantisable(name, module) and module is not head and not tied

    chosen = select(model, where, default=usual, supported=is_quantisable)
    for name, module in chosen.items():
        _check(name, module, owners)
    return chosen


def _check(name: str, module: nn.Module, owners: dict[int, list[str]]) -> None:
    if parametrize.is_parametrized(module, "weight"):
        raise UsageError(f"{name}.weight is computed from something else: weightsmith.fold_ it first")
    if "weight" not in module._parameters:
        raise UsageError(
            f"{name}.weight comes from a hook, such as that of torch.nn.utils.prune: remove that first (prune.remove), "
            "or leave it out of where"
        )
    weight = module._parameters["weight"]
    if isinstance(weight, UninitializedParameter) or weight is None or weight.is_meta:
        raise UsageError(f"{name}.weight has no values yet: run the model once, or load its weights, first")
    if not weight.is_floating_point():
        raise UsageError(f"{name}.weight has dtype {weight.dtype}: only floating-point weights can be quantised")
    others = [owner for owner in owners[id(weight)] if owner != name]
    if others:
        raise UsageError(
            f"{name}.weight is tied to that of {', '.join(others)}, which would change with it: leave it out of "
            "where=, or untie the two first"
        )
    if not torch.isfinite(weight).all():
        raise UsageError(f"{name}.weight holds NaN or infinity: nothing has been changed")


def _is_gpt2_conv(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
