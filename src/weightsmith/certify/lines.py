"""Lines below and above a curve on an interval, by the shape of the curve: chords, tangents and parallels to them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from weightsmith.certify.interval import Interval
from weightsmith.certify.rules import Lines

Fn = Callable[[Tensor], Tensor]


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


def convex(sign: int = 1) -> Callable[..., Lines]:
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


def bent(curvature: float, reach: float, corners: Sequence[float] = (), points: int = 64) -> Callable[..., Lines]:
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


def piecewise(corners: Callable[..., Sequence[float]]) -> Callable[..., Lines]:
    """Two parallels to the chord for a function of straight pieces: the extremes are at its corners."""

    def crown(call: Any, args: Any, kwargs: Any) -> Lines:
        x = args[0]

        def f(t: Tensor) -> Tensor:
            return _of_one(t, call, args, kwargs)

        places = corners(*args[1:], **kwargs)
        slope, low, high = _chord(f, x)
        distances = [low - slope * x.lower, high - slope * x.upper]
        for corner in places:
            at = torch.minimum(torch.maximum(torch.full_like(slope, corner), x.lower), x.upper)
            distances.append(f(at) - slope * at)
        stacked = torch.stack(distances)
        return Lines(slope, stacked.amin(0), slope, stacked.amax(0))

    return crown
