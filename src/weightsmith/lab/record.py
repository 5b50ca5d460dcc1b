"""One job's record: its metrics, the rows it wrote while it ran, and where it ran; plain files on disk."""

import hashlib
import json
import math
import os
import platform
import resource
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from weightsmith.core.errors import UsageError
from weightsmith.core.files import folder_atomically, write_atomically

Row = dict[str, float | int | str]
_LIBRARIES = ("weightsmith", "torch", "numpy", "accelerate", "transformers", "datasets")


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
        if self.live is not None:
            with self.live.open("a") as file:
                file.write(json.dumps(self.rows[-1]) + "\n")


@dataclass(frozen=True, slots=True)
class JobResult:
    """What one finished job leaves behind.

    Attributes:
        arm: The arm's name.
        seed: The seed.
        metrics: The experiment's metrics.
        rows: Everything recorded on the way.
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
    rows: list[Row]
    started: float
    wall_seconds: float
    peak_memory: int
    threads: int
    versions: Mapping[str, str]
    hardware: str


def config_hash(config: Any) -> str:
    """Twelve hexadecimal digits that change when any field of a configuration does."""
    return hashlib.sha256(json.dumps(asdict(config), sort_keys=True, default=str).encode()).hexdigest()[:12]


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that results depend on."""
    found = {"python": platform.python_version()}
    for name in _LIBRARIES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hardware() -> str:
    """The device that torch would use here, in words."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{os.cpu_count()} CPU cores, {platform.machine()}"


class Stopwatch:
    """Wall time and peak memory of a block of code."""

    def __enter__(self) -> "Stopwatch":
        self.started, self._begin = time.time(), time.perf_counter()
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        else:
            _reset_peak()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._begin
        self.peak_memory = torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _peak()


def _reset_peak() -> None:
    # a worker process runs several jobs; without this each would report its predecessors' peak (Linux only)
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return


def _peak() -> int:
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def job_folder(run_folder: Path, arm: str, seed: int) -> Path:
    """Where one job's files are."""
    return run_folder / arm / f"seed-{seed}"


def write_job(run_folder: Path, result: JobResult) -> None:
    """Write ``result.json`` and ``metrics.jsonl`` as one folder that appears whole."""
    content = asdict(result)
    rows = content.pop("rows")
    with folder_atomically(job_folder(run_folder, result.arm, result.seed)) as folder:
        write_atomically(folder / "metrics.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
        write_atomically(folder / "result.json", json.dumps(content, indent=2) + "\n")


def read_job(folder: Path) -> JobResult:
    """Read one job's files back.

    Raises:
        UsageError: A file is missing, cut off or not what it should be; the message names it and the mend.
    """
    path = folder / "result.json"
    try:
        content = json.loads(path.read_text())
        known = {item.name for item in fields(JobResult)} - {"rows"}
        result = JobResult(rows=[], **{name: content[name] for name in known})
        if not all(isinstance(value, int | float) for value in result.metrics.values()):
            raise TypeError("a metric is not a number")
        path = folder / "metrics.jsonl"
        result.rows.extend(json.loads(line) for line in path.read_text().splitlines())
        if not all(isinstance(row, dict) for row in result.rows):
            raise TypeError("a row is not an object")
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(
            f"{path} is damaged ({type(error).__name__}: {error}); "
            f"delete {folder} and run again: only that job is repeated"
        ) from error
    return result


def read_jobs(run_folder: Path) -> Iterator[JobResult]:
    """Read every finished job of a run, by arm and seed."""
    for path in sorted(run_folder.glob("*/seed-*/result.json")):
        yield read_job(path.parent)


def write_run(run_folder: Path, description: Mapping[str, Any]) -> None:
    """Write ``run.json``: what was asked for, and all a report needs besides the jobs."""
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
    try:
        run = json.loads(path.read_text())
        missing = {"slug", "title", "arms", "metrics", "claims", "charts", "config", "seeds"} - run.keys()
    except (ValueError, AttributeError) as error:
        raise UsageError(
            f"{path} is damaged ({error}); run the experiment again with the same settings to mend it"
        ) from error
    if missing:
        raise UsageError(f"{path} is damaged: it lacks {', '.join(sorted(missing))}")
    return run


def finite(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Turn whatever a job returned into plain floats; what is not finite becomes ``nan``."""
    return {name: float(value) if math.isfinite(float(value)) else math.nan for name, value in metrics.items()}
