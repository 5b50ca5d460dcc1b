import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsmith.core.errors import UsageError
from weightsmith.lab.experiment import Claim, Metric
from weightsmith.lab.stats import Plan, Result, decided, judge

SEVEN = Plan((7,))
NOISE = np.array([0.3, -0.5, 0.1, 0.4, -0.2, 0.05, -0.15])


def arm(values, **options):
    return {seed: Result({"m": float(value)}, **options) for seed, value in enumerate(values)}


def claim(winner="new", loser="old", **options):
    return Claim(
        **{"text": "new beats old", "metric": "m", "winner": winner, "loser": loser, "primary": True} | options
    )


def metric(better="higher", resolution=1e-4):
    return Metric(name="m", label="M", better=better, resolution=resolution)


def verdict(winner, loser, *, plan=SEVEN, better="higher", resolution=1e-4, **options):
    results = {"new": winner if isinstance(winner, dict) else arm(winner)}
    results["old"] = loser if isinstance(loser, dict) else arm(loser)
    return judge([claim(**options)], [metric(better, resolution)], results, plan=plan)[0]


def shifted(by, spread=1.0):
    return verdict(10 + by + spread * NOISE, np.full(7, 10.0))


def test_a_clear_gain_is_supported_and_a_clear_loss_refuted():
    assert shifted(2).verdict == "supported"
    assert shifted(-2).verdict == "refuted"
    assert shifted(0.1).verdict == "undecided"


def test_lower_is_better_turns_the_sign():
    judged = verdict(8 + NOISE, np.full(7, 10.0), better="lower")
    assert (judged.verdict, judged.difference) == ("supported", pytest.approx(2 - NOISE.mean()))


def test_the_verdict_is_that_of_the_interval_at_its_level():
    judged = shifted(0.28)
    assert judged.level == 0.05
    assert (judged.verdict == "supported") == (judged.low > 0) == (judged.p <= 0.05)


def test_an_effect_within_worth_is_no_relevant_effect_even_when_it_is_not_0():
    assert verdict(10 + NOISE, np.full(7, 10.0), worth=1).verdict == "no relevant effect"
    small = verdict(10.5 + 0.1 * NOISE, np.full(7, 10.0), worth=1)
    assert (small.verdict, small.low > 0) == ("no relevant effect", True)
    assert "not 0, but smaller than the 1.000" in small.reason


def test_an_undecided_claim_says_what_could_have_been_shown_and_what_worth_takes():
    judged = verdict(10 + 5 * NOISE, np.full(7, 10.0), worth=1)
    assert judged.verdict == "undecided"
    assert judged.smallest > 1
    assert judged.seeds_needed > 7
    assert judged.too_few == "seeds"
    assert judged.reason.endswith(
        f"mostly show {judged.smallest:.3f} or more; about {judged.seeds_needed} seeds would show 1.000"
    )


def test_runs_that_would_have_shown_worth_ask_for_seeds_to_show_half_of_it():
    judged = verdict(10.28 + NOISE, np.full(7, 10.0), worth=0.55)
    assert (judged.verdict, judged.smallest < 0.55) == ("undecided", True)
    assert judged.seeds_needed > 7
    assert judged.reason.endswith("would show 0.275")


def test_the_margin_must_be_exceeded():
    assert verdict(12 + NOISE, np.full(7, 10.0), margin=1).verdict == "supported"
    assert verdict(12 + NOISE, np.full(7, 10.0), margin=3).verdict == "refuted"


def test_a_negative_margin_means_not_worse_by_more_than():
    judged = verdict(9.9 + 0.5 * NOISE, np.full(7, 10.0), margin=-1, worth=2)
    assert judged.verdict == "supported"  # and not "no relevant effect", which it is as well
    assert verdict(8 + NOISE, np.full(7, 10.0), margin=-1).verdict == "refuted"


def test_relative_sizes_are_fractions_of_the_losers_value_in_each_seed():
    losers = np.array([1.0, 10.0, 3.0, 5.0, 2.0, 8.0, 4.0])
    winners = losers * (0.4 + 0.01 * NOISE)
    assert verdict(winners, losers, better="lower", margin=0.5, relative=True).verdict == "supported"
    assert verdict(winners, losers, better="lower", margin=0.7, relative=True).verdict == "refuted"
    judged = verdict(losers * (1 + 0.01 * NOISE), losers, worth=0.05, relative=True)
    assert (judged.verdict, judged.worth) == ("no relevant effect", pytest.approx(0.05 * losers.mean()))


