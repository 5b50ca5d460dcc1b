"""Bounds of max pools, whose windows may overlap."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weightsmith.certify.elementwise import monotone
from weightsmith.certify.interval import Interval
from weightsmith.certify.rules import RULES, Planes, Rule

POOLS = tuple(f"{kind}max_pool{dims}d" for kind in ("", "adaptive_") for dims in (1, 2, 3))
_POOL = (F.max_pool1d, F.max_pool2d, F.max_pool3d)
_ADAPTIVE = (F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d)
_Axis = tuple[Tensor, Tensor]
"""Positions along one axis ``(windows, kernel)``, and which of them lie in the input."""


def _every(value: Any, dims: int) -> tuple[Any, ...]:
    return (
        (value,) * dims if value is None or isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)
    )


def _lines(call: Any, args: Any, kwargs: Any) -> Planes:
    x, kernel = args[0], args[1] if len(args) > 1 else kwargs["kernel_size"]
    names = ("stride", "padding", "dilation", "ceil_mode")
    given = dict(zip(names, args[2:], strict=False)) | dict(kwargs)
    dims = x.sample.dim() - 2
    kernel = _every(kernel, dims)
    stride = _every(given.get("stride") or kernel, dims)
    padding, dilation = _every(given.get("padding") or 0, dims), _every(given.get("dilation") or 1, dims)
    _, at = _POOL[dims - 1](
        x.lower, kernel, stride, padding, dilation, bool(given.get("ceil_mode", False)), return_indices=True
    )
    axes = []
    for axis, size in enumerate(x.shape[2:]):
        first = torch.arange(at.shape[axis + 2], device=at.device) * stride[axis] - padding[axis]
        positions = first[:, None] + torch.arange(kernel[axis], device=at.device) * dilation[axis]
        axes.append((positions, (positions >= 0) & (positions < size)))
    return _around(x, at, axes)


def _adaptive_lines(call: Any, args: Any, kwargs: Any) -> Planes:
    x, dims = args[0], args[0].sample.dim() - 2
    wanted = args[1] if len(args) > 1 else kwargs["output_size"]
    _, at = _ADAPTIVE[dims - 1](x.lower, wanted, return_indices=True)
    axes = []
    for size, count in zip(x.shape[2:], at.shape[2:], strict=True):
        index = torch.arange(count, device=at.device)
        first, end = index * size // count, ((index + 1) * size + count - 1) // count
        positions = first[:, None] + torch.arange(int((end - first).max()), device=at.device)
        axes.append((positions, positions < end[:, None]))
    return _around(x, at, axes)


def _around(x: Interval, at: Tensor, axes: Sequence[_Axis]) -> Planes:
    """The input whose lower end is largest, below; the largest upper end, above, or that input where it always wins.

    Args:
        x: What is pooled, ``(B, C, ...)``.
        at: By window: the flat index of the largest lower end.
        axes: Where windows lie.
    """
    index = torch.zeros(1, 1, dtype=torch.long, device=at.device)
    inside = torch.ones_like(index, dtype=torch.bool)
    for (positions, valid), size in zip(axes, x.shape[2:], strict=True):
        clamped = positions.clamp(0, size - 1)
        index = (index[:, None, :, None] * size + clamped[None, :, None]).flatten(2).flatten(0, 1)
        inside = (inside[:, None, :, None] & valid[None, :, None]).flatten(2).flatten(0, 1)
    flat = at.flatten(2)
    upper = x.upper.flatten(2)[..., index]
    rival = upper.masked_fill(~inside | (index == flat.unsqueeze(-1)), -torch.inf).amax(-1)
    best = x.lower.flatten(2).gather(2, flat)
    wins = (best >= rival).view_as(at)
    most = upper.masked_fill(~inside, -torch.inf).amax(-1).view_as(at)

    def chosen(t: Tensor) -> Tensor:
        return t.flatten(2).gather(2, flat).view_as(at)

    return Planes(chosen, lambda t: torch.where(wins, chosen(t), most))


def _exact(call: Any, args: Any, kwargs: Any, out: Interval) -> Tensor:
    return torch.zeros_like(out.sample)


for _name in POOLS:
    RULES[_name] = Rule(monotone, _adaptive_lines if _name.startswith("adaptive") else _lines, rounding=_exact)
