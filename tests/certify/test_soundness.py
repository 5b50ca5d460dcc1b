"""No point of a box ever leaves the bounds: random networks, residual ones too, random boxes, corners, attacks."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F

from weightsmith.certify import BoundOptions, bounds, input_box, margins, pgd

METHODS = ("ibp", "crown-ibp", "crown")
ACTIVATIONS = {
    "relu": torch.relu,
    "leaky": lambda x: F.leaky_relu(x, 0.3),
    "steep leaky": lambda x: F.leaky_relu(x, 1.7),
    "falling leaky": lambda x: F.leaky_relu(x, -0.4),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "softplus": F.softplus,
    "elu": F.elu,
    "steep elu": lambda x: F.elu(x, alpha=2.0),
    "celu": F.celu,
    "selu": F.selu,
    "gelu": F.gelu,
    "gelu tanh": lambda x: F.gelu(x, approximate="tanh"),
    "silu": F.silu,
    "mish": F.mish,
    "hardswish": F.hardswish,
    "hardtanh": F.hardtanh,
    "relu6": lambda x: F.relu6(4 * x),
    "hardsigmoid": F.hardsigmoid,
    "clamp": lambda x: x.clamp(-0.5, 0.7),
    "abs": torch.abs,
    "square": lambda x: x**2,
    "cube of relu": lambda x: torch.relu(x) ** 3,
    "exp": lambda x: torch.exp(x / 2),
    "log": lambda x: torch.log(F.softplus(x) + 0.5),
    "sqrt": lambda x: torch.sqrt(torch.sigmoid(x) + 0.1),
    "rsqrt": lambda x: torch.rsqrt(torch.sigmoid(x) + 0.1),
    "reciprocal": lambda x: torch.reciprocal(torch.sigmoid(x) + 0.2),
    "logsigmoid": F.logsigmoid,
    "atan": torch.atan,
    "softsign": F.softsign,
    "softmax": lambda x: x.softmax(1),
    "product": lambda x: x * torch.sigmoid(x.flip(1)),
    "layer norm": lambda x: F.layer_norm(x, x.shape[1:]),
    "rms norm": lambda x: F.rms_norm(x, x.shape[1:], eps=1e-3),
}


class Tangle(nn.Module):
    """Layers whose inputs are sums, differences, products and concatenations of earlier ones."""

    def __init__(self, seed, act, depth, width):
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.act = ACTIVATIONS[act]
        self.layers = nn.ModuleList(nn.Linear(width, width) for _ in range(depth))
        self.join, self.head = nn.Linear(2 * width, width), nn.Linear(width, 3)
        for parameter in self.parameters():
            with torch.no_grad():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) / 2)
        self.kinds = torch.randint(4, (depth,), generator=generator).tolist()

    def forward(self, x):
        before = x
        for layer, kind in zip(self.layers, self.kinds, strict=True):
            y = self.act(layer(x))
            if kind == 1:
                y = y + before
            elif kind == 2:
                y = 0.5 * before - y
            elif kind == 3:
                y = self.join(torch.cat([before, y], 1))
            before, x = x, y
        return self.head(x)


def points(box, count, seed):
    """Random points of a box, corners among them."""
    generator = torch.Generator().manual_seed(seed)
    share = torch.rand(count, *box.lower.shape, generator=generator, dtype=box.lower.dtype)
    share[: count // 2] = share[: count // 2].round()
    return (box.lower + share * (box.upper - box.lower)).flatten(0, 1)


def outside(model, box, found, seed=0, count=200):
    """By how much the worst of many points leaves the bounds, relative to their size."""
    with torch.no_grad():
        values = model(points(box, count, seed)).view(count, *found.lower.shape)
    scale = 1 + found.upper.abs().max().item() + found.lower.abs().max().item()
    return max((found.lower - values).max().item(), (values - found.upper).max().item()) / scale


@pytest.mark.parametrize("act", ACTIVATIONS)
@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.sampled_from([0.0, 1e-4, 0.05, 0.3, 1.5]), depth=st.integers(1, 3))
def test_no_point_leaves_the_bounds(act, seed, eps, depth):
    model = Tangle(seed, act, depth, 4).double().eval()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    box = input_box(x, eps)
    for method in METHODS:
        for options in (BoundOptions(), BoundOptions(intersect=True)):
            if options.intersect and method == "ibp":
                continue
            found = bounds(model, x, eps, method=method, options=options)
            assert not found.lower.isnan().any()
            assert not found.upper.isnan().any()
            if not (found.upper - found.lower).isfinite().all():  # exp of exp: nothing is claimed
                continue
            assert outside(model, box, found, seed) < 1e-9, method


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    eps=st.floats(0, 1),
    mode=st.sampled_from(["adaptive", "zero-lb", "one-lb", "same-slope"]),
)
def test_every_lower_line_of_relu_is_sound(seed, eps, mode):
    model = Tangle(seed, "relu", 3, 4).double()
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    for method in ("crown-ibp", "crown"):
        found = bounds(model, x, eps, method=method, options=BoundOptions(relu=mode))
        assert outside(model, input_box(x, eps), found, seed) < 1e-9


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.floats(0.001, 0.5))
def test_an_attack_never_breaks_a_certificate(seed, eps):
    model = Tangle(seed, "relu", 3, 4).double()
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = model(x).argmax(1)
    worst = pgd(model, input_box(x, eps), labels, steps=20, generator=torch.Generator().manual_seed(1))
    assert ((worst - x).abs() <= eps + 1e-12).all()
    wrong = model(worst).argmax(1) != labels
    for method in METHODS:
        proved = (margins(model, x, labels, eps, method=method).lower > 0).all(1)
        assert not (proved & wrong).any()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), share=st.floats(0.05, 1.0), sign=st.sampled_from([-1.0, 1.0]))
def test_a_planted_counterexample_is_never_certified(seed, share, sign):
    """A spike of the wrong class around one point of the box, near or far from its center."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(1, 4, generator=generator, dtype=torch.float64)
    bad = x + 0.2 * share * sign * (1 - 2 * torch.rand(1, 4, generator=generator, dtype=torch.float64))
    spike = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 1), nn.ReLU(), nn.Linear(1, 2)).double()
    with torch.no_grad():  # relu(0.01 - |x - bad|_1): above 0 in a small neighborhood of the point alone
        eye = torch.eye(4, dtype=torch.float64)
        spike[0].weight.copy_(torch.cat([eye, -eye]))
        spike[0].bias.copy_(torch.cat([-bad[0], bad[0]]))
        spike[2].weight.fill_(-1.0)
        spike[2].bias.fill_(0.01)
        spike[4].weight.copy_(torch.tensor([[0.0], [1000.0]]))
        spike[4].bias.copy_(torch.tensor([1.0, 0.0]))
    assert spike(bad).argmax(1).item() == 1
    for method in METHODS:
        assert margins(spike, x, torch.tensor([0]), 0.2, method=method).lower.min() <= 0


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), small=st.floats(0, 0.3), more=st.floats(0, 0.3))
def test_a_wider_box_has_wider_bounds(seed, small, more):
    model = Tangle(seed, "relu", 2, 4).double()
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    inner, outer = bounds(model, x, small), bounds(model, x, small + more)
    assert (outer.lower <= inner.lower + 1e-12).all()
    assert (outer.upper >= inner.upper - 1e-12).all()


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.floats(0, 1))
def test_elided_margins_are_at_least_those_of_subtracted_logits(seed, eps):
    model = Tangle(seed, "relu", 2, 4).double()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    labels = torch.tensor([0, 1, 2])
    logits, proved = bounds(model, x, eps), margins(model, x, labels, eps)
    for row, label in enumerate(labels.tolist()):
        others = [j for j in range(3) if j != label]
        naive = logits.lower[row, label] - logits.upper[row, others]
        assert (proved.lower[row] >= naive - 1e-10).all()


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.floats(0, 2))
def test_crown_is_exact_for_a_linear_network(seed, eps):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 6), nn.Linear(6, 3)).double()
    x = torch.randn(2, 5, dtype=torch.float64)
    matrix = model[2].weight @ model[1].weight @ model[0].weight
    for method in ("crown", "crown-ibp"):
        found = bounds(model, x, eps, method=method)
        torch.testing.assert_close(found.upper, model(x) + eps * matrix.abs().sum(1), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_without_a_box_bounds_are_the_output(act, method):
    model = Tangle(3, act, 3, 4).double()
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = bounds(model, x, 0.0, method=method)
    atol = 2e-4 if act in ("gelu", "gelu tanh", "silu", "mish", "selu", "hardswish", "steep elu") else 1e-7
    torch.testing.assert_close(found.lower, model(x), rtol=1e-6, atol=atol)
    torch.testing.assert_close(found.upper, model(x), rtol=1e-6, atol=atol)


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.floats(0, 0.5))
def test_float32_bounds_differ_from_float64_by_no_more_than_the_stated_tolerance(seed, eps):
    model = Tangle(seed, "relu", 3, 4)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
    for method in METHODS:
        single = bounds(model, x, eps, method=method)
        double = bounds(model, x, eps, method=method, options=BoundOptions(dtype=torch.float64))
        assert (single.lower - double.lower).abs().max() <= single.tolerance
        assert (single.upper - double.upper).abs().max() <= single.tolerance


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), eps=st.floats(0, 0.5), act=st.sampled_from(["relu", "tanh", "gelu", "abs"]))
def test_outward_rounding_contains_the_bounds_of_exact_arithmetic(seed, eps, act):
    model = Tangle(seed, act, 3, 4)
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(seed))
    outward = bounds(model, x, eps, options=BoundOptions(rounding="outward"))
    nearest = bounds(model, x, eps, options=BoundOptions(dtype=torch.float64))
    assert outward.tolerance == 0
    assert (outward.lower < nearest.lower).all()
    assert (outward.upper > nearest.upper).all()
    torch.testing.assert_close(outward.lower, nearest.lower, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_a_million_points_stay_inside(method):
    model = Tangle(11, "relu", 3, 4).double()
    x = torch.randn(4, 4, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    found, box = bounds(model, x, 0.2, method=method), input_box(x, 0.2)
    for seed in range(25):  # 25 x 40,000 x 4 points
        assert outside(model, box, found, seed, 40_000) <= 1e-12