def test_a_negative_loser_counts_with_its_absolute_value():
    losers = -np.array([1.0, 10.0, 3.0, 5.0, 2.0, 8.0, 4.0])
    judged = verdict(losers * (0.4 + 0.01 * NOISE), losers, margin=0.5, relative=True)
    assert (judged.verdict, judged.threshold) == ("supported", pytest.approx(0.5 * -losers.mean()))


def test_the_papers_gain_is_excluded_or_not():
    assert verdict(12 + NOISE, np.full(7, 10.0), paper_gain=4).excludes_paper is True
    assert verdict(12 + NOISE, np.full(7, 10.0), paper_gain=2).excludes_paper is False
    assert shifted(2).excludes_paper is None


@pytest.mark.parametrize("seeds", [0, 1, 2])
def test_fewer_seeds_than_the_first_look_decide_nothing(seeds):
    judged = verdict(arm(range(10, 10 + seeds)) or {5: Result({"m": 1.0})}, arm([1] * seeds) or arm([1]), plan=Plan())
    assert (judged.verdict, judged.look) == ("undecided", None)
    assert f"needs 3 seeds with both arms, there are {seeds}" in judged.reason


@pytest.mark.parametrize("seeds", [1, 2])
def test_a_plan_for_fewer_than_three_seeds_decides_nothing(seeds):
    judged = verdict([9, 9.1][:seeds], [1, 1.1][:seeds], plan=Plan((seeds,)))
    assert (judged.verdict, judged.reason) == ("undecided", f"at least 3 seeds are needed, the plan has {seeds}")


def test_seeds_after_the_last_complete_look_do_not_count():
    values = np.array([1.0, 1.1, 0.9, -50, -60, 70, 10])
    three, four = (verdict(values[:n], np.zeros(n), plan=Plan()) for n in (3, 4))
    assert three == four
    assert four.look == four.n == 3


def test_a_seed_that_one_arm_lacks_ends_the_list_and_is_named():
    losers = {seed: result for seed, result in arm(np.zeros(10)).items() if seed != 4}
    judged = verdict(arm(np.arange(10.0)), losers, plan=Plan())
    assert judged.look == 3
    assert judged.reason.endswith("seed 4 of 'old' is missing")


def test_seeds_need_not_start_at_0_or_be_consecutive():
    renamed = [
        {7 * seed + 3: result for seed, result in arm(values).items()} for values in (12 + NOISE, np.full(7, 10.0))
    ]
    assert verdict(*renamed) == shifted(2)


@pytest.mark.parametrize("resolution", [None, 0.1])
def test_three_equal_differences_are_not_certain(resolution):
    judged = verdict([0.9] * 3, [0.8] * 3, plan=Plan((3,)), resolution=resolution)
    assert judged.verdict == "undecided"
    assert judged.p > 0.05


def test_a_constant_gain_of_many_steps_is_supported():
    assert verdict([0.9] * 3, [0.8] * 3, plan=Plan((3,)), resolution=0.001).verdict == "supported"


def test_equal_arms_have_no_relevant_effect_only_when_the_resolution_can_tell():
    fine, coarse, unknown = (
        verdict([0.9] * 5, [0.9] * 5, plan=Plan((5,)), worth=0.01, resolution=step) for step in (0.001, 0.02, None)
    )
    assert [judged.verdict for judged in (fine, coarse, unknown)] == ["no relevant effect", "undecided", "undecided"]
    assert unknown.reason.startswith("all values are equal")
    assert math.isnan(unknown.low)


@pytest.mark.parametrize("how", [Result({}, diverged=True), Result({"m": math.nan}), Result({"m": math.inf})])
def test_a_winner_that_diverged_is_not_supported(how):
    judged = verdict(arm(12 + NOISE) | {2: how}, arm(np.full(7, 10.0)), worth=5)
    assert (judged.verdict, judged.n, judged.look, judged.winner_diverged) == ("undecided", 6, 7, 1)
    assert judged.reason == "a winner that diverged is not supported; 'new' diverged in 1 of 7 seeds"


def test_a_winner_that_diverged_can_be_refuted():
    assert verdict(arm(8 + NOISE) | {2: Result({}, diverged=True)}, arm(np.full(7, 10.0))).verdict == "refuted"


