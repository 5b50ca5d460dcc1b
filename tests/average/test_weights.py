import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsmith.average import decay_weights, metric_weights
from weightsmith.core.errors import UsageError

SCHEMES = {"power": 2.0, "linear": 0.7, "softmax": 0.5, "rank": 0.6, "uniform": 1.0}
values = st.lists(st.floats(0.01, 100), min_size=1, max_size=12)
scheme = st.sampled_from(sorted(SCHEMES))


@given(values, scheme, st.sampled_from(["loss", "steps", "score"]))
def test_weights_are_a_distribution(m, name, metric):
    w = metric_weights(m, metric, name, SCHEMES[name])
    assert w.dtype == np.float64
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1, abs=1e-12)


@given(values, scheme)
def test_a_better_checkpoint_never_counts_less(m, name):
    by_loss = metric_weights(m, "loss", name, SCHEMES[name])[np.argsort(m)]
    by_score = metric_weights(m, "score", name, SCHEMES[name])[np.argsort(m)]
    assert (np.diff(by_loss) <= 1e-15).all()
    assert (np.diff(by_score) >= -1e-15).all()


@given(values, scheme, st.randoms(use_true_random=False))
def test_the_order_of_checkpoints_does_not_matter(m, name, random):
    order = list(range(len(m)))
    random.shuffle(order)
    shuffled = metric_weights([m[i] for i in order], "loss", name, SCHEMES[name])
    np.testing.assert_allclose(shuffled, metric_weights(m, "loss", name, SCHEMES[name])[order], atol=1e-12)


@given(values, st.floats(0.1, 10))
def test_the_unit_of_the_metric_does_not_matter_to_power_linear_and_rank(m, unit):
    for name in ("power", "linear", "rank"):
        scaled = metric_weights([unit * x for x in m], "loss", name, SCHEMES[name])
        # rank decides by comparison, where rounding may part what was equal
        if name != "rank" or len({unit * x for x in m}) == len(set(m)):
            np.testing.assert_allclose(scaled, metric_weights(m, "loss", name, SCHEMES[name]), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "penalty"), [("uniform", 3.0), ("power", 0.0), ("linear", 0.0), ("rank", 1.0), ("softmax", 1e12)]
)
def test_the_mild_end_of_every_scheme_is_uniform(name, penalty):
    np.testing.assert_allclose(metric_weights([3.0, 1.0, 2.0], "loss", name, penalty), 1 / 3, atol=1e-9)


