"""The weights of a model: who owns a parameter, how it is laid out, which is the output head, and which are plain.

A weight is *plain* if it is a dense floating-point ``nn.Parameter`` with values, which its module stores rather than
computes. Only such a weight can be rewritten, pruned, rounded or initialized in place.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from weightsmith.core.errors import UsageError

TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)

_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_PACKED = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")
_INPUTS_FIRST = ("Llama4TextExperts",)  # (experts, in, out), which they do not say of themselves


class Slot(NamedTuple):
    """A place where a tensor is held.

    Attributes:
        owner: Qualified name of the module; ``""`` for the model itself.
        module: The module.
        attribute: The tensor's name there.
    """

    owner: str
    module: nn.Module
    attribute: str

    @property
    def name(self) -> str:
        """Qualified name of the tensor."""
        return f"{self.owner}.{self.attribute}".lstrip(".")


class Layout(NamedTuple):
    """How a module stores one of its weights.

    Attributes:
        attribute: The parameter's name in the module.
        axis: Where the output channels are.
        stacked: Whether the first axis counts matrices, as the experts of a mixture do.
    """

    attribute: str
    axis: int
    stacked: bool = False


def owners(model: nn.Module, *, buffers: bool = False) -> dict[int, list[Slot]]:
    """List who holds each parameter, by the parameter's ``id``; a tied one has several slots.

    The first slot is the one under whose name ``named_parameters()`` and ``state_dict()`` list the parameter first. A
    module that is used in several places counts once, under its first name.

    Args:
        model: Any module.
        buffers: List buffers as well.
    """
    found: dict[int, list[Slot]] = {}
    for name, module in model.named_modules():
        for attribute, tensor in (*module._parameters.items(), *(module._buffers.items() if buffers else ())):
            if tensor is not None:
                found.setdefault(id(tensor), []).append(Slot(name, module, attribute))
    return found


def is_linear(_name: str, module: nn.Module) -> bool:
    """Whether a module is a linear layer, a convolution or transformers' ``Conv1D``; a predicate for ``where``."""
    return isinstance(module, (nn.Linear, *CONVOLUTIONS)) or is_conv1d(module)


def is_conv1d(module: nn.Module) -> bool:
    """Whether a module is the ``Conv1D`` of transformers: a linear layer whose weight is ``(in, out)``."""
    return hasattr(module, "nf") and any(cls.__name__ == "Conv1D" for cls in type(module).__mro__)


def output_axis(module: nn.Module) -> int:
    """Return the axis of ``weight`` that holds the output channels; for a table, its entries.

    Grouped transposed convolutions hold those of one group there.
    """
    return 1 if isinstance(module, TRANSPOSED) or is_conv1d(module) else 0


def layouts(module: nn.Module) -> Iterator[Layout]:
    """Yield the weights of a module that are matrices, kernels or stacks of matrices; tables are not among them.

    These are ``weight`` of linear layers and convolutions, the packed projections of ``nn.MultiheadAttention``, and
    experts that are held in one tensor ``(experts, out, in)`` or ``(experts, in, out)``. transformers marks the layout
    of its experts by an attribute; others are known by the name of their class.
    """
    if is_linear("", module):
        yield Layout("weight", output_axis(module))
    elif isinstance(module, nn.MultiheadAttention):
        yield from (Layout(name, 0) for name in _PACKED if module._parameters.get(name) is not None)
    elif hasattr(module, "is_transposed") or "expert" in type(module).__name__.lower():
        swapped = getattr(module, "is_transposed", type(module).__name__ in _INPUTS_FIRST)
        for name, parameter in module._parameters.items():
            if parameter is not None and parameter.ndim == 3 and min(parameter.shape) > 1:
                yield Layout(name, 2 if swapped else 1, stacked=True)


def output_head(model: nn.Module) -> nn.Module | None:
    """Return the output embedding of a language model, as its class names it (``get_output_embeddings``)."""
    return next(_language_heads(model), None)


def classifiers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the layers behind a model's body by name, as its class names them (transformers, ``timm``)."""
    names = {id(module): name for name, module in model.named_modules()}
    found: list[nn.Module] = []
    for module in model.modules():
        body = getattr(module, "base_model", None) if hasattr(module, "base_model_prefix") else None
        if isinstance(body, nn.Module) and body is not module:
            inside = {id(part) for part in body.modules()}
            found += [part for part in module.modules() if part is not module and id(part) not in inside]
        classifier = cast(Any, module).get_classifier() if hasattr(type(module), "get_classifier") else None
        if isinstance(classifier, nn.Module):
            found += classifier.modules()
    return {names[id(part)]: part for part in found if id(part) in names}


