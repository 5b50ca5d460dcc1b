"""What the weight quantizers of quantization-aware training have in common, and how to find them in a model.

Training moves a latent weight ``W``; the network sees ``W^ = step * (code + offset)`` with one step per output row. The
quantizer is a ``torch.nn.utils.parametrize`` parametrization: optimizers, DDP and ``fold_`` need to know nothing of it.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightsmith.core.errors import UsageError
from weightsmith.quantize.grid import check_bits


class WeightQuantizer(nn.Module):
    """The parametrization ``W -> step * (code + offset)``; subclasses say how the step comes about.

    Args:
        bits: Bit width of the codes, 1 to 8: they run from ``-2^(bits-1)`` to ``2^(bits-1) - 1``.
        axis: The axis whose entries each have a step: 0, but 1 for transposed convolutions.
        first_row: Rows of axis 0 before this one are passed on as they are (query and key of a fused projection).

    Attributes:
        final: No parametrization may lie on top: the weight would leave the grid.
        offset: Where levels lie between integers: 0.5 (StatsQ) or 0.
        frozen: Entries that no longer follow their latent, ``None``: there are none.
        frozen_codes: The codes that those entries keep.

    Raises:
        UsageError: ``bits`` is out of range.
    """

    final = True
    offset = 0.0
    frozen: Tensor | None
    frozen_codes: Tensor | None

    def __init__(self, bits: int, axis: int = 0, first_row: int = 0) -> None:
        check_bits(bits)
        super().__init__()
        self.bits, self.axis, self.first_row = bits, axis, first_row
        self.register_buffer("frozen", None)
        self.register_buffer("frozen_codes", None)

    @property
    def half_range(self) -> int:
        """``2^(bits-1)``: codes go from minus this to this minus 1."""
        return 1 << (self.bits - 1)

    def quantize(self, w: Tensor) -> Tensor:
        """Return the quantized rows, differentiable, shaped like ``w``."""
        raise NotImplementedError

    def step(self, w: Tensor) -> Tensor:
        """Return the distance between levels, broadcastable to ``w``, in float32 at least."""
        raise NotImplementedError

    def forward(self, w: Tensor) -> Tensor:
        """Return ``W^``, shaped like ``w``; frozen entries pass no gradient."""
        rows = self.rows(w)
        out = self.quantize(rows)
        if self.frozen is not None:
            kept = (cast(Tensor, self.frozen_codes) + self.offset) * self.step(rows)
            out = torch.where(self.frozen, kept.to(out.dtype), out)
        return torch.cat([w[: self.first_row], out]) if self.first_row else out

    def rows(self, w: Tensor) -> Tensor:
        """The part of a weight that is quantized."""
        return w[self.first_row :] if self.first_row else w

    @torch.no_grad()
    def codes(self, rows: Tensor, *, frozen: bool = True) -> Tensor:
        """Integer codes of the quantized rows, int8; with ``frozen=False`` those of the latent alone."""
        units = rows.to(torch.promote_types(rows.dtype, torch.float32)) / self.step(rows)
        codes = units.sub_(self.offset).round_().clamp_(-self.half_range, self.half_range - 1).to(torch.int8)
        if self.frozen is None or not frozen:
            return codes
        return torch.where(self.frozen, cast(Tensor, self.frozen_codes), codes)

    @torch.no_grad()
    def distance(self, rows: Tensor) -> Tensor:
        """How far each latent is from the nearest inner rounding threshold, in steps; above 1/2 for clipped ones."""
        return threshold_distance(rows, self.step(rows), self.bits, offset=self.offset)

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        for name in ("frozen", "frozen_codes"):
            stored = state_dict.get(prefix + name)
            if stored is not None and getattr(self, name) is None:
                setattr(self, name, torch.empty_like(stored))
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Word the grid."""
        return f"bits={self.bits}, axis={self.axis}" + (f", first_row={self.first_row}" if self.first_row else "")


@dataclass(frozen=True, slots=True)
class Site:
    """One quantized weight.

    Attributes:
        name: Qualified: module and attribute.
        quantizer: Holds the grid.
        rows: Gives the rows that it quantizes, differentiable.
        parameter: What trains; ``None`` for the query-key product, which is made from two weights.
    """

    name: str
    quantizer: WeightQuantizer
    rows: Callable[[], Tensor]
    parameter: nn.Parameter | None

    @torch.no_grad()
    def latent(self) -> Tensor:
        """The rows that are quantized, detached."""
        return self.rows().detach()


def sites(model: nn.Module) -> Iterator[Site]:
    """Find every quantized weight of a model; a tied one comes once.

    Args:
        model: What ``prepare_ofq_`` returned, or anything that holds it.

    Raises:
        UsageError: Another parametrization lies on top of a quantizer.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        if parametrize.is_parametrized(module):
            for attribute, held in cast(nn.ModuleDict, module.parametrizations).items():
                *under, quantizer = cast(parametrize.ParametrizationList, held)
                if any(isinstance(other, WeightQuantizer) for other in under):
                    raise UsageError(
                        f"{prefix}{attribute} is quantized, and {type(quantizer).__name__} moves it off its grid: "
                        "remove that parametrization"
                    )
                if isinstance(quantizer, WeightQuantizer) and id(quantizer) not in seen:
                    seen.add(id(quantizer))
                    original = cast(nn.Parameter, held.original)
                    yield Site(prefix + attribute, quantizer, partial(quantizer.rows, original), original)
        if hasattr(module, "query_key_sites"):
            yield from module.query_key_sites(prefix)


def low_bit_sites(model: nn.Module) -> list[Site]:
    """The quantized weights of the smallest bit width: all but the first layer and the classifiers, as a rule.

    Raises:
        UsageError: There are none.
    """
    found = list(sites(model))
    if not found:
        raise UsageError("model has no quantized weight: call prepare_ofq_ first")
    bits = min(site.quantizer.bits for site in found)
    return [site for site in found if site.quantizer.bits == bits]


def check_boundary(boundary: float) -> None:
    """Refuse boundary ranges that hold nothing, or everything."""
    if not 0 <= boundary < 0.5:
        raise UsageError(f"boundary must be at least 0 and below 0.5 (which holds every weight), got {boundary}")


def threshold_distance(w: Tensor, step: Tensor, bits: int, *, offset: float) -> Tensor:
    """How far each entry is from the nearest of the ``2^bits - 1`` inner thresholds, in steps between levels.

    In units of the step, shifted so that thresholds are integers, that is the distance to the nearest integer of
    ``-(2^(bits-1) - 1) ... 2^(bits-1) - 1``.

    Args:
        w: Any shape.
        step: Distance between levels, broadcastable to ``w``.
        bits: Bit width.
        offset: 0.5 for levels at half-integers, else 0.

    Returns:
        Shaped like ``w``, in the dtype of ``step``.
    """
    outermost = (1 << (bits - 1)) - 1
    units = w.to(step.dtype) / step
    if offset != 0.5:
        units = units.add_(0.5 - offset)
    return units.round().clamp_(-outermost, outermost).sub_(units).abs_()