def test_a_loser_that_diverged_does_not_refute_and_its_seeds_do_not_help_the_winner():
    gone = {2: Result({}, diverged=True)}
    judged = verdict(arm(8 + NOISE), arm(np.full(7, 10.0)) | gone, worth=5)
    assert judged.verdict == "undecided"
    assert "a loser that diverged does not refute; 'old' diverged in 1 of 7 seeds" in judged.reason
    ahead = verdict(arm(12 + NOISE), arm(np.full(7, 10.0)) | gone)
    assert (ahead.verdict, ahead.n) == ("supported", 6)


def test_seven_nan_in_ten_do_not_make_a_winner():
    winner = arm(12 + np.resize(NOISE, 10)) | {seed: Result({"m": math.nan}) for seed in range(7)}
    judged = verdict(winner, arm(np.full(10, 10.0)), plan=Plan())
    assert (judged.verdict, judged.winner_diverged) == ("undecided", 7)


def test_an_arm_that_diverged_in_all_seeds_leaves_nothing_to_judge():
    judged = verdict({seed: Result({}, diverged=True) for seed in range(7)}, arm(np.zeros(7)))
    assert judged.reason == "fewer than 3 seeds without divergence; 'new' diverged in 7 of 7 seeds"


def test_a_claim_whose_arm_did_not_run_still_counts_in_its_family():
    results = {"new": arm(10.26 + NOISE), "old": arm(np.full(7, 10.0))}
    alone = judge([claim()], [metric()], results, plan=SEVEN)[0]
    beside, absent = judge([claim(), claim(winner="gone")], [metric()], results, plan=SEVEN)
    assert (absent.verdict, absent.reason) == ("not run", "'gone' was left out")
    assert beside.p == pytest.approx(min(1, 2 * alone.p))
    assert beside.level == alone.level / 2


def test_an_arm_without_the_metric_is_not_run():
    other = {seed: Result({"x": 1.0}) for seed in range(7)}
    assert verdict(other, arm(np.zeros(7))).reason == "'new' did not report m"


def test_mechanism_claims_do_not_cost_the_primary_claim_anything():
    results = {"new": arm(10.3 + NOISE), "old": arm(np.full(7, 10.0))}
    mechanism = [claim(primary=False)] * 5
    primary, *others = judge([claim(), *mechanism], [metric()], results, plan=SEVEN)
    assert primary == judge([claim()], [metric()], results, plan=SEVEN)[0]
    assert others[0].p == pytest.approx(min(1, 5 * primary.p))


def test_the_first_look_needs_more_than_a_single_look_at_three_seeds():
    values, zeros = np.array([1.0, 1.1, 0.8]), np.zeros(3)
    assert verdict(values, zeros, plan=Plan((3,))).verdict == "supported"
    assert verdict(values, zeros, plan=Plan()).verdict == "undecided"


def test_the_runs_stop_when_every_primary_claim_that_ran_is_decided():
    results = {"new": arm(12 + NOISE), "old": arm(np.full(7, 10.0)), "same": arm(10 + NOISE)}
    supported, open_, absent = claim(), claim(winner="same"), claim(winner="gone")
    mechanism = claim(winner="same", primary=False)
    stops = [[supported, mechanism], [supported, absent], [supported, open_], [mechanism], []]
    found = [decided(judge(claims, [metric()], results, plan=SEVEN)) for claims in stops]
    assert found == [True, True, False, False, True]


def scored(scores):
    return {seed: Result({"m": float(row.mean())}, scores={"m": row}) for seed, row in enumerate(scores)}


def per_example(shared, examples=20, shift=0.3):
    generator = np.random.default_rng(1)
    loser = generator.normal(0, 0.05, (7, examples))
    winner = loser + shift + shared * generator.normal(0, 1, (1, examples)) + generator.normal(0, 0.05, (7, examples))
    return scored(winner), scored(loser)


def test_scores_per_example_widen_the_interval_by_the_sampling_of_the_test_set():
    winner, loser = per_example(shared=1.0)
    both = verdict(winner, loser, worth=0.3)
    seeds = verdict(*({s: Result(r.metrics) for s, r in results.items()} for results in (winner, loser)), worth=0.3)
    assert (seeds.verdict, seeds.over) == ("no relevant effect", "seeds")
    assert (both.verdict, both.over, both.too_few) == ("undecided", "seeds and examples", "examples")
    assert both.difference == pytest.approx(seeds.difference)
    assert both.examples_needed > 20
    assert f"too few test examples, about {both.examples_needed} would show 0.300" in both.reason