def output_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return all that a model ends with by name: output embeddings, classifiers, and layers tied to an embedding."""
    found = {id(module) for module in (*classifiers(model).values(), *_language_heads(model))}
    tables = {
        id(module._parameters["weight"])
        for module in model.modules()
        if isinstance(module, nn.Embedding) and "weight" in module._parameters
    }
    return {
        name: module
        for name, module in model.named_modules()
        if id(module) in found
        or (id(module._parameters.get("weight")) in tables and not isinstance(module, nn.Embedding))
    }


def why_computed(module: nn.Module, attribute: str = "weight") -> str | None:
    """Say what computes a weight that its module does not store, and how to make it plain; ``None`` if it is stored.

    The weight is not evaluated: some parametrizations advance a state when they are.
    """
    if module._parameters.get(attribute) is not None:
        return None
    if parametrize.is_parametrized(module, attribute):
        held = cast(nn.ModuleDict, module.parametrizations)[attribute]
        return (
            f"is computed by {type(cast(nn.ModuleList, held)[-1]).__name__}: call weightsmith.fold_ on the model first"
        )
    if f"{attribute}_mask" in module._buffers:
        return f"is pruned by a mask: make that permanent first, torch.nn.utils.prune.remove(layer, {attribute!r})"
    if f"{attribute}_g" in module._parameters:
        return f"is computed from {attribute}_g and {attribute}_v: torch.nn.utils.remove_weight_norm(layer) first"
    if f"{attribute}_orig" in module._parameters:
        return f"is computed from {attribute}_orig: torch.nn.utils.remove_spectral_norm(layer) first"
    return "is no parameter of its module: make it one first, or leave it out of where="


def why_empty(weight: Tensor) -> str | None:
    """Say why a parameter has no values and how to give it some; ``None`` if it has."""
    if isinstance(weight, UninitializedParameter):
        return "has no values yet: run one batch through the model first"
    if weight.is_meta:
        return "has no values yet, as it is on the meta device: load the model's weights first"
    return None


def why_unusual(weight: Tensor) -> str | None:
    """Say why a parameter is no dense floating-point tensor (integer, packed, sparse, sharded); ``None`` if it is."""
    if weight.dtype not in _DTYPES or weight.layout is not torch.strided or type(weight) is not nn.Parameter:
        kind = "" if type(weight) is nn.Parameter else f" {type(weight).__name__}"
        return (
            f"must be a dense float16, bfloat16, float32 or float64 parameter, got{kind} {weight.dtype}, "
            f"{weight.layout}: leave it out of where=, or convert it first"
        )
    return None


def is_plain(module: nn.Module, attribute: str = "weight") -> bool:
    """Whether a weight is a dense floating-point parameter with values, stored by its module."""
    if why_computed(module, attribute) is not None:
        return False
    weight = cast(nn.Parameter, module._parameters[attribute])
    return why_empty(weight) is None and why_unusual(weight) is None


def check_plain(name: str, module: nn.Module, attribute: str = "weight", *, finite: bool = False) -> nn.Parameter:
    """Return a weight, or refuse one that is not plain.

    Args:
        name: How errors call it; its qualified name.
        module: The module that has it.
        attribute: Its name there.
        finite: Also refuse NaN and infinite values, which reads all of it.

    Raises:
        UsageError: It is computed, has no values yet, or they are not finite; the message says how to fix it.
        TypeError: It is no dense floating-point parameter.
    """
    if reason := why_computed(module, attribute):
        raise UsageError(f"{name} {reason}")
    weight = cast(nn.Parameter, module._parameters[attribute])
    if reason := why_empty(weight):
        raise UsageError(f"{name} {reason}")
    if reason := why_unusual(weight):
        raise TypeError(f"{name} {reason}")
    if finite and not weight.isfinite().all():
        raise UsageError(f"{name} holds NaN or infinite values: nothing has been changed")
    return weight


def _language_heads(model: nn.Module) -> Iterator[nn.Module]:
    for module in model.modules():
        get = getattr(module, "get_output_embeddings", None)
        if callable(get) and isinstance(head := get(), nn.Module):
            yield head
