import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from weightsmith.lab.claim import Claim

from weightsmith.lab.stats import judge, summarise


def scores(winner, loser):
    return {
        "new": {seed: {"accuracy": value} for seed, value in enumerate(winner)},
        "old": {seed: {"accuracy": value} for seed, value in enumerate(loser)},
    }


def verdict(winner, loser, **options):
    return judge([Claim("new is better", "accuracy", "new", "old", **options)], scores(winner, loser))[0]


def test_a_clear_gain_is_supported_and_a_clear_loss_refuted():
    assert verdict([0.9, 0.91, 0.92], [0.8, 0.81, 0.83]).verdict == "supported"
    assert verdict([0.8, 0.81, 0.83], [0.9, 0.91, 0.92]).verdict == "refuted"


def test_lower_is_better_turns_the_sign():
    judged = verdict([1.0, 1.1, 1.2], [2.0, 2.2, 2.1], better="lower")
    assert judged.verdict == "supported"
    assert judged.difference == pytest.approx(1.0)


def test_noise_is_inconclusive():
    assert verdict([0.9, 0.7, 0.8], [0.8, 0.8, 0.8]).verdict == "inconclusive"


@pytest.mark.parametrize("n", [0, 1, 2])
def test_fewer_than_three_seeds_decide_nothing(n):
    judged = verdict([0.9] * n, [0.1] * n)
    assert judged.verdict == "inconclusive"
    assert judged.reason == f"{n} paired seeds, at least 3 are needed"


def test_the_interval_is_students_t():
    winner, loser = [0.9, 0.93, 0.95, 0.91], [0.8, 0.85, 0.81, 0.84]
    judged = verdict(winner, loser)
    differences = np.subtract(winner, loser)
    low, high = stats.t.interval(0.95, 3, differences.mean(), stats.sem(differences))
    assert (judged.low, judged.high) == pytest.approx((low, high))
    assert judged.p == pytest.approx(stats.ttest_rel(winner, loser).pvalue)


def test_the_margin_must_be_exceeded():
    winner, loser = [0.90, 0.91, 0.92], [0.80, 0.81, 0.821]
    assert verdict(winner, loser, margin=0.05).verdict == "supported"
    assert verdict(winner, loser, margin=0.2).verdict == "refuted"


def test_a_negative_margin_means_not_worse_by_more_than():
    assert verdict([0.799, 0.801, 0.8], [0.8, 0.802, 0.8005], margin=-0.01).verdict == "supported"


def test_a_relative_margin_is_a_fraction_of_the_losers_value():
    # each seed's growth is less than half of the baseline's, which differs a lot from seed to seed
    judged = verdict([0.4, 4.0, 1.2], [1.0, 10.0, 3.1], better="lower", margin=0.5, relative=True)
    assert judged.threshold == pytest.approx(0.5 * (1.0 + 10.0 + 3.1) / 3)
    assert judged.difference > judged.threshold


def test_equal_to_the_last_bit_is_inconclusive_and_a_constant_gain_supported():
    assert verdict([1.0] * 3, [1.0] * 3).verdict == "inconclusive"
    assert verdict([2.0] * 3, [1.0] * 3).verdict == "supported"


def test_seeds_are_paired_and_values_that_are_not_finite_left_out():
    judged = judge(
        [Claim("c", "accuracy", "new", "old")],
        {
            "new": {seed: {"accuracy": value} for seed, value in {0: 1.0, 1: math.nan, 2: 1.1, 3: 1.2, 9: 5.0}.items()},
            "old": {seed: {"accuracy": 0.0} for seed in range(5)},
        },
    )[0]
    assert judged.n == 3
    assert judged.difference == pytest.approx(1.1)


def test_holm_makes_a_borderline_result_inconclusive_beside_others():
    winner, loser = [0.90, 0.95, 0.88], [0.80, 0.81, 0.83]
    alone = verdict(winner, loser)
    claim = Claim("c", "accuracy", "new", "old")
    many = judge([claim] * 5, scores(winner, loser))
    assert all(judged.p == pytest.approx(min(1, 5 * alone.p)) for judged in many)


@given(st.lists(st.floats(0, 1, allow_subnormal=False), min_size=1, max_size=8))
def test_holm_never_makes_a_p_value_smaller_and_keeps_their_order(p_values):
    from weightsmith.lab.stats import _holm

    adjusted = _holm(p_values)
    assert all(raw <= corrected <= 1 for raw, corrected in zip(p_values, adjusted, strict=True))
    assert sorted(p_values, key=lambda p: p) == [p_values[i] for i in np.argsort(p_values, kind="stable")]
    order = np.argsort(p_values, kind="stable")
    assert all(np.diff(np.array(adjusted)[order]) >= 0)


def test_a_summary_counts_only_finite_values():
    summary = summarise([1.0, math.nan, 3.0])
    assert (summary.mean, summary.n) == (2.0, 2)
    assert math.isnan(summarise([1.0]).sd)
    assert summarise([]).n == 0
