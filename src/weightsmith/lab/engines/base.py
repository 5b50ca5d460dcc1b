"""One job done, whoever does it: its folder, its lock, its shared start, its result."""

import contextlib
import fcntl
import os
import shutil
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch

from weightsmith.core import files
from weightsmith.core.device import default_device
from weightsmith.core.errors import UsageError
from weightsmith.core.files import file_atomically, write_atomically
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

    @property
    def lock(self) -> Path:
        """Whoever holds it does the job."""
        return _lock_of(record.work_folder(self.folder, self.arm, self.seed))


@dataclass(frozen=True, slots=True)
class Failure:
    """A job that raised, was killed or took too long: the others go on.

    Attributes:
        arm: The arm's name.
        seed: The seed.
        error: What it raised, or what became of it.
        trace: The traceback.
        usage: The job refused what it was asked for (a `UsageError`); the other jobs would most likely do so too.
    """

    arm: str
    seed: int
    error: str
    trace: str = ""
    usage: bool = False


@dataclass(frozen=True, slots=True)
class Done:
    """A job whose result is on disk."""

    arm: str
    seed: int


@dataclass(frozen=True, slots=True)
class Busy:
    """The job is being done by another process now."""


Engine = Callable[[Sequence[Work]], Iterator[Done | Failure]]
"""Does jobs in any order and gives each outcome as it comes; finished jobs are on disk by then."""


@contextlib.contextmanager
def locked(path: Path, *, wait: bool) -> Iterator[bool]:
    """Hold a file's lock, which the system releases when the process dies; the file is removed with the lock.

    Args:
        path: The lock file; made when missing.
        wait: Wait for it, or give up at once.

    Yields:
        Whether the lock is held.
    """
    while True:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as file:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
            except BlockingIOError:
                yield False
                return
            if not _is_at(file, path):  # who held it has removed it meanwhile: others hold a new file of the same name
                continue
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return


def _is_at(file: IO[str], path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _lock_of(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def remove_leftovers(run_folder: Path) -> None:
    """Remove what killed processes have left in a run folder: locks, half-written files, folders of finished jobs.

    What a live process holds stays, and so do checkpoints of jobs that have not finished.
    """
    work = run_folder / "work"
    for lock in work.glob("*.lock"):
        with locked(lock, wait=False):
            pass
    for folder in sorted(path for path in work.glob("*-seed-*") if path.is_dir()):
        name, _, seed = folder.name.rpartition("-seed-")
        done = run_folder / name / f"seed-{seed}" / "result.json"
        if done.is_file() or (name == "start" and (run_folder / name / f"seed-{seed}.pt").is_file()):
            with locked(_lock_of(folder), wait=False) as held:
                if held:
                    shutil.rmtree(folder, ignore_errors=True)
    for folder in (run_folder, *run_folder.glob("*/"), *work.rglob("*/")):
        with contextlib.suppress(OSError):  # another run may remove it meanwhile
            files.remove_leftovers(folder)


def finished(work: Work) -> bool:
    """Whether a job is done; what is damaged or foreign in its place is put aside, and the job counts as not done."""
    folder = record.job_folder(work.folder, work.arm, work.seed)
    if not folder.exists():
        return False
    try:
        record.read_job(folder)
    except UsageError:
        record.put_aside(folder)
        return False
    return True


def do(work: Work, *, threads: int | None = None, wait: bool = True) -> Done | Failure | Busy:
    """Do one job here and write its result, unless another process has done so by now.

    Args:
        work: The job.
        threads: torch threads to compute with; ``None``: as many as there are.
        wait: When another process is doing the job: wait for it, or give up at once.
    """
    with locked(work.lock, wait=wait) as held:
        if not held:
            return Busy()
        if finished(work):
            return Done(work.arm, work.seed)
        return keep(work, compute(work, threads))


def keep(work: Work, outcome: JobResult | Failure) -> Done | Failure:
    """Write a result, or the traceback of a failure.

    Returns:
        What the engine passes on.

    Raises:
        OSError: The disk is full or cannot be written.
    """
    if isinstance(outcome, Failure):
        write_atomically(work.trace, outcome.trace or outcome.error)
        return outcome
    record.write_job(work.folder, outcome)
    work.trace.unlink(missing_ok=True)
    shutil.rmtree(record.work_folder(work.folder, work.arm, work.seed), ignore_errors=True)
    return Done(work.arm, work.seed)


def compute(
    work: Work, threads: int | None = None, *, start: Callable[[Work], Any] | None = None, live: bool = True
) -> JobResult | Failure:
    """Compute one job; whatever it raises becomes a failure, so that it does not take the others down.

    Args:
        work: The job.
        threads: torch threads to compute with; ``None``: as many as there are.
        start: How to get what the arms of a seed share; ``None``: :func:`shared_start`.
        live: Write the rows to a file as they come, for those who watch.
    """
    with machine.threads(threads):
        try:
            return _compute(work, start or shared_start, live)
        except (Exception, SystemExit) as error:
            usage = isinstance(error, UsageError)
            return Failure(work.arm, work.seed, f"{type(error).__name__}: {error}", traceback.format_exc(), usage)


def _compute(work: Work, start: Callable[[Work], Any], live: bool) -> JobResult:
    experiment = work.experiment
    folder = record.work_folder(work.folder, work.arm, work.seed)
    folder.mkdir(parents=True, exist_ok=True)
    rows = folder / "rows.jsonl"
    if live:
        rows.unlink(missing_ok=True)  # a job that resumes records its rows again
    with machine.Stopwatch() as watch:
        device = torch.device(default_device())
        job = Job(work.arm, work.seed, Recorder(live=rows if live else None), folder, device, start=start(work))
        returned = experiment.job(work.config, job)
        metrics, scores = record.plain_metrics(returned)
    missing = {metric.name for metric in experiment.metrics(work.config)} - returned.keys()
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


def shared_start(work: Work) -> Any:
    """What the arms of a seed share: made by whoever needs it first, read from disk by all."""
    if work.experiment.start is None:
        return None
    with locked(_lock_of(start_folder(work)), wait=True):
        if not has_start(work):
            start_folder(work).mkdir(parents=True, exist_ok=True)
            write_start(work, work.experiment.start(work.config, work.seed, start_folder(work)))
    return read_start(work)


def start_folder(work: Work) -> Path:
    """Where what the arms of a seed share is made."""
    return record.work_folder(work.folder, "start", work.seed)


def read_start(work: Work) -> Any:
    """What the arms of a seed share."""
    return torch.load(_start_file(work), map_location="cpu", weights_only=True)


def has_start(work: Work) -> bool:
    """Whether what the arms of a seed share is there; a file that is cut off or foreign is removed."""
    try:
        read_start(work)
    except FileNotFoundError:
        return False
    except Exception:
        _start_file(work).unlink()
        return False
    return True


def write_start(work: Work, data: Any) -> None:
    """Store what the arms of a seed share; the file appears whole."""
    with file_atomically(_start_file(work)) as fresh:
        torch.save(data, fresh)
    shutil.rmtree(start_folder(work), ignore_errors=True)


def _start_file(work: Work) -> Path:
    return work.folder / "start" / f"seed-{work.seed}.pt"
