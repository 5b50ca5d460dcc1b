"""What a job leaves on disk: its metrics, the rows it recorded, its scores per test example; plain files.

<out>/<slug>/<key>/run.json                      what was asked, and all that a report needs beside the jobs
<out>/<slug>/<key>/<arm>/seed-<k>/result.json    appears when the job has finished, as a whole folder
                                  metrics.jsonl
                                  scores.safetensors
<out>/<slug>/<key>/start/seed-<k>.pt             what the arms of a seed share
<out>/<slug>/<key>/work/<arm>-seed-<k>/          the job in flight: rows so far, checkpoints
"""

import json
import math
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from weightsmith.core.errors import UsageError, brief, reason
from weightsmith.core.files import folder_atomically, write_atomically
from weightsmith.core.json_files import read_json, read_jsonl
from weightsmith.lab.stats import Result

Row = dict[str, float | int | str]


@dataclass(slots=True)
class Recorder:
    """Collects the rows of one job; hand it to anything that reports numbers as it goes.

    Attributes:
        rows: What has been recorded so far.
        live: A file that gets every row at once, so that others can watch; ``None``: nobody watches.
    """

    rows: list[Row] = field(default_factory=list)
    live: Path | None = None

    def __call__(self, row: Mapping[str, float | int | str], **more: float | int | str) -> None:
        """Append one row.

        Args:
            row: Numbers and short strings by name.
            **more: Further entries, for example ``phase="sweep"``.
        """
        self.rows.append({**row, **more})
        self.show(self.rows[-1])

    def show(self, row: Mapping[str, float | int | str]) -> None:
        """Tell those who watch how far it is; nothing is kept."""
        if self.live is not None:
            with self.live.open("a") as file:
                file.write(json.dumps(dict(row)) + "\n")


@dataclass(frozen=True, slots=True)
class JobResult:
    """What one finished job leaves behind.

    Attributes:
        arm: The arm's name.
        seed: The seed.
        metrics: What was measured; a metric that this arm does not have is left out, one that is not finite is ``nan``.
        diverged: Training did not stay finite.
        rows: Everything recorded on the way.
        scores: Per metric that is a mean over test examples, one score per example ``(N,)``.
        started: Unix time.
        wall_seconds: Duration.
        peak_memory: Largest resident memory while it ran, bytes; on CUDA the largest allocated device memory.
        threads: torch threads that it ran with; results are reproducible for the same number.
        versions: Versions of the libraries that matter.
        hardware: What it ran on.
    """

    arm: str
    seed: int
    metrics: Mapping[str, float]
    diverged: bool
    rows: list[Row]
    scores: Mapping[str, Tensor]
    started: float
    wall_seconds: float
    peak_memory: int
    threads: int
    versions: Mapping[str, str]
    hardware: str


_IN_OTHER_FILES = {"rows", "scores"}
_RESULT = {
    "arm": str,
    "seed": int,
    "metrics": {str: float},
    "diverged": bool,
    "started": float,
    "wall_seconds": float,
    "peak_memory": int,
    "threads": int,
    "versions": {str: str},
    "hardware": str,
}
_RUN = {
    "slug": str,
    "title": str,
    "arms": [{"name": str, "text": str, "title": str}],
    "metrics": [
        {
            "name": str,
            "label": str,
            "better": (str, None),
            "format": str,
            "resolution": (float, None),
            "help": str,
            "chosen_by?": [str],
            "cost?": bool,
            "failures?": bool,
        }
    ],
    "claims": [
        {
            "text": str,
            "metric": str,
            "winner": str,
            "loser": str,
            "primary": bool,
            "gate?": bool,
            "margin": float,
            "relative": bool,
            "worth": (float, None),
            "paper": str,
            "paper_gain": (float, None),
        }
    ],
    "charts": [
        {
            "title": str,
            "x": str,
            "y": str,
            "kind": str,
            "phase": (str, None),
            "x_label": str,
            "y_label": str,
            "log_x": bool,
            "log_y": bool,
            "arms": [str],
        }
    ],
    "config": dict,
    "seeds": [int],
    "plan": {"looks": [int]},
    "question?": str,
    "reading?": str,
    "preset?": (str, None),
    "fingerprint?": {str: str},
    "left_out?": [str],
    "task?": ({"name": str, "rows": {str: int}, "facts": {str: str}}, None),
    "versions?": {str: str},
    "hardware?": str,
}


def job_folder(run_folder: Path, arm: str, seed: int) -> Path:
    """Where the files of one finished job are."""
    return run_folder / arm / f"seed-{seed}"


