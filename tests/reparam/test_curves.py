import math

import pytest
import torch

from weightsmith.reparam import Curve, WeightCompander
from weightsmith.reparam.curves import CURVES, as_curve

TANH = Curve("tanh", torch.tanh, lambda u: 1 - torch.tanh(u).square(), torch.atanh, bound=1.0)


@pytest.mark.parametrize("curve", CURVES.values(), ids=CURVES)
def test_built_in_curves_keep_the_promises_asked_of_a_user(curve: Curve) -> None:
    copy = Curve("copy", curve.value, curve.slope, curve.inverse, curve.bound)
    assert as_curve(copy) is copy


def test_a_curve_of_the_user_bounds_weights_and_inverts() -> None:
    compander, w = WeightCompander(0.8, 0.5, TANH), torch.linspace(-0.7, 0.7, 9, dtype=torch.float64)
    torch.testing.assert_close(compander(compander.right_inverse(w)), w)
    assert compander.bound == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("curve", "broken"),
    [
        (Curve("square", torch.square, lambda u: 2 * u, torch.sqrt), "be odd"),
        (Curve("sine", torch.sin, torch.cos, torch.asin), "increase strictly"),
        (Curve("cube", lambda u: u**3, lambda u: 3 * u**2, lambda y: y ** (1 / 3)), "slope that decreases"),
        (Curve("line", lambda u: u, torch.ones_like, lambda y: y), "slope that decreases"),
        (Curve("tanh", torch.tanh, lambda u: 1 / (1 + u.square()), torch.atanh, 1.0), "`slope` as its derivative"),
        (Curve("tanh", torch.tanh, TANH.slope, torch.tan, 1.0), "`inverse` as its inverse"),
        (Curve("tanh", torch.tanh, TANH.slope, torch.atanh, 0.5), "stay below `bound`"),
    ],
    ids=lambda value: value.name if isinstance(value, Curve) else None,
)
def test_a_curve_that_breaks_a_promise_is_refused(curve: Curve, broken: str) -> None:
    with pytest.raises(ValueError, match=broken):
        WeightCompander(fn=curve)


def test_an_unknown_name_lists_near_ones() -> None:
    with pytest.raises(ValueError, match="did you mean 'arctan'"):
        WeightCompander(fn="arctang")
    with pytest.raises(TypeError, match="a Curve"):
        WeightCompander(fn=torch.atan)  # type: ignore[arg-type]


def test_bounds_are_those_of_the_paper() -> None:
    assert {name: curve.bound for name, curve in CURVES.items()} == {
        "arctan": math.pi / 2,
        "arcsinh": math.inf,
        "erf": 1.0,
    }