def test_an_effect_on_every_example_is_supported():
    assert verdict(*per_example(shared=0.05)).verdict == "supported"


def test_relative_sizes_work_with_scores_per_example():
    generator = np.random.default_rng(0)
    loser = generator.uniform(1, 3, (7, 30))
    judged = verdict(scored(loser * 0.4), scored(loser), better="lower", margin=0.5, relative=True)
    assert (judged.verdict, judged.over) == ("supported", "seeds and examples")
    assert judged.threshold == pytest.approx(0.5 * loser.mean())


@pytest.mark.parametrize("change", ["mean", "length", "one arm", "not finite"])
def test_scores_that_do_not_belong_to_the_metric_are_left_out_and_said_so(change):
    winner, loser = per_example(shared=1.0)
    if change == "one arm":
        winner = {seed: Result(result.metrics) for seed, result in winner.items()}
    else:
        row = winner[3].scores["m"]
        wrong = {"mean": np.exp(row), "length": row[:-1], "not finite": np.where(row > 1, np.nan, row)}[change]
        winner[3] = Result(winner[3].metrics, scores={"m": wrong})
    judged = verdict(winner, loser)
    assert judged.over == "seeds"
    assert "scores per example" in judged.reason


@pytest.mark.parametrize(
    ("claims", "metrics", "message"),
    [
        ([claim(metric="n")], [metric()], "'n' is not known"),
        ([claim()], [metric(better=None)], "needs better="),
        ([claim(worth=0.0)], [metric()], "worth must be positive"),
        ([claim()], [metric(resolution=-1.0)], "resolution must be positive"),
    ],
)
def test_a_family_that_cannot_be_judged_is_refused(claims, metrics, message):
    with pytest.raises(UsageError, match=message):
        judge(claims, metrics, {})


def test_small_numbers_are_not_worded_as_0():
    judged = verdict(1e-5 * (2.1 + NOISE), np.zeros(7), resolution=1e-8)
    assert "2.1e-05" in judged.reason


values = st.lists(st.integers(-50, 50).map(lambda x: x / 10), min_size=5, max_size=5)


def swap(judged):
    return {"supported": "refuted", "refuted": "supported"}.get(judged.verdict, judged.verdict)


@settings(max_examples=40)
@given(values, values, st.permutations(range(5)), st.sampled_from([None, 1.0, 5.0]))
def test_order_side_and_unit_change_no_verdict(winner, loser, order, worth):
    plan = Plan((5,))
    judged = verdict(winner, loser, plan=plan, resolution=0.1, worth=worth)
    turned = verdict([winner[i] for i in order], [loser[i] for i in order], plan=plan, resolution=0.1, worth=worth)
    swapped = verdict(loser, winner, plan=plan, resolution=0.1, worth=worth)
    scaled = verdict(
        *(np.multiply(8, side) for side in (winner, loser)), plan=plan, resolution=0.8, worth=worth and 8 * worth
    )
    assert turned.verdict == scaled.verdict == swap(swapped) == judged.verdict
    assert turned.p == pytest.approx(judged.p)
    assert (swapped.low, swapped.high) == pytest.approx((-judged.high, -judged.low))
    assert (scaled.low, scaled.high) == pytest.approx((8 * judged.low, 8 * judged.high))
    assert scaled.seeds_needed == judged.seeds_needed


@pytest.mark.parametrize(("gain", "verdict_"), [(2, "supported"), (-2, "undecided")])
def test_no_claim_is_decided_before_the_gate_is_met(gain, verdict_):
    results = {"new": arm(12 + NOISE), "old": arm(np.full(7, 10.0)), "floor": arm(10 - gain + NOISE)}
    gate = claim(text="old has learned", winner="old", loser="floor", primary=False, gate=True)
    judged = judge([claim(), gate], [metric()], results, plan=SEVEN)
    assert judged[0].verdict == verdict_
    assert judged[1].closes == (gain < 0)
    assert decided(judged)  # a gate that failed is not opened by more seeds
    if gain < 0:
        assert "the gate is not met (old has learned)" in judged[0].reason
        del results["floor"]
        assert judge([claim(), gate], [metric()], results, plan=SEVEN)[0].verdict == "undecided"
