import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightsmith.lab.experiment import Claim, Metric
from weightsmith.lab.stats import Plan, decided, judge, noise
from weightsmith.lab.stats.effect import p_value, t_statistic

SCORE = Metric("score", "score", "higher")
LOSS = Metric("loss", "loss", "lower")


@dataclasses.dataclass
class Result:
    arm: str
    seed: int
    metrics: dict
    diverged: bool = False
    scores: dict = dataclasses.field(default_factory=dict)


def claim(**changes):
    given = {"text": "new beats old", "metric": "score", "winner": "new", "loser": "old", "primary": True}
    return Claim(**(given | changes))


def results(new, old, metric="score", **more):
    return [
        Result(arm, seed, {metric: value}, **more)
        for arm, values in (("new", new), ("old", old))
        for seed, value in enumerate(values)
    ]


def verdict(new, old=None, *, metric=SCORE, plan=None, **changes):
    old = [0.0] * len(new) if old is None else old
    (found,) = judge([claim(metric=metric.name, **changes)], [metric], results(new, old, metric.name), plan=plan)
    return found


CLEAR = [1.0, 1.1, 0.9, 1.05, 0.97]


def test_a_clear_gain_is_supported_and_its_mirror_refuted():
    assert verdict(CLEAR).verdict == "supported"
    assert verdict([-value for value in CLEAR]).verdict == "refuted"
    assert verdict([-value for value in CLEAR], metric=LOSS).verdict == "supported"


def test_fewer_than_three_seeds_decide_nothing():
    found = verdict(CLEAR[:2])
    assert (found.verdict, found.limit) == ("undecided", "seeds")
    assert "at least 3" in found.reason


def test_seeds_between_two_looks_wait_for_the_next_one():
    four = verdict([0.31, 0.52, 0.11, 99.0])
    assert four.n == 3
    assert four.difference == pytest.approx(np.mean([0.31, 0.52, 0.11]))


def test_a_fixed_number_of_seeds_is_one_look_at_the_full_level():
    found = verdict([0.5, 0.9, 0.3, 0.8, 0.2, 0.6, 0.7], plan=Plan(looks=(7,)))
    assert (found.n, found.level) == (7, 0.05)


def test_three_equal_counts_are_no_certainty():
    equal = verdict([2.0, 2.0, 2.0], metric=dataclasses.replace(SCORE, resolution=1.0))
    assert equal.verdict == "undecided"
    assert equal.p > 0.003
    none = verdict([0.0] * 5)
    assert (none.verdict, none.p) == ("undecided", 1.0)


def test_the_step_of_a_coarse_metric_is_found_in_its_values():
    coarse = verdict([0.3, 0.3, 0.3], [0.0, 0.1, 0.0])
    fine = verdict([0.3, 0.3, 0.3], [0.0, 0.0937, 0.0])
    assert coarse.high - coarse.low > fine.high - fine.low


def test_an_effect_smaller_than_worth_is_irrelevant_even_when_it_is_certain():
    found = verdict([0.1, 0.11, 0.09, 0.1, 0.105], worth=1.0)
    assert found.verdict == "no relevant effect"
    assert verdict([0.1, 0.11, 0.09, 0.1, 0.105]).verdict == "supported"


def test_an_undecided_claim_says_what_it_would_have_shown_and_what_it_takes():
    found = verdict([1.0, -0.8, 0.5, 0.9, -0.4], worth=0.5)
    assert found.verdict == "undecided"
    assert found.detectable > 0.5
    assert found.seeds_needed > 5
    assert verdict([1.0, -0.8, 0.5, 0.9, -0.4], worth=100.0).seeds_needed == 3


def test_a_margin_has_to_be_exceeded_and_may_be_relative():
    assert verdict(CLEAR, margin=0.5).verdict == "supported"
    assert verdict(CLEAR, margin=3.0).verdict == "refuted"
    old = [4.0, 4.2, 3.9, 4.1, 4.0]
    halved = [value * 0.4 + offset for value, offset in zip(old, (0.01, -0.01, 0.02, 0.0, 0.01), strict=True)]
    found = verdict(halved, old, metric=LOSS, margin=0.5, relative=True)
    assert found.verdict == "supported"
    assert found.threshold == pytest.approx(0.5 * np.mean(old))
    assert verdict(halved, old, metric=LOSS, margin=0.7, relative=True).verdict == "refuted"


def test_not_worse_by_more_than_a_margin():
    assert verdict([-0.01, 0.02, 0.0, 0.01, -0.02], margin=-0.5).verdict == "supported"


def test_a_winner_that_diverged_is_not_supported_and_a_loser_that_did_is_not_refuted():
    runs = results([*CLEAR, 1.0], [0.0] * 6)
    winner, loser = runs[1], runs[6 + 2]
    winner.diverged = True
    (found,) = judge([claim()], [SCORE], runs, plan=Plan(looks=(6,)))
    assert found.verdict == "undecided"
    assert "new diverged with seed 1" in found.reason
    winner.diverged, loser.diverged = False, True
    assert judge([claim()], [SCORE], runs, plan=Plan(looks=(6,)))[0].verdict == "supported"
    opposite = claim(winner="old", loser="new")
    assert judge([opposite], [SCORE], runs, plan=Plan(looks=(6,)))[0].verdict == "refuted"
    winner.diverged, loser.diverged = True, False
    found = judge([opposite], [SCORE], runs, plan=Plan(looks=(6,)))[0]
    assert (found.verdict, found.diverged) == ("undecided", ((), (1,)))


