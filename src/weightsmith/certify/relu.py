"""Bounds of ReLU and of its relatives with a slope for negative inputs."""

from typing import Any

import torch
from torch import Tensor

from weightsmith.certify.elementwise import enter, monotone
from weightsmith.certify.fused import relu_of_ball
from weightsmith.certify.interval import Interval
from weightsmith.certify.lines import piecewise
from weightsmith.certify.rules import Lines
from weightsmith.core.graph import UnsupportedOperation


def relu_lines(x: Interval, slope: float | Tensor = 0.0, mode: str = "adaptive") -> Lines:
    """Lines around ``max(x, slope x)`` for ``slope <= 1``.

    With ``l' = min(l, 0)`` and ``u' = max(u, l' + 1e-8, 0)`` the upper line joins the ends; the lower one has slope 1
    or ``slope``, whichever leaves less between (arXiv 1811.00866), and carries no gradient.

    Args:
        x: Interval of the input.
        slope: For negative inputs.
        mode: Lower line: ``"adaptive"``, ``"zero-lb"``, ``"one-lb"``, or ``"same-slope"`` as the upper one.
    """
    low = x.lower.clamp(max=0)
    high = torch.maximum(x.upper.clamp(min=0), low + 1e-8)
    above = (high - slope * low) / (high - low)
    above_at = -low * above + slope * low
    one, other = torch.ones_like(above), torch.zeros_like(above) + slope
    if mode == "adaptive":
        below = torch.where(above > 0.5, one, other)
    elif mode == "same-slope":
        below = above
    else:
        below = other if mode == "zero-lb" else one
    if isinstance(slope, Tensor) or slope != 0 or mode != "adaptive":  # a stable neuron is a line
        below = torch.where(x.lower >= 0, one, torch.where(x.upper <= 0, other, below))
    return Lines(below.detach() if mode != "same-slope" else below, None, above, above_at)


def relu(call: Any, args: Any, kwargs: Any) -> Interval:
    """ReLU, in the form that its argument is in."""
    x = args[0]
    if x._center is None or x._radius is None:
        return monotone(call, args, kwargs)
    return Interval.ball(*relu_of_ball(x._center, x._radius))


def slope_of(x: Interval, weight: Tensor) -> Tensor:
    """The slopes of PReLU, one for all or one per channel, in the shape of the input."""
    return weight if weight.numel() == 1 else weight.view(-1, *[1] * (x.sample.dim() - 2))


def _leaky(call: Any, args: Any, kwargs: Any) -> Interval:
    x = args[0]
    slope = kwargs.get("weight", kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01))
    if isinstance(slope, Interval):
        raise UnsupportedOperation("a slope that depends on the input has no rule")
    if not isinstance(slope, Tensor) and slope >= 0:
        return monotone(call, args, kwargs)
    ends = call(x.lower, *args[1:], **kwargs), call(x.upper, *args[1:], **kwargs)
    across = (x.lower <= 0) & (x.upper >= 0)
    least = torch.where(across, torch.minimum(*ends).clamp(max=0), torch.minimum(*ends))
    return Interval(least, torch.where(across, torch.maximum(*ends).clamp(min=0), torch.maximum(*ends)))


def _leaky_lines(call: Any, args: Any, kwargs: Any) -> Lines:
    x = args[0]
    slope = kwargs.get("weight", kwargs.get("negative_slope", args[1] if len(args) > 1 else 0.01))
    slope = slope_of(x, slope) if isinstance(slope, Tensor) else slope
    if bool(torch.as_tensor(slope <= 1).all()):
        return relu_lines(x, slope)
    return piecewise(lambda *_, **__: (0.0,))(call, args, kwargs)


enter("relu", relu, lambda call, args, kwargs: relu_lines(args[0]))
enter("leaky_relu prelu", _leaky, _leaky_lines)
