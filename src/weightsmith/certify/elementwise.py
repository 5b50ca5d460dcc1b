"""Bounds of activations: what they can take on an interval, and lines below and above them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.certify.affine import gamma, replaced_by_size
from weightsmith.certify.interval import Interval, intervals, lower, upper
from weightsmith.certify.rules import RULES, Lines, Rule
from weightsmith.core.errors import UsageError
from weightsmith.core.graph import UnsupportedOperation

Fn = Callable[[Tensor], Tensor]


def _rounding(call: Any, args: Any, kwargs: Any, out: Interval) -> Tensor:
    """Elementary functions of math libraries are correct to a few units in the last place."""
    error: Tensor = gamma(8, out.sample) * replaced_by_size(out) + torch.finfo(out.sample.dtype).tiny
    return error


def monotone(call: Any, args: Any, kwargs: Any) -> Interval:
    """A function that does not decrease: the ends go through."""
    return Interval(call(*lower(args), **lower(kwargs)), call(*upper(args), **upper(kwargs)))


def _turning(point: float, least: float | None = None) -> Callable[..., Interval]:
    """A function that falls until ``point`` and rises after it; ``least``: its value there, or a little less."""

    def ibp(call: Any, args: Any, kwargs: Any) -> Interval:
        x, *more = args
        ends = call(x.lower, *more, **kwargs), call(x.upper, *more, **kwargs)
        bottom = torch.full_like(ends[0], point)
        value = call(bottom, *more, **kwargs) if least is None else torch.full_like(bottom, least)
        inside = (x.lower <= point) & (x.upper >= point)
        return Interval(torch.where(inside, value, torch.minimum(*ends)), torch.maximum(*ends))

    return ibp


# --- lines ------------------------------------------------------------------------------------------------------------


def _of_one(x: Tensor, call: Any, args: Any, kwargs: Any) -> Tensor:
    found: Tensor = call(x, *args[1:], **kwargs)
    return found


def _chord(f: Fn, x: Interval) -> tuple[Tensor, Tensor, Tensor]:
    """Slope of the line through both ends, and the function there; any slope is sound, so tiny widths do no harm."""
    low, high = f(x.lower), f(x.upper)
    return (high - low) / (x.upper - x.lower).clamp_min(1e-8), low, high


def _tangent(f: Fn, at: Tensor) -> tuple[Tensor, Tensor]:
    """Slope and offset of the tangent at a point."""
    found: Any = torch.func.jvp(f, (at,), (torch.ones_like(at),))
    value, slope = found
    return slope, value - slope * at


def _convex(sign: int = 1) -> Callable[..., Lines]:
    """Convex (or concave: ``sign=-1``) functions: the chord on one side, the tangent at the center on the other."""

    def crown(call: Any, args: Any, kwargs: Any) -> Lines:
        x = args[0]

        def f(t: Tensor) -> Tensor:
            return _of_one(t, call, args, kwargs)

        slope, low, high = _chord(f, x)
        outer = torch.maximum if sign > 0 else torch.minimum
        offset = outer(low - slope * x.lower, high - slope * x.upper)
        tangent, tangent_at = _tangent(f, x.center)
        return Lines(tangent, tangent_at, slope, offset) if sign > 0 else Lines(slope, offset, tangent, tangent_at)

    return crown


def s_shaped(call: Any, args: Any, kwargs: Any) -> Lines:
    """Convex below 0 and concave above (sigmoid, tanh): chord and tangent, or two parallels where both bend.

    Across 0 the slope is the smaller one of both ends: the derivative, largest at 0, is nowhere less.
    """
    x = args[0]

    def f(t: Tensor) -> Tensor:
        return _of_one(t, call, args, kwargs)

    chord, low, high = _chord(f, x)
    middle, middle_at = _tangent(f, x.center)
    steep = torch.minimum(_tangent(f, x.lower)[0], _tangent(f, x.upper)[0])
    convex, concave = x.upper <= 0, x.lower >= 0
    below = torch.where(convex, middle, torch.where(concave, chord, steep))
    above = torch.where(concave, middle, torch.where(convex, chord, steep))
    ends = low - below * x.lower, high - below * x.upper
    below_at = torch.where(convex, middle_at, torch.minimum(*ends))
    ends = low - above * x.lower, high - above * x.upper
    above_at = torch.where(concave, middle_at, torch.maximum(*ends))
    return Lines(below, below_at, above, above_at)


def _bent(curvature: float, reach: float, corners: Sequence[float] = (), points: int = 64) -> Callable[..., Lines]:
    """Two parallels to the chord for a function that is smooth apart from corners, and straight beyond ``reach``.

    The largest distance to the chord is searched on a grid; between two points at distance ``h`` the function leaves
    its own chord by at most ``curvature h^2 / 8``, which is added.
    """

    def crown(call: Any, args: Any, kwargs: Any) -> Lines:
        x = args[0]

        def f(t: Tensor) -> Tensor:
            return _of_one(t, call, args, kwargs)

        slope, low, high = _chord(f, x)
        least = torch.minimum(low - slope * x.lower, high - slope * x.upper)
        most = torch.maximum(low - slope * x.lower, high - slope * x.upper)
        first, last = x.lower.clamp(-reach, reach), x.upper.clamp(-reach, reach)
        h = (last - first) / points
        slack = curvature * h.square() / 8 + 1e-9
        inside = [torch.minimum(torch.maximum(torch.full_like(h, at), x.lower), x.upper) for at in corners]
        for at in [*(first + index * h for index in range(points + 1)), *inside]:
            distance = f(at) - slope * at
            least, most = torch.minimum(least, distance), torch.maximum(most, distance)
        return Lines(slope, least - slack, slope, most + slack)

    return crown


def _piecewise(corners: Callable[..., Sequence[float]]) -> Callable[..., Lines]:
    """Two parallels to the chord for a function of straight pieces: the extremes are at its corners."""

    def crown(call: Any, args: Any, kwargs: Any) -> Lines:
        x = args[0]

        def f(t: Tensor) -> Tensor:
            return _of_one(t, call, args, kwargs)

        slope, low, high = _chord(f, x)
        distances = [low - slope * x.lower, high - slope * x.upper]
        for corner in corners(*args[1:], **kwargs):
            at = torch.minimum(torch.maximum(torch.full_like(slope, corner), x.lower), x.upper)
            distances.append(f(at) - slope * at)
        stacked = torch.stack(distances)
        return Lines(slope, stacked.amin(0), slope, stacked.amax(0))

    return crown


# --- ReLU and its relatives -------------------------------------------------------------------------------------------


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


class _ReluOfBall(torch.autograd.Function):
    """ReLU from center and radius to center and radius in few passes over memory, with two masks for the way back."""

    @staticmethod
    def forward(ctx: Any, center: Tensor, radius: Tensor) -> tuple[Tensor, Tensor]:
        high, low = center + radius, center - radius
        if ctx is not None and any(ctx.needs_input_grad):
            ctx.save_for_backward(high > 0, low > 0)
        high, low = high.clamp_(min=0), low.clamp_(min=0)
        out = high.sub_(low).mul_(0.5)
        return low.add_(out), out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        of_center, of_radius = grads
        above, below = ctx.saved_tensors
        first, second = (of_center + of_radius).mul_(above), (of_center - of_radius).mul_(below)
        return (first + second).mul_(0.5), first.sub(second).mul_(0.5)


def relu(call: Any, args: Any, kwargs: Any) -> Interval:
    """ReLU, in the form that its argument is in."""
    x = args[0]
    if x._center is None or x._radius is None:
        return monotone(call, args, kwargs)
    if not torch.is_grad_enabled():
        return Interval.ball(*_ReluOfBall.forward(None, x._center, x._radius))
    return Interval.ball(*_ReluOfBall.apply(x._center, x._radius))  # type: ignore[no-untyped-call]


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
    return _piecewise(lambda *_, **__: (0.0,))(call, args, kwargs)


# --- powers -----------------------------------------------------------------------------------------------------------


def power(call: Any, args: Any, kwargs: Any) -> Interval:
    """``x ** n`` for a constant ``n``."""
    x, exponent = args[0], args[1] if len(args) > 1 else kwargs["exponent"]
    if not isinstance(x, Interval) or not isinstance(exponent, int | float):
        raise UnsupportedOperation("a power needs a constant exponent to have bounds")
    if exponent == int(exponent) and exponent > 0:
        return _turning(0.0)(call, args, kwargs) if int(exponent) % 2 == 0 else monotone(call, args, kwargs)
    if exponent <= 0 and not bool((x.lower > 0).all()):
        raise UsageError(f"eps is too large: the model takes the power {exponent} of a quantity that may be 0 or less")
    ends = call(x.lower, exponent), call(x.upper, exponent)
    return Interval(*(ends if exponent > 0 else ends[::-1]))


def _power_lines(call: Any, args: Any, kwargs: Any) -> Lines:
    exponent = args[1] if len(args) > 1 else kwargs["exponent"]
    convex = exponent < 0 or (exponent == int(exponent) and int(exponent) % 2 == 0)
    if exponent == 1:
        return Lines(torch.ones_like(args[0].lower), None, torch.ones_like(args[0].lower), None)
    if not convex and exponent > 1 and not bool((args[0].lower >= 0).all()):
        raise UnsupportedOperation("an odd power of what may be negative has no linear bounds: use method='ibp'")
    return _convex(1 if convex or exponent > 1 else -1)(call, args, kwargs)


def _falling(call: Any, args: Any, kwargs: Any) -> Interval:
    x = args[0]
    if not bool((x.lower > 0).all()) and not bool((x.upper < 0).all()):
        raise UsageError("eps is too large: the model takes the reciprocal of a quantity whose bounds contain 0")
    return Interval(call(x.upper, *args[1:], **kwargs), call(x.lower, *args[1:], **kwargs))


def _reciprocal_lines(call: Any, args: Any, kwargs: Any) -> Lines:
    return _convex(1 if bool((args[0].lower > 0).all()) else -1)(call, args, kwargs)


def _clamp_corners(*args: Any, **kwargs: Any) -> list[float]:
    given = [*args, *kwargs.values()]
    if any(isinstance(end, Tensor) for end in given):
        raise UnsupportedOperation("clamp with tensors has no linear bounds: use method='ibp'")
    return [float(end) for end in given if end is not None]


def _hardtanh_corners(min_val: float = -1.0, max_val: float = 1.0) -> tuple[float, float]:
    return min_val, max_val


def _gelu(part: str) -> Callable[..., Any]:
    def rule(call: Any, args: Any, kwargs: Any) -> Any:
        kind = kwargs.get("approximate", args[1] if len(args) > 1 else "none")
        exact = kind == "none"
        if part == "crown":
            return _bent(0.8, 12.0)(call, args, kwargs)
        return _turning(*((-0.7517915, -0.16997131) if exact else (-0.7524614, -0.17004085)))(call, args, kwargs)

    return rule


def _elu(part: str) -> Callable[..., Any]:
    def rule(call: Any, args: Any, kwargs: Any) -> Any:
        alpha = kwargs.get("alpha", args[1] if len(args) > 1 else 1.0)
        if alpha < 0:
            raise UnsupportedOperation(f"elu with a negative alpha, {alpha}, has no bounds")
        if part == "ibp":
            return monotone(call, args, kwargs)
        return (_convex() if alpha <= 1 else _bent(alpha, 60.0, corners=(0.0,)))(call, args, kwargs)

    return rule


def _softplus(part: str) -> Callable[..., Any]:
    def rule(call: Any, args: Any, kwargs: Any) -> Any:
        threshold = kwargs.get("threshold", args[2] if len(args) > 2 else 20.0)
        if threshold < 15:  # it jumps there, by log(1 + exp(-threshold)) / beta
            raise UnsupportedOperation(f"softplus with a threshold below 15, {threshold}, has no bounds")
        return (monotone if part == "ibp" else _convex())(call, args, kwargs)

    return rule


def _enter(names: str, ibp: Any, crown: Any) -> None:
    for name in names.split():
        RULES[name] = Rule(ibp, crown, rounding=_rounding)


_enter("relu", relu, lambda call, args, kwargs: relu_lines(args[0]))
_enter("leaky_relu prelu", _leaky, _leaky_lines)
_enter("sigmoid tanh softsign atan", monotone, s_shaped)
_enter("exp celu", monotone, _convex())
_enter("elu", _elu("ibp"), _elu("crown"))
_enter("softplus", _softplus("ibp"), _softplus("crown"))
_enter("log sqrt logsigmoid log1p", monotone, _convex(-1))
_enter("rsqrt", _falling, _convex())
_enter("reciprocal", _falling, _reciprocal_lines)
_enter("square", _turning(0.0), _convex())
_enter("abs", _turning(0.0), _piecewise(lambda *_, **__: (0.0,)))
_enter("pow", power, _power_lines)
_enter("relu6", monotone, _piecewise(lambda *_, **__: (0.0, 6.0)))
_enter("hardtanh", monotone, _piecewise(_hardtanh_corners))
_enter("hardsigmoid", monotone, _piecewise(lambda *_, **__: (-3.0, 3.0)))
_enter("clamp clamp_min clamp_max", monotone, _piecewise(_clamp_corners))
_enter("selu", monotone, _bent(1.76, 60.0, corners=(0.0,)))
_enter("hardswish", _turning(-1.5, -0.3750001), _bent(0.3333334, 4.0, corners=(-3.0, 3.0)))
_enter("gelu", _gelu("ibp"), _gelu("crown"))
_enter("silu", _turning(-1.2784645, -0.27846464), _bent(0.51, 40.0))
_enter("mish", _turning(-1.1924312, -0.30884351), _bent(0.7, 40.0))


def _sign(call: Any, args: Any, kwargs: Any) -> Interval:
    if intervals(kwargs):
        raise UnsupportedOperation("an option that depends on the input has no bounds")
    return monotone(call, args, kwargs)


_enter("sign floor ceil round erf expm1", _sign, None)
for _name in ("maximum", "minimum", "amax", "amin", "logsumexp"):
    RULES[_name] = Rule(monotone, None)