def test_a_metric_that_is_not_finite_counts_as_divergence():
    runs = results([*CLEAR[:4], math.nan], [0.0] * 5)
    assert judge([claim()], [SCORE], runs)[0].verdict == "undecided"


def test_seven_nan_in_ten_support_nothing():
    runs = results([1.0, 1.1, 0.9, *[math.nan] * 7], [0.0] * 10)
    assert judge([claim()], [SCORE], runs)[0].verdict == "undecided"


def test_a_missing_job_leaves_a_claim_open():
    runs = [run for run in results(CLEAR, [0.0] * 5) if (run.arm, run.seed) != ("old", 1)]
    found = judge([claim()], [SCORE], runs)[0]
    assert (found.verdict, found.reason) == ("undecided", "seed 1 of an arm is missing")


def test_the_family_is_what_was_declared_whatever_arms_ran():
    others = [claim(winner=f"arm{index}") for index in range(6)]
    alone = judge([claim()], [SCORE], results(CLEAR, [0.0] * 5))[0]
    first, *rest = judge([claim(), *others], [SCORE], results(CLEAR, [0.0] * 5))
    assert {judgement.verdict for judgement in rest} == {"not run"}
    assert first.level < alone.level / 5


def test_mechanism_claims_are_a_family_of_their_own():
    mechanism = [claim(primary=False) for _ in range(5)]
    alone = judge([claim()], [SCORE], results(CLEAR, [0.0] * 5))[0]
    assert judge([claim(), *mechanism], [SCORE], results(CLEAR, [0.0] * 5))[0].level == alone.level


def test_the_papers_gain_is_held_against_the_interval():
    assert verdict(CLEAR, paper_gain=1.0).paper_excluded is False
    assert verdict(CLEAR, paper_gain=5.0).paper_excluded is True
    assert verdict(CLEAR).paper_excluded is None


def test_scores_per_example_widen_the_interval_and_name_the_test_set():
    generator = torch.Generator().manual_seed(0)
    # both arms differ on the same few test examples with every seed: more seeds change nothing
    easy = (torch.rand(40, generator=generator) < 0.5).float()
    runs = []
    for seed in range(10):
        flip = (torch.rand(40, generator=generator) < 0.02).float()
        new, old = (easy - flip).abs(), easy.clone()
        new[:3], old[:3] = 1.0, 0.0
        new[3:5], old[3:5] = 0.0, 1.0
        for arm, scores in (("new", new), ("old", old)):
            runs.append(Result(arm, seed, {"score": float(scores.mean())}, scores={"score": scores}))
    (both,) = judge([claim(worth=0.01)], [SCORE], runs)
    for run in runs:
        run.scores = {}
    (seeds_only,) = judge([claim(worth=0.01)], [SCORE], runs)
    assert both.high - both.low > 1.5 * (seeds_only.high - seeds_only.low)
    assert both.limit == "examples"
    assert both.seeds_needed is None


def test_a_run_may_stop_when_its_primary_claims_are_decided_or_more_seeds_are_no_help():
    open_claim, done = verdict([1.0, -0.8, 0.5, 0.9, -0.4]), verdict(CLEAR)
    mechanism = verdict([1.0, -0.8, 0.5, 0.9, -0.4], primary=False)
    assert decided([done, mechanism])
    assert not decided([done, open_claim])
    assert decided([done, dataclasses.replace(open_claim, limit="examples")])
    assert not decided([mechanism])


finite = st.floats(-10, 10).map(lambda value: round(value, 3))


@given(st.lists(finite, min_size=5, max_size=5), st.permutations(range(5)))
def test_the_order_of_seeds_does_not_matter(values, order):
    one, other = verdict(values), verdict([values[index] for index in order])
    assert one.verdict == other.verdict
    assert one.p == pytest.approx(other.p, nan_ok=True, rel=1e-6, abs=1e-12)


@given(st.lists(finite, min_size=5, max_size=5))
def test_turning_the_sign_turns_the_verdict(values):
    turned = {"supported": "refuted", "refuted": "supported"}
    one, other = verdict(values), verdict([-value for value in values])
    assert turned.get(one.verdict, one.verdict) == other.verdict


@given(st.lists(finite, min_size=5, max_size=5), st.sampled_from([0.01, 3.0, 1000.0]))
def test_the_unit_does_not_matter(values, scale):
    one, other = verdict(values, worth=1.0), verdict([value * scale for value in values], worth=scale)
    assert one.p == pytest.approx(other.p, rel=1e-3, abs=1e-9)


def test_noise_shrinks_with_seeds_and_needs_three():
    found = noise([0.1, 0.3, 0.2, 0.25])
    assert list(found) == [3, 5, 10, 20, 50]
    assert sorted(found.values(), reverse=True) == list(found.values())
    with pytest.raises(ValueError, match="at least 3 seeds"):
        noise([0.1, math.nan, 0.2])


def test_the_simulation_and_the_verdicts_agree():
    generator = np.random.default_rng(0)
    for _ in range(50):
        differences = generator.standard_normal(10) + 1.0
        p = p_value(t_statistic(differences), 10)
        found = judge([claim()], [SCORE], results(differences.tolist(), [0.0] * 10))[0]
        assert found.p == pytest.approx(float(p))
        assert (found.verdict == "supported") == bool(p <= Plan().level(2, 1) and differences.mean() > 0)
