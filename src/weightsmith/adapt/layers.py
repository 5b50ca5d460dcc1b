"""A layer of the user's model that carries adapters, in its place and under its name.

The module keeps its parameters, buffers, hooks and keys; only its class changes, to a subclass of what it was, and the
trained tensors are added under ``bone``. Taking the adapters off gives the very object back that went in.
"""

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import MethodType
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.adapt import fused
from weightsmith.adapt.bone import BoneConfig, Variant, activations, add_tiled, autocast, bone_delta, bone_linear
from weightsmith.core.adapters import BONE_MERGED
from weightsmith.core.errors import UsageError
from weightsmith.core.weights import is_plain as is_plain_weight
from weightsmith.core.weights import why_computed, why_empty

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


@dataclass(frozen=True, slots=True)
class Form:
    """What one adapter does on one layer; the rest is told by the shape of its tensor."""

    variant: Variant
    dropout: float
    fused: bool = True


class BoneLayer(nn.Module):
    """What every adapted layer can do; subclasses know the layer's own computation.

    Attributes:
        bone: The trained tensors by adapter name.
        bone_forms: What each of them does.
        bone_active: Names of the adapters that act, in order.
        bone_merged: Names of those that are in the weight; while there are any, the layer computes as it always did.
        bone_kept: The weight without them, if it was kept.
    """

    plain: ClassVar[type[nn.Module]]
    kind: ClassVar[type["BoneLayer"]]
    weight: nn.Parameter
    bone: nn.ParameterDict
    bone_forms: dict[str, Form]
    bone_active: tuple[str, ...]
    bone_merged: tuple[str, ...]
    bone_kept: tuple[nn.Parameter, ...]

    def forward(self, x: Tensor) -> Tensor:
        """Compute the layer with its active adapters."""
        if self.bone_merged or not self.bone_active:
            return cast(Tensor, self.plain.forward(self, x))
        return self.adapted(x, list(self.acting()))

    def acting(self) -> Iterator[tuple[Form, Tensor]]:
        """The active adapters in order."""
        for name in self.bone_active:
            yield self.bone_forms[name], self.bone[name]

    def adapted(self, x: Tensor, adapters: list[tuple[Form, Tensor]]) -> Tensor:
        """Compute the layer with at least one adapter."""
        raise NotImplementedError

    def oriented(self, weight: Tensor) -> Tensor:
        """View a weight of this layer as ``(out, in, ...)``, or such a one as this layer stores it."""
        return weight

    def sequenced(self, weight: Tensor, adapters: list[tuple[Form, Tensor]]) -> Tensor:
        """Apply updates to ``(out, in, ...)``: those that need the weight one on top of the other, then the rest.

        The rest see the base weight, so that their order does not matter and activations can add them.
        """
        result = weight
        for form, block in adapters:
            if needs_weight(form.variant, block):
                result = result + bone_delta(result, block.to(weight.dtype), form.variant)
        for form, block in adapters:
            if not needs_weight(form.variant, block):
                result = result + bone_delta(weight, block.to(weight.dtype), form.variant)
        return result

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in self.bone_merged:
            destination[f"{prefix}{BONE_MERGED}.{name}"] = torch.ones(1, dtype=torch.bool)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )
        marks = f"{prefix}{BONE_MERGED}."
        unexpected_keys[:] = [key for key in unexpected_keys if not key.startswith(marks)]

    def __reduce_ex__(self, _protocol: Any) -> tuple[Any, ...]:
        # the class is made while the program runs, so that pickle has to be told how to make it again
        return _blank, (self.kind, self.plain), self.__dict__


class _Linear(BoneLayer):
    bias: nn.Parameter | None

    def adapted(self, x: Tensor, adapters: list[tuple[Form, Tensor]]) -> Tensor:
        dropped = self.training and any(form.dropout for form, _ in adapters)
        if len(adapters) == 1 and not dropped and is_plain(self):
            form, block = adapters[0]
            kernel = None if form.fused else False
            return bone_linear(x, self.oriented(self.weight), self.bias, block, form.variant, fused=kernel)
        if any(needs_weight(form.variant, block) for form, block in adapters):
            weight = self.oriented(self.weight)
            if not dropped:
                return F.linear(x, self.sequenced(weight, adapters), self.bias)
            raise UsageError("dropout cannot be trained beside an active adapter of variant 'col' or 'free'")
        inner, corrections = x, []
        for form, block in adapters:
            source, block = autocast(F.dropout(x, form.dropout, self.training), block)
            change, correction = activations(source, block, form.variant)
            inner = inner if change is None else inner + change
            corrections.append(correction)
        y: Tensor = self.plain.forward(self, inner)
        for correction in corrections:
            y = add_tiled(y, correction)
        return y


class _Conv1D(_Linear):
    def oriented(self, weight: Tensor) -> Tensor:
        return weight.T


class _Convolution(BoneLayer):
    def adapted(self, x: Tensor, adapters: list[tuple[Form, Tensor]]) -> Tensor:
        conv = cast(nn.Conv2d, self)
        y: Tensor = self.plain.forward(self, x)
        for form, block in adapters:
            source, block = autocast(F.dropout(x, form.dropout, self.training), block)
            wide = torch.promote_types(source.dtype, block.dtype)
            dim = 1 - self.weight.dim()  # of the channels, with or without a batch before them
            groups = source.to(wide).unflatten(dim, (conv.groups, -1))
            sums = fused.block_sum(groups, block.shape[0], dim).flatten(dim - 1, dim)
            y = (y + conv._conv_forward(sums, block.to(wide).transpose(0, 1), None)).to(y.dtype)
        return y