def work_folder(run_folder: Path, arm: str, seed: int) -> Path:
    """Where one job works until it has finished."""
    return run_folder / "work" / f"{arm}-seed-{seed}"


def write_job(run_folder: Path, result: JobResult) -> None:
    """Write the files of one job as one folder that appears whole."""
    content = {item.name: getattr(result, item.name) for item in fields(result) if item.name not in _IN_OTHER_FILES}
    kept = work_folder(run_folder, result.arm, result.seed) / "keep"
    with folder_atomically(job_folder(run_folder, result.arm, result.seed)) as folder:
        if kept.is_dir():
            shutil.copytree(kept, folder, dirs_exist_ok=True)
        write_atomically(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in result.rows))
        if result.scores:
            write_atomically(folder / "scores.safetensors", save({k: v.contiguous() for k, v in result.scores.items()}))
        write_atomically(folder / "result.json", json.dumps(content, indent=2) + "\n")


def read_job(folder: Path) -> JobResult:
    """Read one job's files back.

    Raises:
        UsageError: A file is missing, cut off or not what it should be; the message names it and what to do.
    """
    again = "run the same command again: only that job is repeated"
    content = read_json(folder / "result.json", _RESULT, what_to_do=again)
    if job_folder(folder.parents[1], content["arm"], content["seed"]) != folder:
        owner = f"{brief(content['arm'])}, seed {content['seed']}"
        raise UsageError(f"{folder / 'result.json'} belongs to {owner}; {again}")
    path = folder / "scores.safetensors"
    try:
        rows = [row for _, row in read_jsonl(folder / "metrics.jsonl", {str: (float, str)})]
        scores = load(path.read_bytes()) if path.is_file() else {}
    except (OSError, SafetensorError) as error:
        raise UsageError(f"{path} is damaged ({reason(error)}); {again}") from error
    except UsageError as error:
        raise UsageError(f"{error}; {again}") from error
    return JobResult(rows=rows, scores=scores, **{name: content[name] for name in _RESULT})


def read_jobs(run_folder: Path) -> Iterator[JobResult | UsageError]:
    """Read every finished job of a run, by arm and seed; in place of a damaged one comes the error that names it."""
    for path in sorted(run_folder.glob("*/seed-*/result.json")):
        try:
            yield read_job(path.parent)
        except UsageError as error:
            yield error


def results_of(jobs: Iterable[JobResult]) -> dict[str, dict[int, Result]]:
    """Finished jobs as `weightsmith.lab.stats.judge` takes them."""
    found: dict[str, dict[int, Result]] = {}
    for job in jobs:
        scores = {name: values.double().numpy() for name, values in job.scores.items()}
        found.setdefault(job.arm, {})[job.seed] = Result(job.metrics, job.diverged, scores)
    return found


def put_aside(folder: Path) -> Path:
    """Rename a folder that holds something else than it should, so that its place is free; give the new name."""
    aside = folder.with_name(f"{folder.name}.damaged-{time.time_ns()}")
    folder.rename(aside)
    return aside


def write_run(run_folder: Path, description: Mapping[str, Any]) -> None:
    """Write ``run.json``: what was asked for, and all that a report needs beside the jobs."""
    write_atomically(run_folder / "run.json", json.dumps(description, indent=2, default=str) + "\n")


def read_run(run_folder: Path) -> dict[str, Any]:
    """Read ``run.json``.

    Raises:
        UsageError: The folder is not a run folder, or the file is damaged.
    """
    path = run_folder / "run.json"
    if not path.is_file():
        runs = sorted(str(found.parent) for found in run_folder.glob("**/run.json")) if run_folder.is_dir() else []
        hint = f"; these are: {', '.join(runs[:5])}" if runs else ""
        raise UsageError(f"{run_folder} is not a run folder: it has no run.json{hint}")
    record: dict[str, Any] = read_json(
        path, _RUN, what_to_do="run the experiment again with the same settings to replace it"
    )
    return record


def plain_metrics(metrics: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, Tensor]]:
    """Separate what a job returned into numbers and scores per example; a number that is not finite becomes ``nan``."""
    scores = {
        name: value.detach().float().cpu()
        for name, value in metrics.items()
        if isinstance(value, Tensor) and value.dim()
    }
    numbers = {name: float(value.double().mean()) for name, value in scores.items()}
    numbers |= {n: float(v) for n, v in metrics.items() if v is not None and n not in scores}
    return {name: value if math.isfinite(value) else math.nan for name, value in numbers.items()}, scores
