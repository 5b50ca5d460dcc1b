"""Judge declared claims on the runs so far."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from weightsmith.core.errors import UsageError, unknown
from weightsmith.lab.experiment import Claim, Metric
from weightsmith.lab.stats.decisions import NAMES, Evidence, decide, evidence
from weightsmith.lab.stats.intervals import Estimate
from weightsmith.lab.stats.judgement import Judgement, Verdict
from weightsmith.lab.stats.looks import Plan
from weightsmith.lab.stats.pairs import Pairs, Results, pair
from weightsmith.lab.stats.power import detectable, examples_needed, seeds_needed
from weightsmith.lab.stats.reasons import reason


def judge(
    claims: Sequence[Claim], metrics: Sequence[Metric], results: Results, *, plan: Plan | None = None
) -> list[Judgement]:
    """Judge all declared claims on the runs so far.

    The primary claims are one family and the mechanism claims another; each has its own 5 % over all looks. A family
    is what is declared: a claim whose arms did not run still counts for Holm's correction. Gates are a third family:
    until all of them are supported, the other claims stay undecided.

    A seed in which an arm diverged has no difference. A winner that diverged is not supported and a loser that diverged
    does not refute, because without its worst seeds an arm looks better than it is; neither allows "no relevant
    effect".

    Args:
        claims: The declared claims.
        metrics: The metrics that they name.
        results: Results by arm and seed.
        plan: The looks, fixed before the first job; ``None``: 3, 5, 10 and 20 seeds.

    Returns:
        One judgement per claim, in the same order.

    Raises:
        UsageError: A claim names a metric that is unknown or has no better direction.
    """
    plan, named = plan or Plan(), {metric.name: metric for metric in metrics}
    _check(claims, named)
    pairs = [pair(claim, named[claim.metric], results, plan) for claim in claims]
    judged: dict[int, Judgement] = {}
    for kind in ((True, False), (False, True), (False, False)):
        family = [index for index, claim in enumerate(claims) if (claim.gate, claim.primary) == kind]
        if family:
            judgements = _judge_family([pairs[index] for index in family], named, plan)
            judged.update(zip(family, judgements, strict=True))
    ordered = [judged[index] for index in range(len(claims))]
    closed = [one for one in ordered if one.closes]
    return [_behind(one, closed[0].claim) for one in ordered] if closed else ordered


def _behind(judged: Judgement, gate: Claim) -> Judgement:
    """What a claim comes to while a gate is not met: nothing, whatever its numbers are."""
    if judged.claim.gate or judged.verdict == "not run":
        return judged
    return replace(
        judged, verdict="undecided", reason=f"the gate is not met ({gate.text})", too_few=None, seeds_needed=None,
        examples_needed=None,
    )  # fmt: skip


def _check(claims: Sequence[Claim], metrics: Mapping[str, Metric]) -> None:
    for claim in claims:
        if claim.metric not in metrics:
            raise unknown("metric", claim.metric, metrics)
        if metrics[claim.metric].better is None:
            raise UsageError(f"metric {claim.metric!r} needs better='higher' or 'lower' to decide {claim.text!r}")
        if claim.worth is not None and not claim.worth > 0:
            raise UsageError(f"worth must be positive, got {claim.worth} in claim {claim.text!r}")
    for metric in metrics.values():
        if metric.resolution is not None and not metric.resolution > 0:
            raise UsageError(f"resolution must be positive or None, got {metric.resolution} for metric {metric.name!r}")


def _judge_family(family: Sequence[Pairs], metrics: Mapping[str, Metric], plan: Plan) -> list[Judgement]:
    tests = [_tests(pairs, plan) for pairs in family]
    threshold, side, worth = (np.array(column, dtype=np.float64) for column in zip(*tests, strict=True))
    plain = np.array([pairs.claim.margin == 0 for pairs in family])
    codes, p, levels = decide(Evidence(threshold, side, worth, plain))
    return [
        _judgement(pairs, metrics[pairs.claim.metric], NAMES[code], float(p), float(level), plan)
        for pairs, code, p, level in zip(family, codes, p, levels, strict=True)
    ]


def _tests(pairs: Pairs, plan: Plan) -> tuple[float, float, float]:
    """The two p-values of one claim and the side of its threshold; 1 for what may not be decided."""
    if pairs.absent or not pairs.judged or pairs.look is None:
        return 1.0, 0.0, 1.0
    claim, size = pairs.claim, pairs.claim.worth or 0.0
    estimates = (pairs.beyond(claim.margin), pairs.beyond(size), pairs.beyond(-size))
    threshold, side, worth = map(float, evidence(*estimates, plan.share(pairs.look)))
    if (pairs.winner_diverged and side > 0) or (pairs.loser_diverged and side < 0):
        threshold = 1.0
    if not size or pairs.winner_diverged or pairs.loser_diverged:
        worth = 1.0
    return threshold, side, worth


def _judgement(pairs: Pairs, metric: Metric, verdict: Verdict, p: float, family_level: float, plan: Plan) -> Judgement:
    claim = pairs.claim
    if pairs.absent:
        return Judgement(claim, "not run", pairs.absent)
    level = family_level * plan.share(pairs.look) if pairs.look is not None else math.nan
    facts: dict[str, Any] = {
        "n": pairs.n,
        "look": pairs.look,
        "difference": float((pairs.sign * (pairs.winner - pairs.loser)).mean()) if pairs.n else math.nan,
        "threshold": pairs.mean_bound(claim.margin),
        "worth": None if claim.worth is None else pairs.mean_bound(claim.worth),
        "winner_diverged": pairs.winner_diverged,
        "loser_diverged": pairs.loser_diverged,
    }
    if not pairs.judged:
        judged = Judgement(claim, verdict, "", **facts)
        return replace(judged, reason=reason(judged, metric, pairs, plan))
    estimate = pairs.beyond(0.0)
    half = float(estimate.half_width(level))
    facts |= {"level": level, "p": p, "over": "seeds and examples" if pairs.winner.ndim > 1 else "seeds"}
    if math.isfinite(half):
        facts |= {"low": float(estimate.mean) - half, "high": float(estimate.mean) + half}
        facts["smallest"] = detectable(estimate, level)
        if claim.paper_gain is not None:
            facts["excludes_paper"] = bool(pairs.beyond(claim.paper_gain).p() <= level)
    if verdict == "undecided" and not pairs.winner_diverged:  # no number of seeds undoes a divergence
        facts |= _what_is_missing(pairs, estimate, level, family_level * plan.shares[-1])
    judged = Judgement(claim, verdict, "", **facts)
    return replace(judged, reason=reason(judged, metric, pairs, plan))


def _what_is_missing(pairs: Pairs, estimate: Estimate, level: float, last_level: float) -> dict[str, Any]:
    """Which of seeds and examples are too few, and how many would do at the level of the last look."""
    examples = float(estimate.examples)
    too_few = "seeds" if estimate.part_of_seeds(level) >= estimate.part_of_examples(level) else "examples"
    missing: dict[str, Any] = {"too_few": too_few}
    if pairs.claim.worth is None or not math.isfinite(float(estimate.seeds)):
        return missing
    effect, sd = pairs.mean_bound(pairs.claim.worth), math.sqrt(float(estimate.seeds) * pairs.n)
    if effect == 0:  # a fraction of a loser that is 0
        return missing
    if detectable(estimate, level) <= effect:
        effect /= 2
    seeds = seeds_needed(
        sd, effect, level=last_level, step=pairs.step, examples=examples, examples_df=estimate.examples_df
    )
    missing["seeds_needed"] = seeds and max(seeds, pairs.n + 1)
    if too_few == "examples":
        missing["examples_needed"] = examples_needed(examples * pairs.winner.shape[1], effect, level=last_level)
    return missing
