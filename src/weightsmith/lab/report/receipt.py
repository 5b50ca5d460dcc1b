"""A run as a small file of data, without weights or curves: what documentation is written from, and can be repeated."""

import json
import math
import statistics
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from weightsmith.core.files import write_atomically
from weightsmith.core.json_files import read_json
from weightsmith.lab.experiment import Metric
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
class Figure:
    """One metric of a repeated job beside what the receipt says.

    Attributes:
        arm: The arm.
        metric: The metric's name.
        then: In the receipt; ``nan``: not finite.
        now: As repeated; ``nan``: not finite, or not measured any more.
        state: ``"equal"`` in all digits of the receipt, ``"within"`` the tolerance, a ``"choice"`` that turned while
            the rest of the job is within it, or ``"beyond"``.
        examples: The difference in test examples; ``None``: the metric is no count of them.
        spreads: The difference in standard deviations over the receipt's seeds; ``None``: there is none.
    """

    arm: str
    metric: str
    then: float
    now: float
    state: Literal["equal", "within", "choice", "beyond"]
    examples: float | None
    spreads: float | None


def compare(receipt: Mapping[str, Any], report: Report, tolerance: float, spread: float = 0.0) -> list[Figure]:
    """Compare the jobs of a repeated run with a receipt.

    Args:
        receipt: From `read_receipt`.
        report: The repeated run.
        tolerance: Largest difference, relative to the value then; one test example is always accepted.
        spread: Largest difference that is accepted too, in standard deviations over the receipt's seeds.

    Returns:
        Every metric of every job that the receipt has; costs are not compared.
    """
    declared = {metric.name: metric for metric in report.metrics}
    then = {(job["arm"], job["seed"]): job["metrics"] for job in receipt["jobs"]}
    found: list[Figure] = []
    for job in report.jobs:
        figures = []
        for name, value in then.get((job.arm, job.seed), {}).items():
            metric = declared.get(name, Metric(name, name))
            if metric.cost:
                continue
            before, now = math.nan if value is None else value, job.metrics.get(name, math.nan)
            example, deviation = _one_example(report, metric), _deviation(receipt, job.arm, name)
            difference = abs(now - before)
            accepted = max(tolerance * abs(before), 1.001 * (example or 0.0), spread * (deviation or 0.0))
            same = _rounded(now) == value or (math.isnan(before) and math.isnan(now))
            figures.append(
                Figure(
                    job.arm, name, before, now,
                    "equal" if same else "within" if difference <= accepted else "beyond",
                    difference / example if example else None,
                    difference / deviation if deviation else None,
                )
            )  # fmt: skip
        beyond = {figure.metric for figure in figures if figure.state == "beyond"}
        if all(name in declared and job.arm in declared[name].chosen_by for name in beyond):
            figures = [replace(figure, state="choice") if figure.metric in beyond else figure for figure in figures]
        found += figures
    return found


def _one_example(report: Report, metric: Metric) -> float | None:
    """How far one test example that is right or wrong moves a metric."""
    scores = [job.scores[metric.name] for job in report.jobs if metric.name in job.scores]
    values = torch.cat(scores).unique().tolist() if scores else []
    return (values[1] - values[0]) / len(scores[0]) if len(values) == 2 else metric.resolution


def _deviation(receipt: Mapping[str, Any], arm: str, metric: str) -> float | None:
    values = [job["metrics"].get(metric) for job in receipt["jobs"] if job["arm"] == arm]
    numbers = [value for value in values if value is not None]
    return statistics.stdev(numbers) if len(numbers) > 1 else None


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
