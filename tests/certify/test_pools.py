"""Max pools, overlapping ones and several in a row: linear bounds that no point leaves."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightsmith.certify import BoundOptions, bounds, input_box, margins, pgd

METHODS = ("ibp", "crown-ibp", "crown")
POOLS = (nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d)
CONVS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


def points(box, count, seed):
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(count, *box.lower.shape, generator=generator, dtype=box.lower.dtype)
    share[: count // 2] = share[: count // 2].round()
    return (box.lower + share * (box.upper - box.lower)).flatten(0, 1)


def assert_inside(model, x, eps, found, seed):
    with torch.no_grad():
        values = model(points(input_box(x, eps), 100, seed)).view(100, *found.lower.shape)
    size = 1 + found.upper.abs().max() + found.lower.abs().max()
    assert (values >= found.lower - 1e-9 * size).all()
    assert (values <= found.upper + 1e-9 * size).all()


def pooled(seed, dims, pools, side=7):
    """Convolution, pools in a row, ReLU and two layers on top."""
    torch.manual_seed(seed)
    body = nn.Sequential(CONVS[dims - 1](1, 2, 3, padding=1), *pools, nn.ReLU(), nn.Flatten())
    width = body(torch.zeros(1, 1, *[side] * dims)).shape[1]
    return nn.Sequential(body, nn.Linear(width, 5), nn.ReLU(), nn.Linear(5, 3)).double()


@st.composite
def windows(draw):
    kernel = draw(st.integers(1, 3))
    return {
        "kernel_size": kernel,
        "stride": draw(st.integers(1, 3)),
        "padding": draw(st.integers(0, kernel // 2)),
        "dilation": draw(st.integers(1, 2)) if kernel < 3 else 1,
        "ceil_mode": draw(st.booleans()),
    }


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.sampled_from([0.0, 0.02, 0.3, 2.0]), window=windows(), more=windows())
def test_no_point_leaves_the_bounds_of_two_pools_in_a_row(seed, eps, window, more):
    more = more if more["stride"] == 1 and window["stride"] < 3 else {"kernel_size": 2, "stride": 1}
    model = pooled(seed, 2, [nn.MaxPool2d(**window), nn.MaxPool2d(**more)])
    x = torch.randn(2, 1, 7, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for method in METHODS:
        found = bounds(model, x, eps, method=method)
        assert_inside(model, x, eps, found, seed)
        if eps == 0:
            torch.testing.assert_close(found.lower, model(x), rtol=1e-7, atol=1e-7)
            torch.testing.assert_close(found.upper, model(x), rtol=1e-7, atol=1e-7)


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.floats(0.001, 0.5), stride=st.integers(1, 2))
def test_an_attack_never_breaks_a_certificate_through_pools(seed, eps, stride):
    model = pooled(seed, 2, [nn.MaxPool2d(3, stride, 1), nn.MaxPool2d(3, 1)])
    x = torch.randn(4, 1, 7, 7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = model(x).argmax(1)
    worst = pgd(model, input_box(x, eps), labels, steps=10, generator=torch.Generator().manual_seed(1))
    wrong = model(worst).argmax(1) != labels
    for method in METHODS:
        proved = (margins(model, x, labels, eps, method=method).lower > 0).all(1)
        assert not (proved & wrong).any()


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1.0), place=st.integers(0, 24))
def test_a_counterexample_behind_overlapping_pools_is_never_certified(seed, share, place):
    """A spike of the wrong class around one point, in one pixel, that two overlapping pools pass on."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    bad = x + 0.2 * share * (1 - 2 * torch.rand(1, 4, generator=generator, dtype=torch.float64))
    model = nn.Sequential(
        nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.ReLU(), nn.Linear(1, 25), nn.Unflatten(1, (1, 5, 5)),
        nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(4, 2),
    ).double()  # fmt: skip
    with torch.no_grad():
        eye = torch.eye(4, dtype=torch.float64)
        model[0].weight.copy_(torch.cat([eye, -eye]))
        model[0].bias.copy_(torch.cat([-bad[0], bad[0]]))
        model[2].weight.fill_(-1.0)
        model[2].bias.fill_(0.01)
        model[4].weight.zero_()[place] = 1.0
        model[4].bias.zero_()
        model[9].weight.copy_(torch.tensor([[0.0] * 4, [1000.0] * 4]))
        model[9].bias.copy_(torch.tensor([1.0, 0.0]))
    assert model(bad).argmax(1).item() == 1
    assert model(x + 0.3).argmax(1).item() == 0
    for method in METHODS:
        assert margins(model, x, torch.tensor([0]), 0.2, method=method).lower.min() <= 0


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_pools_of_every_dimension_and_adaptive_ones_have_linear_bounds(dims):
    adaptive = getattr(nn, f"AdaptiveMaxPool{dims}d")
    for pools in ([POOLS[dims - 1](3, 2, 1), POOLS[dims - 1](2, 1)], [adaptive(3)], [adaptive(1)]):
        model = pooled(dims, dims, pools, side=7)
        x = torch.randn(2, 1, *[7] * dims, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        for eps in (0.05, 0.5):
            for method in ("crown-ibp", "crown"):
                assert_inside(model, x, eps, bounds(model, x, eps, method=method), 0)


def test_backward_bounds_through_overlapping_pools_are_tighter_than_intervals():
    model = pooled(3, 2, [nn.MaxPool2d(3, 2, 1), nn.MaxPool2d(3, 2, 1)])
    x = torch.randn(4, 1, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    width = {m: (f := bounds(model, x, 0.01, method=m)).upper.sum() - f.lower.sum() for m in METHODS}
    assert width["crown"] < width["ibp"]


def test_an_input_that_always_wins_passes_exactly():
    """The largest input of all windows leaves no room for another: bounds are those of a linear network."""
    pool = nn.Sequential(nn.MaxPool2d(2, 1), nn.Flatten(), nn.Linear(4, 2)).double()
    x = torch.zeros(1, 1, 3, 3, dtype=torch.float64)
    x[0, 0, 1, 1] = 5.0  # in every window
    found = bounds(pool, x, 0.5, method="crown-ibp")
    slope = pool[2].weight.sum(1).abs()
    torch.testing.assert_close(found.upper - found.lower, (slope * 1.0)[None], rtol=1e-12, atol=1e-12)


def test_bounds_of_pools_include_rounding_errors_outward():
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.MaxPool2d(3, 2), nn.Flatten(), nn.Linear(8, 3))
    x = torch.rand(2, 1, 8, 8)
    outward = bounds(model, x, 0.1, options=BoundOptions(rounding="outward"))
    exact = bounds(model, x, 0.1, options=BoundOptions(dtype=torch.float64))
    assert (outward.lower < exact.lower).all()
    torch.testing.assert_close(outward.lower, exact.lower, rtol=1e-9, atol=1e-9)


def test_gradients_go_through_linear_bounds_of_pools():
    model = pooled(1, 2, [nn.MaxPool2d(3, 2, 1)])
    x = torch.randn(2, 1, 7, 7, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    bounds(model, x, 0.1, method="crown").lower.sum().backward()
    assert model[0][0].weight.grad.abs().sum() > 0
