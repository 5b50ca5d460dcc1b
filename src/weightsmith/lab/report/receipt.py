"""A run as a small file of data, without weights or curves: what documentation is written from, and can be repeated."""

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from weightsmith.core.files import write_atomically
from weightsmith.core.json_files import read_json
from weightsmith.lab.report import words
from weightsmith.lab.report.model import Report

_DIGITS = 7
_SHAPE = {
    "slug": str,
    "preset": str,
    "config": dict,
    "title": str,
    "command": str,
    "answer": [str],
    "headline": str,
    "arms": [{"name": str, "text": str, "title": str}],
    "metrics": [dict],
    "claims": [{"claim": dict, "verdict": str, "evidence": {str: str}}],
    "jobs": [{"arm": str, "seed": int, "metrics": {str: (float, None)}}],
}


def receipt_of(report: Report, command: str) -> dict[str, Any]:
    """Everything about a run that documentation repeats.

    Args:
        report: The finished run.
        command: What a reader types to get it.
    """
    run = report.run
    return {
        "slug": run["slug"],
        "title": run["title"],
        "command": command,
        "preset": run.get("preset"),
        "config": run["config"],
        "task": run.get("task"),
        "plan": run["plan"],
        "answer": words.answer(report),
        "headline": report.headline,
        "arms": [asdict(arm) for arm in report.planned_arms],
        "metrics": [asdict(metric) for metric in report.shown],
        "claims": [_claim(report, index) for index in range(len(report.judgements))],
        "jobs": [
            {
                "arm": job.arm,
                "seed": job.seed,
                "diverged": job.diverged,
                "metrics": {name: _rounded(value) for name, value in job.metrics.items()},
            }
            for job in report.jobs
        ],
        "facts": words.facts(report),
        "versions": words.versions(report),
        "threads": sorted({job.threads for job in report.jobs}),
    }


def write_receipt(report: Report, command: str, path: Path) -> None:
    """Write `receipt_of` as JSON."""
    write_atomically(path, json.dumps(receipt_of(report, command), indent=1, ensure_ascii=False) + "\n")


def read_receipt(path: Path) -> dict[str, Any]:
    """Read a receipt.

    Raises:
        UsageError: The file is missing, damaged, or something else.
    """
    receipt: dict[str, Any] = read_json(
        path, _SHAPE, what_to_do="give a file that weightsmith report --receipt has written"
    )
    return receipt


@dataclass(frozen=True, slots=True)
class Deviation:
    """One metric of a repeated job that is not what the receipt says."""

    arm: str
    seed: int
    metric: str
    then: float
    now: float


def deviations(receipt: Mapping[str, Any], report: Report, tolerance: float) -> list[Deviation]:
    """Compare the jobs of a repeated run with a receipt.

    Args:
        receipt: From `read_receipt`.
        report: The repeated run.
        tolerance: Largest difference, relative to the value then.

    Returns:
        Metrics that differ by more; times and memory are not compared.
    """
    then = {(job["arm"], job["seed"]): job["metrics"] for job in receipt["jobs"]}
    found = []
    for job in report.jobs:
        for name, value in then.get((job.arm, job.seed), {}).items():
            now = job.metrics.get(name, math.nan)
            if name.startswith(("seconds", "step_ms", "setup_ms", "saved_mib")):
                continue
            before = math.nan if value is None else value
            same_gap = math.isnan(before) and math.isnan(now)
            if not same_gap and not abs(now - before) <= tolerance * max(abs(before), 1e-6):
                found.append(Deviation(job.arm, job.seed, name, before, now))
    return found


def _claim(report: Report, index: int) -> dict[str, Any]:
    judgement = report.judgements[index]
    content = asdict(judgement)
    content["claim"] = asdict(judgement.claim)
    content = {name: _rounded(value) for name, value in content.items()}
    return content | {"evidence": words.evidence(report, judgement), "finding": words.finding(report, judgement)}


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value
