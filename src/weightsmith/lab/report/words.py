"""Numbers and facts put into words, the same in every output."""

import math
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from weightsmith.lab.experiment import Metric
from weightsmith.lab.report.model import Report
from weightsmith.lab.stats import LEVEL, Judgement, Summary, Verdict

NONE = "—"
SYMBOLS: Mapping[Verdict, str] = {
    "supported": "✓",
    "refuted": "✗",
    "no relevant effect": "≈",
    "undecided": "○",
    "not run": "–",
}
ARROWS = {"higher": "\u00a0↑", "lower": "\u00a0↓", None: ""}
TABLE_NOTE = (
    "Mean ± sample standard deviation over seeds. ↑ higher is better, ↓ lower is better. Marked: ahead by a supported "
    f"claim. {NONE}: not measured in that arm, or not finite."
)
METHOD = (
    "Two arms are compared seed by seed: both start from the same seed, so what the seed alone decides cancels. "
    "Positive differences are in the claim's favor. The interval comes from the mean and the spread of the differences "
    "(Student's t); where jobs kept a score per test example, it covers other seeds and other test examples.",
    "Primary claims and mechanism claims are two families. Each shows any false verdict with a probability of at most "
    f"{LEVEL:.0%}: Holm's rule corrects for several claims, and levels found by simulation make it sound to look at "
    "3, 5, 10 and 20 seeds and to stop early. The interval of a claim is as wide as that correction asks for.",
    "Supported: the interval lies beyond what the claim needs. Refuted: it lies on the other side. No relevant effect: "
    "it lies within the smallest effect worth having, which was set beforehand. Undecided: none of these; which does "
    "not mean that there is no difference. Fewer than 3 paired seeds decide nothing. A winner that "
    "diverged with any seed supports nothing. A gate is a condition for judging at all: it is a family of its own, and "
    "until it is supported every other claim stays undecided.",
)


def number(value: float, spec: str) -> str:
    """One value in a metric's format; more digits where the format would hide that it is not zero."""
    if not math.isfinite(value):
        return NONE
    text = format(value, spec)
    if not any(digit in text for digit in "123456789"):
        # below 1e-12 it is the rounding noise of a mean over equal values
        tiny = f"{100 * value:.1g}%" if spec.endswith("%") else f"{value:.1g}"
        text = format(0.0, spec) if abs(value) < 1e-12 else tiny
    return "−" + text[1:] if text.startswith("-") else text


def signed(value: float, spec: str) -> str:
    """One difference in a metric's format, with its sign."""
    return ("+" if value > 0 else "") + number(value, spec)


def mean_and_sd(summary: Summary, spec: str) -> tuple[str, str]:
    """``("0.912", "±0.004")``; the second is empty where there is no spread to speak of."""
    return number(summary.mean, spec), f"±{number(summary.sd, spec)}" if summary.n > 1 else ""


def seeds_of(report: Report, arm: str) -> str:
    """``"3"``, or ``"2 of 3"`` for an arm that is not finished."""
    done = len(report.finished(arm))
    return str(done) if done == len(report.seeds) else f"{done} of {len(report.seeds)}"


def fewer(report: Report, arm: str, metric: Metric) -> str:
    """``"n=2"`` where finished seeds have no finite value, else nothing."""
    n = report.table[arm][metric.name].n
    return f"n={n}" if 0 < n < len(report.finished(arm)) else ""


def answer(report: Report) -> list[str]:
    """The first screen: on what, what was found and how large it is, and what to do; a sentence or two each."""
    sentences = [_on_what(report)]
    if report.closed:
        sentences += [f"Gate not met, so no other claim is judged. {finding(report, gate)}" for gate in report.closed]
    else:
        sentences += [finding(report, judgement) for judgement in report.primary or report.mechanism]
    return [*sentences, advice(report)]


def advice(report: Report) -> str:
    """Whether to use it: one part per primary claim, or per claim where none is primary."""
    leading = report.primary or report.mechanism
    if not leading:
        return "This experiment declares no claims."
    if report.closed:
        return "Nothing is decided here: the condition for judging is not met."
    by_arm: dict[str, list[Judgement]] = {}
    for judgement in leading:
        by_arm.setdefault(judgement.claim.winner, []).append(judgement)
    text = "; ".join(_advice(report, arm, judgements) for arm, judgements in by_arm.items())
    return text[0].upper() + text[1:] + "."


def _advice(report: Report, arm: str, judgements: list[Judgement]) -> str:
    # two verdicts about one arm must not read as two pieces of advice
    name = report.label(arm)
    verdicts = {judgement.verdict for judgement in judgements}
    if len(verdicts) == 1:
        return _one_verdict(name, max(judgements, key=lambda judgement: judgement.seeds_needed or 0))
    against = {
        verdict: " and ".join(
            dict.fromkeys(_beside(report, judgement) for judgement in judgements if judgement.verdict == verdict)
        )
        for verdict in verdicts
    }
    parts = [template.format(against[verdict]) for verdict, template in _MIXED.items() if verdict in against]
    if {"supported", "refuted"} <= verdicts:
        what = f"whether to use {name} here depends on what counts"
    elif "refuted" in verdicts:
        what = f"do not use {name} here"
    elif verdicts == {"supported", "no relevant effect"}:
        what = f"use {name} here"
    else:
        what = f"whether to use {name} here is undecided"
    return f"{what}: it is {', '.join(parts[:-1])} and {parts[-1]}"


