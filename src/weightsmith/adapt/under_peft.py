"""PEFT's own MiSS layers with our forward pass; importing this needs PEFT."""

from typing import Any

from peft.tuners.miss.layer import MissLinear
from torch import Tensor, nn

from weightsmith.adapt.bone import Variant, bone_linear

_VARIANTS: dict[object, Variant] = {"bat": "col", "mini": "mini"}


class FusedMissLinear(MissLinear):
    """A ``MissLinear`` that computes through `bone_linear` wherever that means the same."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Compute as PEFT does: fused for one active adapter, not merged, without dropout, on a plain linear layer."""
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
            or (self.training and not isinstance(self.miss_dropout[active[0]], nn.Identity) and self.miss_fn != "bat")
        ):
            return super().forward(x, *args, **kwargs)
        variant: Variant = _VARIANTS.get(self.miss_fn, "miss")
        return bone_linear(x, base.weight, base.bias, block, variant).to(x.dtype)
