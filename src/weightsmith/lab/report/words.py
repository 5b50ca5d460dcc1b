"""Numbers and facts put into words, alike in every output."""

import math
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

from weightsmith.lab.claim import Metric
from weightsmith.lab.report.model import Report
from weightsmith.lab.stats import FEWEST_SEEDS, LEVEL, Judgement, Summary

NONE = "—"
SYMBOLS = {"supported": "✓", "refuted": "✗", "inconclusive": "○"}
ARROWS = {"higher": "\u00a0↑", "lower": "\u00a0↓", None: ""}
TABLE_NOTE = (
    "Mean ± sample standard deviation over seeds. ↑ higher is better, ↓ lower is better. Marked: the best mean, which "
    f"is no finding by itself. {NONE}: no finite value (diverged, or not defined for that arm)."
)
METHOD = (
    "Two arms are compared seed by seed: both start from the same seed, so their difference is free of what the seed "
    "alone decides. Each difference is counted so that positive is in the claim's favour. "
    f"From the mean and the spread of these differences comes the {100 * LEVEL:.0f} % interval (Student's t). "
    "The p-value tests the difference against what the claim needs, two-sided, and is adjusted over all claims of the "
    "run (Holm's step-down correction); the interval is not, so where the two seem to disagree the p-value decides.",
    f"Supported: adjusted p below {1 - LEVEL:.2f} and the mean beyond what is needed. Refuted: adjusted p as small, "
    "and the mean on the other side. Anything else is inconclusive: the seeds do not tell, which does not mean that "
    "there is no difference. "
    f"Fewer than {FEWEST_SEEDS} paired seeds are always inconclusive. A seed in which either arm has no finite value "
    "cannot be paired and is left out.",
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


def evidence(report: Report, judgement: Judgement) -> dict[str, str]:
    """What a verdict rests on, by heading; the same headings for every claim."""
    claim = judgement.claim
    metric = report.metric(claim)
    first, second = (claim.winner, claim.loser) if claim.better == "higher" else (claim.loser, claim.winner)
    needed = judgement.threshold if claim.relative else claim.margin
    share = f" ({number(100 * claim.margin, 'g')} % of {claim.loser})" if claim.relative and claim.margin else ""
    return {
        "Compared": f"{metric.label}: {first} − {second}",
        "Difference": signed(judgement.difference, metric.format),
        "95 % interval": f"{signed(judgement.low, metric.format)} to {signed(judgement.high, metric.format)}"
        if judgement.n > 1
        else NONE,
        "Needed": f"more than {signed(needed, metric.format) if claim.margin else 0}{share}",
        "Paired seeds": str(judgement.n),
        "Adjusted p": p_value(judgement.p),
        "In the paper": claim.paper or NONE,
    }


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


def facts(report: Report) -> dict[str, str]:
    """What was run, where, and what it took."""
    found = {
        "Experiment": str(report.run["slug"]),
        "Preset": str(report.run.get("preset", NONE)),
        "Configuration": str(report.run.get("config_hash", NONE)),
        "Seeds": ", ".join(map(str, report.seeds)),
        "Jobs": report.progress,
    }
    if not report.jobs:
        return found | {"Hardware": str(report.run.get("hardware", NONE))}
    seconds = [job.wall_seconds for job in report.jobs]
    return found | {
        "Started": f"{datetime.fromtimestamp(min(job.started for job in report.jobs), UTC):%Y-%m-%d %H:%M} UTC",
        "Time": f"{duration(sum(seconds) / len(seconds))} per job on average, {duration(sum(seconds))} in total",
        "Peak memory": f"{max(job.peak_memory for job in report.jobs) / 2**20:,.0f} MiB in the largest job",
        "Hardware": _distinct(job.hardware for job in report.jobs),
        "Threads": _distinct(job.threads for job in report.jobs) + " per job",
    }


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
            flat[prefix + name] = str(value)
    return flat


def _distinct(values: Any) -> str:
    return ", ".join(dict.fromkeys(map(str, values)))