_PRACTICAL = 100  # seeds
_MIXED: Mapping[Verdict, str] = {
    "supported": "better than {}",
    "refuted": "not better than {}",
    "no relevant effect": "without relevant difference from {}",
    "undecided": "undecided against {}",
    "not run": "not compared with {}",
}


def _beside(report: Report, judgement: Judgement) -> str:
    return f"{report.label(judgement.claim.loser)} in {report.metric(judgement.claim).label}"


def _one_verdict(name: str, judgement: Judgement) -> str:
    if judgement.verdict == "supported":
        return f"use {name} here"
    if judgement.verdict == "refuted":
        return f"do not use {name} here"
    if judgement.verdict == "no relevant effect":
        return f"{name} makes no relevant difference here"
    if judgement.verdict == "not run":
        return f"{name} was not compared"
    if judgement.too_few == "examples" and judgement.seeds_needed is None:
        return f"{name} is undecided, and more seeds would not help: the test set is too small"
    more = (judgement.seeds_needed or 0) - judgement.n
    if more > _PRACTICAL:
        return f"{name} is undecided, and no practical number of seeds would decide it: about {more:,} more are needed"
    needed = f"about {more} more seeds are" if more > 1 else "about 1 more seed is" if more == 1 else "more seeds are"
    return f"{name} is undecided: {needed} needed"


def _on_what(report: Report) -> str:
    task = report.run.get("task") or {}
    facts, rows = task.get("facts", {}), task.get("rows", {})
    parts = []
    if facts.get("data") or task.get("name"):
        parts.append(f"on {facts.get('data') or task['name']}")
    if rows:
        parts.append(", ".join(f"{count:,} {split} rows" for split, count in rows.items() if count))
    if facts.get("model"):
        parts.append(f"model {facts['model']}")
    done = max((len(report.finished(arm.name)) for arm in report.arms), default=0)
    parts.append(f"{done} seed{'s' if done != 1 else ''} per arm")
    text = "; ".join(parts)
    return text[0].upper() + text[1:] + "."


def finding(report: Report, judgement: Judgement) -> str:
    """One claim's outcome as a plain sentence with its size."""
    claim, metric = judgement.claim, report.metric(judgement.claim)
    if report.closed and not claim.gate and judgement.verdict != "not run":
        return f"{claim.text}: undecided, the gate is not met."
    winner, loser = report.label(claim.winner), report.label(claim.loser)
    if judgement.verdict == "not run":
        return f"{claim.text}: not run."
    if not math.isfinite(judgement.difference):
        return f"{claim.text}: undecided, {judgement.reason}."
    direction = 1 if metric.better == "higher" else -1
    raw = direction * judgement.difference
    size = f"{metric.label}: {winner} {signed(raw, metric.format)} against {loser}"
    if math.isfinite(judgement.low):
        low, high = sorted((direction * judgement.low, direction * judgement.high))
        size += f", interval {signed(low, metric.format)} to {signed(high, metric.format)}"
    words = {
        "supported": "holds here",
        "refuted": "does not hold here",
        "no relevant effect": "no relevant effect",
        "undecided": "undecided",
    }[judgement.verdict]
    return f"{claim.text}: {words} ({size})."


def why(judgement: Judgement) -> str:
    """The reason of a verdict where its numbers do not say it."""
    told = judgement.verdict in ("undecided", "not run") or judgement.winner_diverged or judgement.loser_diverged
    return judgement.reason if told else ""


def evidence(report: Report, judgement: Judgement) -> dict[str, str]:
    """What a verdict rests on, by heading."""
    claim = judgement.claim
    metric = report.metric(claim)
    spec = metric.format
    names = report.label(claim.winner), report.label(claim.loser)
    first, second = names if metric.better == "higher" else names[::-1]
    share = f" ({number(100 * claim.margin, 'g')} % of {names[1]})" if claim.relative and claim.margin else ""
    needed = judgement.threshold if claim.relative else claim.margin
    found = {"Compared": f"{metric.label}: {first} − {second}", "Difference": signed(judgement.difference, spec)}
    if math.isfinite(judgement.low):
        found[f"{100 * (1 - judgement.level):.4g} % interval"] = (
            f"{signed(judgement.low, spec)} to {signed(judgement.high, spec)}"
        )
    if claim.margin:
        found["Needed"] = f"more than {signed(needed, spec)}{share}"
    if judgement.worth is not None:
        found["Smallest relevant effect"] = signed(judgement.worth, spec)
    found["Paired seeds"] = str(judgement.n)
    if failures := _left_out(report, (claim.winner, claim.loser)):
        found["Rests on means without failed networks of"] = failures
    if math.isfinite(judgement.p):
        found["p-value"] = f"{p_value(judgement.p)} {_tested(judgement)}, corrected for looks and claims"
    if math.isfinite(judgement.low):
        found["Interval covers"] = f"other {judgement.over}"
    if judgement.verdict == "undecided" and math.isfinite(judgement.smallest):
        found["Smallest detectable effect"] = signed(judgement.smallest, spec)
        if judgement.too_few is not None:
            found["Limited by"] = {"seeds": "seeds", "examples": "test examples"}[judgement.too_few]
        if judgement.seeds_needed is not None:
            found["Seeds needed"] = str(judgement.seeds_needed)
        if judgement.examples_needed is not None:
            found["Test examples needed"] = f"{judgement.examples_needed:,}"
    if claim.paper:
        found["In the paper"] = claim.paper
    if judgement.excludes_paper is not None:
        found["The paper's gain"] = "outside the interval" if judgement.excludes_paper else "within the interval"
    return found


