"""The verdict on every claim of an experiment."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import numpy as np

from weightsmith.lab.experiment import Claim, Metric
from weightsmith.lab.stats.effect import Array, Effect, effect_of
from weightsmith.lab.stats.families import remaining
from weightsmith.lab.stats.levels import Plan
from weightsmith.lab.stats.summary import step_of

Verdict = Literal["supported", "refuted", "no relevant effect", "undecided", "not run"]
FEWEST_SEEDS = 3
MOST_SEEDS = 1000  # beyond that, "how many seeds" is not worth a number


class Result(Protocol):
    """What is known of one finished job; see :class:`weightsmith.lab.record.JobResult`."""

    @property
    def arm(self) -> str: ...  # noqa: D102
    @property
    def seed(self) -> int: ...  # noqa: D102
    @property
    def metrics(self) -> Mapping[str, float]: ...  # noqa: D102
    @property
    def diverged(self) -> bool: ...  # noqa: D102
    @property
    def scores(self) -> Mapping[str, Any]: ...  # noqa: D102


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the seeds say about one claim.

    Attributes:
        claim: The claim.
        verdict: ``supported``; ``refuted``; ``no relevant effect``: whatever there is, is smaller than worth having;
            ``undecided``; ``not run``: an arm was left out.
        reason: Why, in a few words; ``""`` where the numbers say it.
        n: Seeds that count: both arms finished, with finite values.
        difference: Mean over seeds of ``s * (winner - loser)``: positive is in the claim's favor.
        low: Lower end of the interval of ``difference``, over seeds and test examples.
        high: Upper end.
        level: The interval covers with probability ``1 - level``; it is what is left to this claim after correction
            for several claims and several looks. ``nan`` where nothing can be said.
        threshold: Mean margin that ``difference`` has to exceed.
        worth: Mean smallest effect worth having; ``None`` where the claim names none.
        p: Two-sided p-value of ``difference = threshold``, to be compared with ``level``.
        detectable: Smallest effect beyond the threshold that these runs would have shown four times out of five.
        seeds_needed: How many seeds an effect of ``worth`` would take; ``None``: no number of seeds is enough.
        limit: What there is too little of when undecided: ``"seeds"`` or ``"examples"`` of the test set.
        paper_excluded: Whether the interval excludes the paper's gain; ``None`` where the paper gives no number.
        diverged: Seeds of the winner and of the loser that diverged.
    """

    claim: Claim
    verdict: Verdict
    reason: str = ""
    n: int = 0
    difference: float = math.nan
    low: float = math.nan
    high: float = math.nan
    level: float = math.nan
    threshold: float = math.nan
    worth: float | None = None
    p: float = math.nan
    detectable: float = math.nan
    seeds_needed: int | None = None
    limit: Literal["seeds", "examples"] | None = None
    paper_excluded: bool | None = None
    diverged: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())

    @property
    def decided(self) -> bool:
        """Whether more seeds are not needed."""
        return self.verdict in ("supported", "refuted", "no relevant effect", "not run")


@dataclass(slots=True)
class _Case:
    """One claim with its paired data."""

    claim: Claim
    sizes: Array = field(default_factory=lambda: np.zeros(0))  # |loser|, to which relative numbers refer
    effect: Effect | None = None
    threshold: float = math.nan
    excess: Effect | None = None
    diverged: tuple[tuple[int, ...], tuple[int, ...]] = ((), ())
    missing: str = ""
    not_run: bool = False


