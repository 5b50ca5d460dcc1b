import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from weightsmith.lab.stats.intervals import over_seeds, over_seeds_and_examples, smallest_step

VALUES = np.array([0.1, 0.13, 0.08, 0.05])
numbers = st.lists(st.floats(-5, 5).map(lambda x: round(x, 3)), min_size=3, max_size=8).map(np.array)


def table(seeds=4, examples=30, seed=1.0, example=1.0, rest=1.0, mean=0.5):
    generator = np.random.default_rng(3)
    by_seed, by_example = generator.normal(0, seed, (seeds, 1)), generator.normal(0, example, (1, examples))
    return mean + by_seed + by_example + generator.normal(0, rest, (seeds, examples))


def test_over_seeds_alone_the_interval_is_students_t():
    estimate = over_seeds(VALUES)
    low, _ = stats.t.interval(0.99, 3, VALUES.mean(), stats.sem(VALUES))
    assert estimate.mean - estimate.half_width(0.01) == pytest.approx(low)
    assert estimate.p() == pytest.approx(stats.ttest_1samp(VALUES, 0).pvalue)


@pytest.mark.parametrize("estimate", [over_seeds(VALUES, step=0.01), over_seeds_and_examples(table(), step=0.01)])
def test_the_p_value_is_the_level_at_which_the_interval_touches_0(estimate):
    assert estimate.half_width(estimate.p()) == pytest.approx(abs(estimate.mean), rel=1e-6)


def test_equal_differences_are_no_certainty():
    assert over_seeds(np.full(3, 1.0), step=1.0).p() > 0.05
    assert over_seeds(np.full(3, 10.0), step=1.0).p() < 0.05


def test_rounding_to_a_coarser_step_widens_the_interval():
    widths = [over_seeds(VALUES, step=step).half_width(0.05) for step in (0, 0.01, 0.1, 1)]
    assert widths == sorted(widths)
    assert widths[-1] > 2 * widths[0]


def test_the_parts_of_a_crossed_table_are_estimated_without_bias():
    generator = np.random.default_rng(0)
    shape = (4000, 5, 40)
    by_seed, by_example = generator.normal(0, 0.5, (4000, 5, 1)), generator.normal(0, 2.0, (4000, 1, 40))
    estimate = over_seeds_and_examples(by_seed + by_example + generator.normal(0, 1.0, shape))
    assert estimate.seeds.mean() == pytest.approx((0.25 + 1 / 40) / 5, rel=0.05)
    assert estimate.examples.mean() == pytest.approx(4 / 40, rel=0.05)
    assert estimate.mean.var() == pytest.approx((estimate.seeds + estimate.examples).mean(), rel=0.1)


def test_differences_shared_by_all_seeds_widen_the_interval_though_the_seeds_agree():
    crossed = table(seed=0.0, example=2.0, rest=0.01)
    assert over_seeds_and_examples(crossed).half_width(0.05) > 10 * over_seeds(crossed.mean(-1)).half_width(0.05)


def test_without_differences_between_examples_the_two_intervals_are_about_equal():
    crossed = table(example=0.0, rest=0.1)
    both, seeds = over_seeds_and_examples(crossed).half_width(0.05), over_seeds(crossed.mean(-1)).half_width(0.05)
    assert seeds <= both == pytest.approx(seeds, rel=0.01)


@given(numbers, st.sampled_from([0.0, 0.001, 0.5]))
def test_the_sign_the_order_and_the_scale_of_the_values_change_nothing(values, step):
    estimate = over_seeds(values, step=max(step, 1e-6))
    flipped, turned = over_seeds(-values, step=max(step, 1e-6)), over_seeds(values[::-1], step=max(step, 1e-6))
    scaled = over_seeds(8 * values, step=8 * max(step, 1e-6))
    for other in (flipped, turned, scaled):
        assert other.p() == pytest.approx(estimate.p(), rel=1e-6)
    assert scaled.half_width(0.01) == pytest.approx(8 * estimate.half_width(0.01))


def test_a_stack_of_tables_gives_what_each_gives():
    stack = np.stack([table(), table(seed=0.1), table(example=0.0)])
    whole = over_seeds_and_examples(stack, step=0.01).p()
    assert whole == pytest.approx([over_seeds_and_examples(one, step=0.01).p() for one in stack], rel=1e-6)


def test_the_smallest_step_is_the_smallest_gap_that_is_not_float_noise():
    assert smallest_step(np.array([0.90, 0.92, 0.92 + 1e-9, 0.97])) == pytest.approx(0.02)
    assert smallest_step(np.array([0.9, 0.9])) == np.inf
