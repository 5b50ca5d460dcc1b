import importlib.util
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weightsmith.lab.stats.families import rejected, remaining
from weightsmith.lab.stats.levels import LOOKS, SCALES, SHARES, Plan

BENCHMARKS = Path(__file__).parents[3] / "benchmarks"


def script(name):
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", BENCHMARKS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_levels_of_all_looks_together_are_near_five_percent():
    assert sum(SHARES) == pytest.approx(1.0)
    plan = Plan()
    for size in range(1, 12):
        total = sum(plan.level(look, size) for look in range(len(LOOKS)))
        assert 0.999 * 0.05 / size <= total <= 1.16 * 0.05 / size
    levels = [plan.level(1, size) for size in range(1, 12)]
    assert levels == sorted(levels, reverse=True)


def test_the_table_of_levels_is_what_the_script_makes():
    found = script("levels").scales(blocks=2, block=200_000)
    assert found == pytest.approx(SCALES, abs=0.06)


def test_a_plan_knows_which_look_is_reached():
    plan = Plan()
    assert [plan.reached(range(n)) for n in (0, 2, 3, 4, 5, 12, 20, 30)] == [None, None, 0, 0, 1, 2, 3, 3]


def test_holm_rejects_step_by_step():
    level = lambda size: 0.05 / size  # noqa: E731
    p = np.array([0.01, 0.04, 0.024, np.nan])
    assert remaining(p, level).tolist() == [4, 3, 3, 3]
    assert rejected(p, level).tolist() == [True, False, False, False]
    assert rejected(np.array([0.01, 0.02, 0.04]), level).tolist() == [True, True, True]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.integers(0, 5), st.floats(0, 1))
def test_a_smaller_p_value_never_loses_a_rejection(values, index, factor):
    level = partial(Plan().level, 3)
    index %= len(values)
    smaller = list(values)
    smaller[index] *= factor
    before, after = rejected(np.array(values), level), rejected(np.array(smaller), level)
    assert np.all(after | ~before)


@pytest.mark.slow
def test_false_verdicts_stay_below_five_percent_with_looks_and_stopping():
    verdicts = script("verdicts")
    runs = 40_000
    tolerance = 3 * np.sqrt(0.05 * 0.95 / runs)
    for claims in (1, 2, 3, 5, 7):
        assert verdicts.families(verdicts.gaussian, claims, runs)[0] <= 0.05 + tolerance
        for sd in (1, 2, 5):
            assert verdicts.families(partial(verdicts.counts, sd=sd), claims, runs, step=1.0)[0] <= 0.05 + tolerance


@pytest.mark.slow
def test_an_effect_of_one_deviation_is_found_with_few_seeds():
    verdicts = script("verdicts")
    _, power, used = verdicts.families(partial(verdicts.gaussian, effect=1.0), 1, 40_000)
    assert power >= 0.9
    assert used <= 14
    assert verdicts.irrelevant(0.0, 1.0, 3.0, 40_000)[0] > 0.95
    assert verdicts.irrelevant(3.0, 1.0, 3.0, 40_000)[0] < 0.025