def judge(
    claims: Sequence[Claim], metrics: Sequence[Metric], results: Sequence[Result], *, plan: Plan | None = None
) -> list[Judgement]:
    """Decide every declared claim from the same runs.

    The two arms are paired by seed. Primary claims and mechanism claims are two families, each with a probability of at
    most 0.05 of any false verdict, over all looks of the plan; Holm's rule corrects within each. A family is what was
    declared: claims whose arms were not run, or that cannot be judged, count all the same. The seeds of the last look
    that the runs have reached are used; later ones wait for the next look.

    A winner that diverged with any seed is not supported, a loser that diverged does not refute, and either rules out
    "no relevant effect"; the pairs of such seeds do not enter the numbers.

    Args:
        claims: All claims that the experiment declares.
        metrics: Say which direction is good and how coarse values are.
        results: Finished jobs of all arms.
        plan: The looks; ``None``: 3, 5, 10 and 20 seeds.

    Returns:
        One judgement per claim, in the same order.
    """
    plan = plan or Plan()
    by_arm: dict[str, dict[int, Result]] = {}
    for result in results:
        by_arm.setdefault(result.arm, {})[result.seed] = result
    seeds = sorted({result.seed for result in results})
    look = plan.reached(seeds)
    if look is not None:
        seeds = seeds[: plan.looks[look]]
    known = {metric.name: metric for metric in metrics}
    cases = [_case(claim, known[claim.metric], by_arm, seeds) for claim in claims]
    judgements: dict[int, Judgement] = {}
    for primary in (True, False):
        family = [index for index, claim in enumerate(claims) if claim.primary == primary]
        p = np.array([_p(cases[index]) for index in family])
        level = lambda size: plan.level(look or 0, size)  # noqa: E731
        for index, left in zip(family, remaining(p, level), strict=True):
            judgements[index] = _judgement(cases[index], look, level(int(left)), level(len(family)), len(seeds))
    return [judgement for _, judgement in sorted(judgements.items())]


def decided(judgements: Sequence[Judgement]) -> bool:
    """Whether a run may stop: every primary claim is decided, or more seeds would not decide it.

    Without primary claims all claims have to be.
    """
    primary = [judgement for judgement in judgements if judgement.claim.primary] or judgements
    return all(judgement.decided or judgement.limit == "examples" for judgement in primary)


def _case(claim: Claim, metric: Metric, by_arm: Mapping[str, Mapping[int, Result]], seeds: Sequence[int]) -> _Case:
    winners, losers = by_arm.get(claim.winner, {}), by_arm.get(claim.loser, {})
    case = _Case(claim)
    if not winners or not losers:
        case.not_run = True
        return case
    case.diverged = (_diverged(winners, claim.metric, seeds), _diverged(losers, claim.metric, seeds))
    missing = [seed for seed in seeds if seed not in winners or seed not in losers]
    if missing:
        case.missing = f"seed {', '.join(map(str, missing))} of an arm is missing"
    sign = -1.0 if metric.better == "lower" else 1.0
    pairs = [(winners[seed], losers[seed]) for seed in seeds if seed in winners and seed in losers]
    values = [
        (won, lost, won.metrics.get(claim.metric, math.nan), lost.metrics.get(claim.metric, math.nan))
        for won, lost in pairs
        if not (won.diverged or lost.diverged)
    ]
    values = [pair for pair in values if math.isfinite(pair[2]) and math.isfinite(pair[3])]
    if len(values) < 2:
        return case
    case.sizes = np.array([abs(b) for *_, b in values]) if claim.relative else np.ones(len(values))
    differences = np.array([sign * (a - b) for _, _, a, b in values])
    numbers = [number for _, _, *both in values for number in both]
    step = step_of(numbers) if metric.resolution is None else metric.resolution
    scores = [(won.scores.get(claim.metric), lost.scores.get(claim.metric)) for won, lost, *_ in values]
    examples = None
    if _complete(scores):
        examples = np.array([sign * (np.asarray(a, dtype=np.float64) - np.asarray(b)) for a, b in scores])
    case.effect = effect_of(differences, step, examples)
    margins = claim.margin * case.sizes
    case.threshold = float(margins.mean())
    # a relative margin varies with the seed: what is tested is the excess over it, pair by pair
    case.excess = effect_of(differences - margins, step, None if examples is None else examples - margins[:, None])
    return case


def _complete(scores: Sequence[tuple[Any, Any]]) -> bool:
    """Whether every job kept a score for each of the same examples."""
    lengths = {len(score) if score is not None else None for pair in scores for score in pair}
    return None not in lengths and len(lengths) == 1


