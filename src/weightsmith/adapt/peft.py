"""``accelerate_peft_``: our forward and backward pass under an unchanged PEFT model."""

import functools
from typing import Any, cast

from torch import Tensor, nn

from weightsmith.adapt.bone import Variant, bone_linear
from weightsmith.adapt.registry import Model
from weightsmith.core.errors import UsageError, require

_VARIANTS: dict[object, Variant] = {"bat": "col", "mini": "mini"}


def accelerate_peft_(model: Model) -> Model:
    """Let every MiSS layer of a PEFT model compute through the fused functions, in place.

    Outputs and gradients are the same to rounding, and so are saving, loading and merging, which stay PEFT's. The forms
    that PEFT calls ``"bat"`` keep ``x`` for the backward pass in place of two tensors of the weight's size.

    Args:
        model: What ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` gave for a ``MissConfig``.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: No layer of it is a MiSS layer.
        MissingExtra: ``peft`` is not installed.
    """
    layer = require("peft.tuners.miss.layer", extra="hf", purpose="accelerate_peft_")
    found: list[nn.Module] = [module for module in model.modules() if isinstance(module, layer.MissLinear)]
    if not found:
        raise UsageError(f"model must be a PEFT model with MiSS layers, and this {type(model).__name__} has none")
    fused = _fused_class(layer.MissLinear)
    for module in found:
        if type(module) is layer.MissLinear:
            module.__class__ = fused
    return model


@functools.cache
def _fused_class(miss_linear: type[Any]) -> type[nn.Module]:
    """Make a subclass of PEFT's ``MissLinear`` that computes through `bone_linear` wherever that means the same."""

    class FusedMissLinear(miss_linear):
        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            """Compute as PEFT does: fused for one active adapter, not merged, no dropout, on a plain linear layer."""
            active = [name for name in self.active_adapters if name in self.miss_block]
            base, block = self.base_layer, self.miss_block[active[0]] if len(active) == 1 else None
            if (
                block is None
                or self.disable_adapters
                or self.merged
                or args
                or kwargs
                or type(base) is not nn.Linear
                or type(base.weight) is not nn.Parameter
                or base._forward_hooks
                or base._forward_pre_hooks
                or "forward" in vars(base)
                or not x.dtype == base.weight.dtype == block.dtype
                or (
                    self.training
                    and not isinstance(self.miss_dropout[active[0]], nn.Identity)
                    and self.miss_fn != "bat"
                )
            ):
                return cast(Tensor, super().forward(x, *args, **kwargs))
            variant: Variant = _VARIANTS.get(self.miss_fn, "miss")
            return bone_linear(x, base.weight, base.bias, block, variant).to(x.dtype)

    FusedMissLinear.__qualname__ = "FusedMissLinear"
    return FusedMissLinear


def __getattr__(name: str) -> type[nn.Module]:
    if name == "FusedMissLinear":  # pickle looks the class of an accelerated layer up here
        return _fused_class(require("peft.tuners.miss.layer", extra="hf", purpose=name).MissLinear)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
