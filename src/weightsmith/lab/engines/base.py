"""One job done, whoever does it: its folder, its lock, its shared start, its result."""

import contextlib
import fcntl
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightsmith.core.files import write_atomically
from weightsmith.lab import machine, record
from weightsmith.lab.experiment import Experiment
from weightsmith.lab.job import Job
from weightsmith.lab.record import JobResult, Recorder


@dataclass(frozen=True, slots=True)
class Work:
    """A job to be done: everything another process needs to know.

    Attributes:
        experiment: What is compared.
        config: The configuration.
        folder: The run folder.
        arm: The arm's name.
        seed: The seed.
    """

    experiment: Experiment[Any]
    config: Any
    folder: Path
    arm: str
    seed: int

    @property
    def trace(self) -> Path:
        """Where the traceback of a failed job is kept."""
        return self.folder / self.arm / f"seed-{self.seed}.error.txt"


@dataclass(frozen=True, slots=True)
class Failure:
    """A job that raised, was killed or took too long: the others go on."""

    arm: str
    seed: int
    error: str
    trace: str = ""


Engine = Callable[[Sequence[Work]], Iterator[JobResult | Failure]]
"""Does jobs in any order and gives each outcome as it comes; finished jobs are on disk by then."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a file's lock, which the system releases when the process dies.

    Args:
        path: The lock file; made when missing.
        wait: Wait for it, or give up at once.

    Yields:
        Whether the lock is held.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        yield True


def finished(work: Work) -> JobResult | None:
    """The result of a job that is done; what is damaged is put aside, and the job counts as not done."""
    folder = record.job_folder(work.folder, work.arm, work.seed)
    if not folder.exists():
        return None
    try:
        return record.read_job(folder)
    except ValueError:
        record.put_aside(folder)
        return None


def do(work: Work, threads: int | None = None) -> JobResult | Failure:
    """Do one job here and write its result, unless another process has done so by now.

    Args:
        work: The job.
        threads: torch threads to compute with; ``None``: as many as there are.
    """
    folder = record.work_folder(work.folder, work.arm, work.seed)
    before = torch.get_num_threads()
    with locked(folder.with_suffix(".lock"), wait=True):
        done = finished(work)
        if done is not None:
            return done
        try:
            if threads is not None:
                torch.set_num_threads(threads)
            result = _compute(work, folder)
        except Exception as error:  # one job's error must not take the others down
            failure = Failure(work.arm, work.seed, f"{type(error).__name__}: {error}", traceback.format_exc())
            write_atomically(work.trace, failure.trace)
            return failure
        finally:
            torch.set_num_threads(before)
        record.write_job(work.folder, result)
        work.trace.unlink(missing_ok=True)
        shutil.rmtree(folder, ignore_errors=True)
        return result


def _compute(work: Work, folder: Path) -> JobResult:
    experiment = work.experiment
    folder.mkdir(parents=True, exist_ok=True)
    live = folder / "rows.jsonl"
    live.unlink(missing_ok=True)  # a job that resumes records its rows again
    with machine.Stopwatch() as watch:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        job = Job(work.arm, work.seed, Recorder(live=live), folder, device, start=_start(work))
        metrics, scores = record.plain_metrics(returned := experiment.job(work.config, job))
    missing = {metric.name for metric in experiment.metrics} - returned.keys()
    if missing:
        raise ValueError(f"the job did not return {', '.join(sorted(missing))}; None says that it was not measured")
    return JobResult(
        arm=work.arm,
        seed=work.seed,
        metrics=metrics,
        diverged=job.diverged,
        rows=job.record.rows,
        scores=scores,
        started=watch.started,
        wall_seconds=watch.seconds,
        peak_memory=watch.peak_memory,
        threads=torch.get_num_threads(),
        versions=machine.versions(),
        hardware=machine.hardware(),
    )


def _start(work: Work) -> Any:
    """What the arms of a seed share: made by whoever needs it first, read from disk by all."""
    if work.experiment.start is None:
        return None
    file = work.folder / "start" / f"seed-{work.seed}.pt"
    folder = record.work_folder(work.folder, "start", work.seed)
    with locked(folder.with_suffix(".lock"), wait=True):
        if not file.is_file():
            folder.mkdir(parents=True, exist_ok=True)
            data = work.experiment.start(work.config, work.seed, folder)
            file.parent.mkdir(exist_ok=True)
            half = file.with_suffix(".tmp")
            torch.save(data, half)
            half.replace(file)
            shutil.rmtree(folder, ignore_errors=True)
    return torch.load(file, map_location="cpu", weights_only=True)