def _diverged(runs: Mapping[int, Result], metric: str, seeds: Sequence[int]) -> tuple[int, ...]:
    return tuple(
        seed
        for seed in seeds
        if seed in runs and (runs[seed].diverged or math.isnan(runs[seed].metrics.get(metric, 0.0)))
    )


def _p(case: _Case) -> float:
    return case.excess.p(0.0) if case.excess is not None and case.excess.n >= FEWEST_SEEDS else math.nan


def _judgement(case: _Case, look: int | None, level: float, family_level: float, seeds: int) -> Judgement:
    claim, effect, excess = case.claim, case.effect, case.excess
    if case.not_run:
        return Judgement(claim, "not run", "one of its arms was left out")
    if effect is None or excess is None:
        return Judgement(claim, "undecided", _too_few(case, seeds), diverged=case.diverged, limit="seeds")
    numbers: dict[str, Any] = {
        "n": effect.n,
        "difference": effect.mean,
        "threshold": case.threshold,
        "diverged": case.diverged,
        "worth": None if claim.worth is None else claim.worth * float(case.sizes.mean()),
    }
    if look is None or effect.n < FEWEST_SEEDS:
        return Judgement(claim, "undecided", _too_few(case, seeds), **numbers, limit="seeds")
    # the interval is of the excess over the margin, moved back by the mean margin
    half = excess.half(level)
    numbers |= {
        "p": excess.p(0.0),
        "level": level,
        "low": effect.mean - half,
        "high": effect.mean + half,
        "detectable": float(excess.detectable(level)),
    }
    if claim.paper_gain is not None:
        gain = claim.paper_gain * float(case.sizes.mean())
        numbers["paper_excluded"] = not numbers["low"] <= gain <= numbers["high"]
    worth = numbers["worth"]
    numbers["seeds_needed"] = None if worth is None else seeds_needed(excess, worth, family_level)
    verdict, reason = _verdict(case, excess, level, family_level, worth)
    limit: Literal["seeds", "examples"] | None = None
    if verdict == "undecided":
        limit = "examples" if _examples_limit(excess, worth, level) else "seeds"
    return Judgement(claim, verdict, reason, **numbers, limit=limit)


def _verdict(
    case: _Case, excess: Effect, level: float, family_level: float, worth: float | None
) -> tuple[Verdict, str]:
    winner_diverged, loser_diverged = case.diverged
    if case.missing:
        return "undecided", case.missing
    if worth is not None and abs(excess.mean) + excess.half(family_level) < worth:
        if winner_diverged or loser_diverged:
            return "undecided", _divergence(case)
        return "no relevant effect", ""
    if excess.p(0.0) > level:
        return "undecided", _divergence(case) or "the interval holds both a gain and none"
    if excess.mean > 0:
        return ("undecided", _divergence(case)) if winner_diverged else ("supported", "")
    return ("undecided", _divergence(case)) if loser_diverged else ("refuted", "")


def _divergence(case: _Case) -> str:
    parts = [
        f"{arm} diverged with seed {', '.join(map(str, seeds))}"
        for arm, seeds in zip((case.claim.winner, case.claim.loser), case.diverged, strict=True)
        if seeds
    ]
    return " and ".join(parts)


def _too_few(case: _Case, seeds: int) -> str:
    return _divergence(case) or case.missing or f"{seeds} seeds, at least {FEWEST_SEEDS} are needed"


def _examples_limit(effect: Effect, worth: float | None, level: float) -> bool:
    """Whether the test examples alone leave the claim open, however many seeds there are."""
    half = math.sqrt(effect.examples) * effect.half(level) / effect.error if effect.error else 0.0
    open_to_zero = abs(effect.mean) < half
    return effect.examples > 0 and open_to_zero and (worth is None or abs(effect.mean) + half >= worth)


def seeds_needed(effect: Effect, worth: float, level: float) -> int | None:
    """Smallest number of seeds that shows an effect of ``worth`` four times out of five; ``None``: none does."""
    counts = np.array([*range(3, 31), *range(35, 101, 5), *range(150, MOST_SEEDS + 1, 50)])
    enough = np.flatnonzero(effect.detectable(level, counts) <= worth)
    return int(counts[enough[0]]) if len(enough) else None
