"""The table of activations: what each can take on an interval, and which lines lie below and above it."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weightsmith.certify.affine import gamma, replaced_by_size
from weightsmith.certify.interval import Interval, intervals, lower, upper
from weightsmith.certify.lines import bent, convex, piecewise, s_shaped
from weightsmith.certify.rules import RULES, Lines, Rule
from weightsmith.core.errors import UsageError
from weightsmith.core.graph import UnsupportedOperation


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
    bowl = exponent < 0 or (exponent == int(exponent) and int(exponent) % 2 == 0)
    if exponent == 1:
        return Lines(torch.ones_like(args[0].lower), None, torch.ones_like(args[0].lower), None)
    if not bowl and exponent > 1 and not bool((args[0].lower >= 0).all()):
        raise UnsupportedOperation("an odd power of what may be negative has no linear bounds: use method='ibp'")
    return convex(1 if bowl or exponent > 1 else -1)(call, args, kwargs)


def _falling(call: Any, args: Any, kwargs: Any) -> Interval:
    x = args[0]
    if not bool((x.lower > 0).all()) and not bool((x.upper < 0).all()):
        raise UsageError("eps is too large: the model takes the reciprocal of a quantity whose bounds contain 0")
    return Interval(call(x.upper, *args[1:], **kwargs), call(x.lower, *args[1:], **kwargs))


def _reciprocal_lines(call: Any, args: Any, kwargs: Any) -> Lines:
    return convex(1 if bool((args[0].lower > 0).all()) else -1)(call, args, kwargs)


def _clamp_corners(*args: Any, **kwargs: Any) -> list[float]:
    given = [*args, *kwargs.values()]
    if any(isinstance(end, Tensor | Interval) for end in given):
        raise UnsupportedOperation("clamp with tensors has no linear bounds: use method='ibp'")
    return [float(end) for end in given if end is not None]


def _hardtanh_corners(min_val: float = -1.0, max_val: float = 1.0) -> tuple[float, float]:
    return min_val, max_val


def _gelu(part: str) -> Callable[..., Any]:
    def rule(call: Any, args: Any, kwargs: Any) -> Any:
        kind = kwargs.get("approximate", args[1] if len(args) > 1 else "none")
        exact = kind == "none"
        if part == "crown":
            return bent(0.8, 12.0)(call, args, kwargs)
        return _turning(*((-0.7517915, -0.16997131) if exact else (-0.7524614, -0.17004085)))(call, args, kwargs)

    return rule


def _elu(part: str) -> Callable[..., Any]:
    def rule(call: Any, args: Any, kwargs: Any) -> Any:
        alpha = kwargs.get("alpha", args[1] if len(args) > 1 else 1.0)
        if alpha < 0:
            raise UnsupportedOperation(f"elu with a negative alpha, {alpha}, has no bounds")
        if part == "ibp":
            return monotone(call, args, kwargs)
        return (convex() if alpha <= 1 else bent(alpha, 60.0, corners=(0.0,)))(call, args, kwargs)

    return rule


def _celu(part: str) -> Callable[..., Any]:
    def rule(call: Any, args: Any, kwargs: Any) -> Any:
        alpha = kwargs.get("alpha", args[1] if len(args) > 1 else 1.0)
        if alpha <= 0:
            raise UnsupportedOperation(f"celu with alpha={alpha}, which is not above 0, has no bounds")
        return (monotone if part == "ibp" else convex())(call, args, kwargs)

    return rule


def _softplus(part: str) -> Callable[..., Any]:
    def rule(call: Any, args: Any, kwargs: Any) -> Any:
        threshold = kwargs.get("threshold", args[2] if len(args) > 2 else 20.0)
        beta = kwargs.get("beta", args[1] if len(args) > 1 else 1.0)
        if threshold < 15 or beta <= 0:  # it jumps at threshold / beta, by log(1 + exp(-threshold)) / beta
            raise UnsupportedOperation(
                f"softplus with a threshold below 15 or a beta not above 0, {threshold} and {beta}, has no bounds"
            )
        return (monotone if part == "ibp" else convex())(call, args, kwargs)

    return rule


def enter(names: str, ibp: Any, crown: Any) -> None:
    """Put activations into the table of operations."""
    for name in names.split():
        RULES[name] = Rule(ibp, crown, rounding=_rounding)


enter("sigmoid tanh softsign atan", monotone, s_shaped)
enter("exp", monotone, convex())
enter("celu", _celu("ibp"), _celu("crown"))
enter("elu", _elu("ibp"), _elu("crown"))
enter("softplus", _softplus("ibp"), _softplus("crown"))
enter("log sqrt logsigmoid log1p", monotone, convex(-1))
enter("rsqrt", _falling, convex())
enter("reciprocal", _falling, _reciprocal_lines)
enter("square", _turning(0.0), convex())
enter("abs", _turning(0.0), piecewise(lambda *_, **__: (0.0,)))
enter("pow", power, _power_lines)
enter("relu6", monotone, piecewise(lambda *_, **__: (0.0, 6.0)))
enter("hardtanh", monotone, piecewise(_hardtanh_corners))
enter("hardsigmoid", monotone, piecewise(lambda *_, **__: (-3.0, 3.0)))
enter("clamp clamp_min clamp_max", monotone, piecewise(_clamp_corners))
enter("selu", monotone, bent(1.76, 60.0, corners=(0.0,)))
enter("hardswish", _turning(-1.5, -0.3750001), bent(0.3333334, 4.0, corners=(-3.0, 3.0)))
enter("gelu", _gelu("ibp"), _gelu("crown"))
enter("silu", _turning(-1.2784645, -0.27846464), bent(0.51, 40.0))
enter("mish", _turning(-1.1924312, -0.30884351), bent(0.7, 40.0))


def _sign(call: Any, args: Any, kwargs: Any) -> Interval:
    if intervals(kwargs):
        raise UnsupportedOperation("an option that depends on the input has no bounds")
    return monotone(call, args, kwargs)


enter("sign floor ceil round erf expm1", _sign, None)


def _cast(call: Any, args: Any, kwargs: Any) -> Interval:
    """A cast to fewer digits and back: what rounding to nearest gives, and the exact number too."""
    x = args[0]
    return Interval(torch.minimum(x.lower, call(x.lower, *args[1:], **kwargs)),
                    torch.maximum(x.upper, call(x.upper, *args[1:], **kwargs)))  # fmt: skip


def _cast_lines(call: Any, args: Any, kwargs: Any) -> Lines:
    """``x`` plus or minus the largest rounding error."""
    x, kind = args[0], torch.finfo(args[1])
    one = torch.ones_like(x.lower)
    if kind.bits >= torch.finfo(one.dtype).bits:
        return Lines(one, None, one, None)
    size = torch.maximum(x.lower.abs(), x.upper.abs())
    error = torch.where(size > kind.max, torch.inf, size * kind.eps + kind.tiny)
    return Lines(one, -error, one, error)


enter("cast", _cast, _cast_lines)
for _name in ("maximum", "minimum", "amax", "amin", "logsumexp"):
    RULES[_name] = Rule(monotone, None)