class _Embedding(BoneLayer):
    def adapted(self, x: Tensor, adapters: list[tuple[Form, Tensor]]) -> Tensor:
        embedding = cast(nn.Embedding, self)
        y: Tensor = self.plain.forward(self, x)
        for _, block in adapters:
            rows = F.embedding(x, block.T, embedding.padding_idx)
            copies = -(-y.shape[-1] // rows.shape[-1])
            y = (y + rows.repeat(*[1] * x.dim(), copies)[..., : y.shape[-1]]).to(y.dtype)
        return y


def needs_weight(variant: Variant, block: Tensor) -> bool:
    """Whether a form cannot be computed around the layer as a black box."""
    return variant == "col" or (variant == "free" and block.shape[0] > 1)


def plain_class(module: nn.Module) -> type[nn.Module]:
    """The class that a layer has without adapters."""
    return module.plain if isinstance(module, BoneLayer) else type(module)


def kind_of(module: nn.Module) -> type[BoneLayer] | None:
    """Which kind of adapted layer a module can become; ``None`` for one that cannot."""
    cls = type(module)
    if cls.__name__ == "Conv1D" and cls.__module__.startswith("transformers."):
        return _Conv1D
    if isinstance(module, CONVOLUTIONS):
        return _Convolution if cls.forward in [known.forward for known in CONVOLUTIONS] else None
    if isinstance(module, nn.Embedding):
        # one that scales or clips what it looks up would not be the table that a merge writes
        return _Embedding if cls.forward is nn.Embedding.forward and module.max_norm is None else None
    # torch's attention reads this one's weight and never calls it
    if isinstance(module, nn.modules.linear.NonDynamicallyQuantizableLinear):
        return None
    if isinstance(module, nn.Linear):
        return _Linear
    sides = getattr(module, "in_features", None), getattr(module, "out_features", None)
    is_leaf = next(module.children(), None) is None
    return _Linear if is_leaf and all(isinstance(side, int) for side in sides) else None  # quantized by some library


def is_plain(module: nn.Module) -> bool:
    """Whether the weight is an ordinary float tensor that the layer is linear in; otherwise it is a black box."""
    known = _kind(module) is not _Linear or plain_class(module).forward is nn.Linear.forward
    return known and is_plain_weight(module)


def is_transposed(module: nn.Module) -> bool:
    """Whether the layer stores its weight as ``(in, out)``, as transformers' ``Conv1D`` does."""
    return _kind(module) is _Conv1D


def widths(module: nn.Module) -> tuple[int, ...]:
    """``(out, in, *kernel)``; a convolution's input width is that of one group."""
    weight = module._parameters.get("weight")
    if is_transposed(module) and weight is not None:
        return tuple(reversed(weight.shape))
    if isinstance(module, (*CONVOLUTIONS, nn.Embedding)):
        return tuple(module.weight.shape)
    return cast(int, module.out_features), cast(int, module.in_features)


def check_layer(name: str, module: nn.Module, config: BoneConfig) -> None:
    """Refuse a layer that cannot carry an adapter of this form.

    Raises:
        UsageError: It cannot; the message says why.
    """
    kind, variant = _kind(module), config.variant
    for attribute in cast(nn.ModuleDict, getattr(module, "parametrizations", {})):
        raise UsageError(f"{name}.{attribute} {why_computed(module, attribute)}".lstrip("."))
    weight = module._parameters.get("weight")
    if weight is not None and (reason := why_empty(weight)):
        raise UsageError(f"{name}.weight {reason}".lstrip("."))
    if kind in (_Convolution, _Embedding) and variant != "miss":
        raise UsageError(f"variant must be 'miss' for {name}, a {plain_class(module).__name__}, got {variant!r}")
    if (variant == "col" or (config.tile and config.tile[0] > 1)) and not is_plain(module):
        raise UsageError(
            f"variant must be row, miss or mini for {name}, whose weight is no plain float tensor, got {variant!r}"
        )
    if "forward" in vars(module) and "_old_forward" not in vars(module):
        raise UsageError(f"the forward method of {name} has been replaced: an adapter would never be called")


def adopt(module: nn.Module) -> BoneLayer:
    """Make a layer one that carries adapters, if it is none yet, in place."""
    if isinstance(module, BoneLayer):
        return module
    kind = kind_of(module)
    assert kind is not None
    module.__class__ = _class(kind, type(module))  # type: ignore[arg-type]
    layer = cast(BoneLayer, module)
    layer.bone = nn.ParameterDict()
    layer.bone_forms, layer.bone_active, layer.bone_merged, layer.bone_kept = {}, (), (), ()
    _point_hooks(layer, type(layer))
    return layer


def release(layer: BoneLayer) -> None:
    """Make an adapted layer what it was, in place; its adapters are gone."""
    plain = layer.plain
    del layer.bone, layer.bone_forms, layer.bone_active, layer.bone_merged, layer.bone_kept
    layer.__class__ = plain  # type: ignore[assignment]
    _point_hooks(layer, plain)


def _point_hooks(module: nn.Module, cls: type[nn.Module]) -> None:
    # Accelerate's hooks (a model spread over devices) call the forward method that they found
    if "_old_forward" in vars(module):
        module._old_forward = MethodType(cls.forward, module)  # type: ignore[assignment]


@functools.cache
def _class(kind: type[BoneLayer], plain: type[nn.Module]) -> type[BoneLayer]:
    return type(f"Bone{plain.__name__}", (kind, plain), {"plain": plain, "kind": kind})


def _blank(kind: type[BoneLayer], plain: type[nn.Module]) -> BoneLayer:
    return object.__new__(_class(kind, plain))  # type: ignore[arg-type]


def _kind(module: nn.Module) -> type[BoneLayer] | None:
    return module.kind if isinstance(module, BoneLayer) else kind_of(module)