def test_the_sharp_ends():
    np.testing.assert_allclose(metric_weights([3, 1, 2], "loss", "softmax", 1e-3), [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(metric_weights([3, 1, 2], "loss", "power", 500), [0, 1, 0], atol=1e-12)
    np.testing.assert_allclose(metric_weights([3, 1, 2], "loss", "linear", 1), [0, 2 / 3, 1 / 3], atol=1e-12)


def test_huge_and_tiny_values_do_not_overflow():
    np.testing.assert_allclose(metric_weights([1e-200, 1e200], "loss", "power", 4), [1, 0], atol=1e-12)
    np.testing.assert_allclose(metric_weights([-1e6, 1e6], "score", "softmax", 1), [0, 1], atol=1e-12)


def test_ties_share_a_rank():
    np.testing.assert_allclose(metric_weights([2, 1, 1, 3], "loss", "rank", 0.5), np.array([0.25, 1, 1, 0.125]) / 2.375)


def test_equal_values_are_uniform_under_linear():
    np.testing.assert_allclose(metric_weights([2, 2], "loss", "linear", 1), [0.5, 0.5])


@pytest.mark.parametrize("name", [*SCHEMES, "ema"])
def test_one_checkpoint_gets_everything(name):
    assert metric_weights([0.3], "loss", name, {**SCHEMES, "ema": 0.5}[name]).tolist() == [1.0]


@pytest.mark.parametrize(
    ("name", "penalty"),
    [
        ("power", -0.1),
        ("linear", 1.1),
        ("linear", -1),
        ("rank", 0),
        ("rank", 1.5),
        ("softmax", 0),
        ("ema", 1),
        ("ema", 0),
    ],
)
def test_a_penalty_out_of_range_is_refused(name, penalty):
    with pytest.raises(UsageError, match=f"penalty of scheme '{name}' must be .*, got {penalty}"):
        metric_weights([1.0, 2.0], "loss", name, penalty)


def test_a_penalty_that_is_nan_is_refused():
    with pytest.raises(UsageError, match="penalty"):
        metric_weights([1.0, 2.0], penalty=float("nan"))


@pytest.mark.parametrize("loss", [0.0, -0.5])
def test_power_refuses_losses_that_are_not_positive_and_names_other_schemes(loss):
    with pytest.raises(UsageError, match=r"above 0 .*'linear', 'rank' or 'softmax'"):
        metric_weights([1.0, loss])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named(value):
    with pytest.raises(UsageError, match=r"values\[1\] must be finite"):
        metric_weights([1.0, value])


def test_all_raw_weights_zero_is_an_error():
    with pytest.raises(UsageError, match="all raw weights are 0"):
        metric_weights([0, 0], "steps")


def test_step_zero_gets_weight_zero():
    assert metric_weights([0, 5], "steps").tolist() == [0, 1]


def test_unknown_names_bring_near_ones():
    with pytest.raises(UsageError, match="did you mean 'power'"):
        metric_weights([1.0], scheme="powr")
    with pytest.raises(UsageError, match="did you mean 'steps'"):
        metric_weights([1.0], "step")
    with pytest.raises(UsageError, match="one number per checkpoint"):
        metric_weights([])


@pytest.mark.parametrize("name", ["power", "softmax"])
@pytest.mark.parametrize("metric", ["loss", "score"])
def test_an_infinite_penalty_is_refused_and_a_huge_one_keeps_the_best(name, metric):
    with pytest.raises(UsageError, match="must be finite and"):
        metric_weights([1.0, 2.0], metric, name, float("inf"))
    huge = 1e308 if name == "power" else 1e-308
    best = [1.0, 0.0, 0.0] if metric == "loss" else [0.0, 0.0, 1.0]
    assert metric_weights([1e-5, 1e-4, 1e5], metric, name, huge).tolist() == best


CURVES = {
    "cosine": lambda t: (1 + np.cos(np.pi * t)) / 2,
    "linear": lambda t: 1 - t,
    "1-sqrt": lambda t: 1 - np.sqrt(t),
}
each_curve = pytest.mark.parametrize("decay", CURVES)
increasing = st.lists(st.integers(0, 10**6), min_size=1, max_size=12, unique=True).map(sorted)


@each_curve
@given(increasing)
def test_decay_weights_are_a_distribution(decay, steps):
    w = decay_weights(steps, decay)
    assert (w >= 0).all()
    assert w.sum() == pytest.approx(1, abs=1e-12)


@each_curve
@given(st.lists(st.integers(1, 40), min_size=2, max_size=6), st.integers(0, 100), st.integers(0, 2**32 - 1))
def test_a_merge_equals_the_decay_that_was_not_trained(decay, gaps, start, seed):
    # a linear model of updates: what a step adds is its rate times a vector that does not depend on the weights
    steps = start + np.cumsum([0, *gaps])
    rng = np.random.default_rng(seed)
    per_interval = rng.standard_normal((len(gaps), 3))  # the same for all steps between two checkpoints
    checkpoints = np.cumsum([rng.standard_normal(3), *(g * u for g, u in zip(gaps, per_interval, strict=True))], axis=0)
    fine = 2000  # rates at so small parts of a step that their sum is the curve's integral
    t = (np.arange(sum(gaps) * fine) + 0.5) / (sum(gaps) * fine)
    rates = CURVES[decay](t).reshape(sum(gaps), fine).mean(1)
    decayed = checkpoints[0] + (rates[:, None] * np.repeat(per_interval, gaps, axis=0)).sum(0)
    np.testing.assert_allclose(decay_weights(steps, decay) @ checkpoints, decayed, atol=1e-4 * sum(gaps))


@each_curve
def test_a_checkpoint_at_every_step_needs_no_equal_updates(decay):
    updates = np.random.default_rng(0).standard_normal((50, 4))
    checkpoints = np.cumsum(np.concatenate([np.ones((1, 4)), updates]), axis=0)
    rates = CURVES[decay]((np.arange(50 * 2000) + 0.5) / (50 * 2000)).reshape(50, 2000).mean(1)
    expected = checkpoints[0] + rates @ updates
    np.testing.assert_allclose(decay_weights(range(51), decay) @ checkpoints, expected, atol=1e-4)


def test_decay_weights_fall_where_the_curve_is_flat():
    assert decay_weights([7]).tolist() == [1.0]
    np.testing.assert_allclose(decay_weights([0, 1, 2, 3, 4], "linear"), [1 / 8, 1 / 4, 1 / 4, 1 / 4, 1 / 8])
    cosine, root = decay_weights(range(5), "cosine"), decay_weights(range(5), "1-sqrt")
    assert cosine.argmax() == 2
    assert root.argmax() == 0  # 1 - sqrt(t) falls at once
    assert decay_weights([0, 1, 10], "linear")[0] < decay_weights([0, 9, 10], "linear")[0]


@pytest.mark.parametrize("steps", [[], [1, 1], [2, 1], [1, float("nan")]])
def test_steps_that_do_not_increase_are_refused(steps):
    with pytest.raises(UsageError, match="steps must increase"):
        decay_weights(steps)


def test_an_unknown_decay_is_refused():
    with pytest.raises(UsageError, match="did you mean 'cosine'"):
        decay_weights([1, 2], "cosin")


@pytest.mark.parametrize("scheme", ["linear", "softmax", "rank"])
def test_values_whose_difference_overflows_are_weighed(scheme):
    weights = metric_weights([1e308, 0.0, -1e308], "loss", scheme, 1.0 if scheme != "rank" else 0.5)
    assert np.isfinite(weights).all()
    assert weights[2] == max(weights)
    assert weights[0] == min(weights)