def _tested(judgement: Judgement) -> str:
    """What a verdict's p-value speaks against."""
    nothing = '"the difference is just what is needed"' if judgement.claim.margin else '"there is no difference"'
    if judgement.worth is None:
        return f"against {nothing}"
    return f'against {nothing} or "there is a relevant effect", whichever is smaller'


def p_value(p: float) -> str:
    """Three decimals, or that it is smaller than that."""
    if not math.isfinite(p):
        return NONE
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"


def duration(seconds: float) -> str:
    """``"0.4 s"``, ``"42 s"``, ``"3 min 12 s"``, ``"1 h 4 min"``."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 1:
        return f"{rest} s"
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def notices(report: Report) -> list[str]:
    """What a reader must know before believing anything: missing jobs, arms left out, damaged files, divergence."""
    found = []
    if not report.complete or report.strays:
        found.append(f"{report.progress}.")
    left_out = [arm.label for arm in report.arms if arm not in report.planned_arms]
    if left_out:
        found.append(f"Left out: {', '.join(left_out)}; claims about them still count in the correction.")
    diverged: dict[str, list[int]] = {}
    for job in report.jobs:
        if job.diverged:
            diverged.setdefault(report.label(job.arm), []).append(job.seed)
    if diverged:
        found.append("Diverged: " + ", ".join(f"{arm} (seed {', '.join(map(str, s))})" for arm, s in diverged.items()))
    if failures := _left_out(report, [arm.name for arm in report.arms]):
        found.append(f"Failed networks, left out of the means of their arms: {failures}.")
    return found + list(report.damaged)


def _left_out(report: Report, arms: Sequence[str]) -> str:
    """By arm, the sum of what its jobs report as failures: parts that their means do not hold."""
    names = [metric.name for metric in report.metrics if metric.failures]
    counts = {
        arm: sum(job.metrics.get(name, 0.0) for job in report.jobs if job.arm == arm for name in names) for arm in arms
    }
    return ", ".join(f"{report.label(arm)} ({number(count, '.0f')})" for arm, count in counts.items() if count)


def facts(report: Report) -> dict[str, str]:
    """What was run, where, and what it took."""
    looks = ", ".join(map(str, report.plan.looks))
    found = {
        "Experiment": str(report.run["slug"]),
        "Preset": str(report.run.get("preset", NONE)),
        "Seeds": ", ".join(map(str, report.seeds)),
        "Looks planned at": f"{looks} seeds",
        "Jobs": report.progress,
    }
    task = report.run.get("task") or {}
    found |= {f"Task: {name}": str(value) for name, value in task.get("facts", {}).items()}
    if not report.jobs:
        return found | {"Hardware": str(report.run.get("hardware", NONE))}
    seconds = [job.wall_seconds for job in report.jobs]
    return (
        found
        | {
            "Started": f"{datetime.fromtimestamp(min(job.started for job in report.jobs), UTC):%Y-%m-%d %H:%M} UTC",
            "Time": f"{duration(sum(seconds) / len(seconds))} per job on average, {duration(sum(seconds))} in total",
            "Peak memory": f"{max(job.peak_memory for job in report.jobs) / 2**20:,.0f} MiB in the largest job",
            "Hardware": _distinct(job.hardware for job in report.jobs),
            "Threads": _distinct(job.threads for job in report.jobs) + " per job",
        }
        | {label: number(value, ".4g") for label, value in report.constants.items()}
    )


def versions(report: Report) -> dict[str, str]:
    """Versions by library; several where jobs ran with different ones."""
    if not report.jobs:
        return {name: str(version) for name, version in report.run.get("versions", {}).items()}
    names = dict.fromkeys(name for job in report.jobs for name in job.versions)
    return {name: _distinct(job.versions.get(name, NONE) for job in report.jobs) for name in names}


def settings(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A configuration as flat text, nested names joined by dots."""
    flat: dict[str, str] = {}
    for name, value in config.items():
        if isinstance(value, Mapping):
            flat |= settings(value, f"{prefix}{name}.")
        else:
            flat[prefix + name] = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return flat


def _distinct(values: Any) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))
