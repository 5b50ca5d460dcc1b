"""Why a verdict is what it is, in one sentence."""

import math

from weightsmith.lab.experiment import Metric
from weightsmith.lab.stats.judgement import Judgement
from weightsmith.lab.stats.looks import FEWEST, Plan
from weightsmith.lab.stats.pairs import Pairs


def reason(judged: Judgement, metric: Metric, pairs: Pairs, plan: Plan) -> str:
    """Word the reason for ``judged``; its verdict and numbers are there already."""
    if judged.verdict == "undecided":
        main = _undecided(judged, metric, pairs, plan)
    else:
        main = f"the difference is {_interval(judged, metric)}, " + _decided(judged, metric)
    return "; ".join([main, *_notes(judged, pairs)])


def _decided(judged: Judgement, metric: Metric) -> str:
    if judged.verdict == "no relevant effect":
        nonzero = "not 0, but " if judged.low > 0 or judged.high < 0 else ""
        return f"{nonzero}smaller than the {_number(judged.worth, metric)} that would be worth having"
    side = "above" if judged.verdict == "supported" else "below"
    return f"{side} the threshold {_number(judged.threshold, metric)}"


def _undecided(judged: Judgement, metric: Metric, pairs: Pairs, plan: Plan) -> str:
    if judged.look is None:
        return f"the first look needs {plan.looks[0]} seeds with both arms, there are {pairs.seeds}"
    if judged.look < FEWEST:
        return f"at least {FEWEST} seeds are needed, the plan has {judged.look}"
    if judged.n < FEWEST:
        return f"fewer than {FEWEST} seeds without divergence"
    if judged.winner_diverged:
        return "a winner that diverged is not supported"
    if math.isnan(judged.low):
        return "all values are equal and the metric's resolution is unknown, so the difference has no interval"
    if judged.loser_diverged and judged.high < judged.threshold:
        return "a loser that diverged does not refute"
    return (
        f"the difference is {_interval(judged, metric)}, not significant with {judged.n} seeds{_more(judged, metric)}"
    )


def _more(judged: Judgement, metric: Metric) -> str:
    shown = f", which mostly show {_number(judged.smallest, metric)} or more"
    if not judged.worth:
        return shown + (": more test examples would help most" if judged.too_few == "examples" else "")
    effect = judged.worth if judged.smallest > judged.worth else judged.worth / 2
    wanted = _number(effect, metric)
    if judged.too_few == "examples":
        return f"{shown}: too few test examples, about {judged.examples_needed} would show {wanted}"
    if judged.seeds_needed is None:
        return f"{shown}: no number of seeds would show {wanted}"
    return f"{shown}; about {judged.seeds_needed} seeds would show {wanted}"


def _notes(judged: Judgement, pairs: Pairs) -> list[str]:
    counts = ((judged.claim.winner, judged.winner_diverged), (judged.claim.loser, judged.loser_diverged))
    notes = [f"{arm!r} diverged in {count} of {pairs.seeds} seeds" for arm, count in counts if count]
    if pairs.missing:
        notes.append(f"{pairs.missing} is missing")
    if pairs.uneven:
        notes.append("the scores per example do not average to the metric, so the interval covers seeds only")
    return notes


def _interval(judged: Judgement, metric: Metric) -> str:
    low, high = _number(judged.low, metric), _number(judged.high, metric)
    return f"{_number(judged.difference, metric)} ({low} to {high})"


def _number(value: float | None, metric: Metric) -> str:
    text = format(value or 0.0, metric.format)
    return text if not value or any(digit in text for digit in "123456789") else f"{value:.2g}"  # small is not 0
