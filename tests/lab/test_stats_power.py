import math

import numpy as np
import pytest
from scipy import stats

from weightsmith.core.errors import UsageError
from weightsmith.lab.stats import detectable, noise, seeds_needed, summarize
from weightsmith.lab.stats.intervals import Estimate, over_seeds
from weightsmith.lab.stats.power import examples_needed, power


def runs(seeds, sd=1.0, examples=0.0):
    none = np.asarray(0.0)
    return Estimate(none, np.asarray(sd**2 / seeds), np.asarray(examples), seeds - 1, math.inf, none)


@pytest.mark.parametrize("seeds", [3, 5, 10, 20])
@pytest.mark.parametrize("effect", [0.5, 1.0, 2.0])
def test_power_is_that_of_students_t(seeds, effect):
    critical = stats.t.isf(0.025, seeds - 1)
    expected = stats.nct.sf(critical, seeds - 1, effect * math.sqrt(seeds))
    assert power(effect, runs(seeds)) == pytest.approx(expected, abs=2e-3)


def test_power_is_what_a_simulation_finds():
    values = np.random.default_rng(0).standard_normal((20_000, 6)) + 1.2
    estimate = over_seeds(values, step=0.3)
    found = ((estimate.p() <= 0.02) & (estimate.mean > 0)).mean()
    planned = Estimate(np.asarray(0.0), np.asarray(1 / 6), np.asarray(0.0), 5, math.inf, np.asarray(0.3 / 12))
    assert power(1.2, planned, 0.02) == pytest.approx(found, abs=0.012)


def test_the_seeds_needed_are_the_fewest_with_80_percent_power():
    seeds = seeds_needed(1.0, 1.0)
    assert seeds == 10  # Student's t, paired, two-sided 5 %
    assert power(1.0, runs(seeds - 1)) < 0.8 <= power(1.0, runs(seeds))


def test_what_is_detectable_with_the_seeds_needed_is_the_effect():
    seeds = seeds_needed(0.01, 0.004)
    assert detectable(runs(seeds, 0.01)) <= 0.004 < detectable(runs(seeds - 1, 0.01))


def test_no_number_of_seeds_makes_up_for_too_few_examples():
    assert seeds_needed(0.01, 0.01, examples=0.01**2) is None
    assert examples_needed(1.0, 0.01) == pytest.approx(2 * (2.8016 / 0.01) ** 2, rel=1e-3)


def test_a_difference_that_never_varies_needs_the_fewest_seeds():
    assert seeds_needed(0.0, 1.0) == 3
    assert seeds_needed(math.inf, 1.0) is None


def test_noise_lists_smaller_effects_for_more_seeds():
    measured = noise([0.80, 0.82, 0.79, 0.81, 0.83], seeds=(3, 5, 10, 20))
    effects = list(measured.effects.values())
    assert effects == sorted(effects, reverse=True)
    assert measured.sd == pytest.approx(np.std([0.80, 0.82, 0.79, 0.81, 0.83], ddof=1))
    assert measured.low < measured.sd < measured.high
    assert measured.effects[10] == pytest.approx(math.sqrt(2) * measured.sd * 1.0, rel=0.1)


def test_the_interval_of_the_noise_is_that_of_chi_square():
    measured = noise([0.80, 0.82, 0.79, 0.81, 0.83])
    expected = measured.sd * np.sqrt(4 / stats.chi2.ppf([0.975, 0.025], 4))
    assert (measured.low, measured.high) == pytest.approx(expected)


def test_a_baseline_without_spread_still_has_the_noise_of_its_resolution():
    assert noise([0.8] * 4, resolution=0.01).effects[5] > 0.005
    assert noise([0.8] * 4).effects[5] == math.inf


@pytest.mark.parametrize("values", [[0.8, 0.9], [0.8, 0.9, math.nan]])
def test_noise_needs_three_finite_values(values):
    with pytest.raises(UsageError, match="at least 3 finite"):
        noise(values)


def test_noise_refuses_to_speak_of_two_seeds():
    with pytest.raises(UsageError, match="at least 3, got 2"):
        noise([0.8, 0.9, 0.85], seeds=(2, 3))


def test_a_summary_counts_only_finite_values():
    summary = summarize([1.0, math.nan, 3.0])
    assert (summary.mean, summary.n) == (2.0, 2)
    assert math.isnan(summarize([1.0]).sd)
    assert summarize([]).n == 0
    assert summarize([0.1] * 3).sd == 0
