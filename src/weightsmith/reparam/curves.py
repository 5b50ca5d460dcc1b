"""The functions a compander can bend weights with.

A curve is an odd function ``phi`` that rises everywhere and flattens with distance from zero. Scaled by ``a`` and ``b``
it turns a free number ``v`` into a weight ``w = a * phi(v / b)``.

Source: "Weight Compander: A Simple Weight Reparameterization for Regularization" (arXiv 2306.16993), section IV-F.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, unknown

Elementwise = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class Curve:
    """An odd, strictly increasing function whose slope falls with ``|u|``.

    Args:
        name: What messages call it.
        value: ``phi(u)``, elementwise, differentiable by autograd.
        slope: ``phi'(u)``, elementwise.
        inverse: ``phi^-1(y)`` for ``|y| < bound``, elementwise.
        bound: Limit of ``phi`` at infinity; ``inf`` (default) when there is none.

    Example:
        >>> import torch
        >>> tanh = Curve("tanh", torch.tanh, lambda u: 1 - torch.tanh(u).square(), torch.atanh, bound=1.0)
    """

    name: str
    value: Elementwise
    slope: Elementwise
    inverse: Elementwise
    bound: float = math.inf


# The first tensor of each chain is fresh, so that the next steps may overwrite it.
CURVES = {
    curve.name: curve
    for curve in (
        Curve("arctan", torch.atan, lambda u: u.square().add_(1).reciprocal_(), torch.tan, math.pi / 2),
        Curve("arcsinh", torch.asinh, lambda u: u.square().add_(1).rsqrt_(), torch.sinh),
        Curve("erf", torch.erf, lambda u: u.square().neg_().exp_() * (2 / math.sqrt(math.pi)), torch.erfinv, 1.0),
    )
}


def as_curve(fn: str | Curve) -> Curve:
    """Look up a built-in curve, or check a user's own on a grid over ``[-3, 3]``.

    Args:
        fn: ``"arctan"``, ``"arcsinh"``, ``"erf"`` or a `Curve`.

    Raises:
        TypeError: ``fn`` is neither.
        UsageError: The name is not known, or the curve breaks one of its promises.
    """
    if isinstance(fn, str):
        if fn not in CURVES:
            raise unknown("fn", fn, CURVES)
        return CURVES[fn]
    if not isinstance(fn, Curve):
        raise TypeError(f"fn must be one of {', '.join(map(repr, CURVES))} or a Curve, got {fn!r}")
    if fn is not CURVES.get(fn.name):
        _check(fn)
    return fn


@torch.no_grad()
def _check(curve: Curve) -> None:
    u, h = torch.linspace(0, 3, 61, dtype=torch.float64), 1e-5
    y, slope = curve.value(u), curve.slope(u)
    promises = {
        "be odd": torch.allclose(curve.value(-u), -y, atol=1e-12),
        "increase strictly": bool((y.diff() > 0).all()),
        "have a slope that decreases with |u|": bool((slope.diff() < 0).all()),
        "have `slope` as its derivative": torch.allclose(
            (curve.value(u + h) - curve.value(u - h)) / (2 * h), slope, rtol=1e-4, atol=1e-7
        ),
        "stay below `bound`": curve.bound > 0 and bool((y < curve.bound).all()),
        "have `inverse` as its inverse": torch.allclose(curve.inverse(y), u, rtol=1e-5, atol=1e-9),
    }
    broken = [promise for promise, kept in promises.items() if not kept]
    if broken:
        raise UsageError(f"fn={curve.name!r} cannot be a compander's curve: it must {broken[0]}")
