"""Run an experiment: every (arm, seed) is one job, done once, in parallel, and never again.

A job is a pure function of (config, arm, seed). Its files appear as a whole when it ends, so killing a run loses the
jobs in flight at most, and a second run with the same configuration does only what is missing.
"""

import contextlib
import os
import shutil
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch

from weightsmith.core.errors import UsageError, require, unknown
from weightsmith.lab import record
from weightsmith.lab.claim import Experiment
from weightsmith.lab.record import JobResult, Recorder, Stopwatch

Engine = Literal["local", "ray"]
Job = tuple[str, int]


@dataclass(frozen=True, slots=True)
class Failure:
    """A job that raised: the others go on, and its traceback is kept beside the results."""

    arm: str
    seed: int
    error: str
    trace: str


@dataclass(slots=True)
class Run:
    """What :func:`run` did.

    Attributes:
        folder: The run folder, ``<out>/<slug>/<config hash>``.
        skipped: Jobs that were finished before.
        finished: Jobs that this call finished.
        failures: Jobs that raised.
    """

    folder: Path
    skipped: list[Job] = field(default_factory=list)
    finished: list[Job] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)


def run(
    experiment: Experiment[Any],
    config: Any,
    *,
    preset: str = "laptop",
    seeds: int | Sequence[int] = 3,
    arms: Sequence[str] = (),
    out: Path = Path("runs"),
    engine: Engine = "local",
    address: str | None = None,
    workers: int | None = None,
    watch: Callable[[Run, Path | None, int], contextlib.AbstractContextManager[Callable[[], None]]] | None = None,
) -> Run:
    """Do every job of an experiment that is not done yet.

    Args:
        experiment: What to compare.
        config: A complete configuration, usually one of ``experiment.presets`` with fields replaced.
        preset: The name of the preset that ``config`` started from, for the report.
        seeds: How many (``0 .. seeds - 1``), or which.
        arms: Names of the arms to run; all of them when empty. Claims about arms that never ran are left out.
        out: Parent of the run folders.
        engine: ``"local"``: a pool of processes, one torch thread each when there are several; ``"ray"``: a Ray
            cluster, one CPU (and one GPU where there are any) per job.
        address: Address of a Ray cluster; ``None``: start one on this machine.
        workers: Jobs at a time; ``None``: one per CPU core, or one per GPU.
        watch: ``watch(run, live, total)`` gives a context manager around the work, whose value is called after every
            job; ``live`` is the folder where running jobs write their rows as they go, if they can.

    Returns:
        What was done and where. Jobs that raised are listed, not raised.

    Raises:
        UsageError: The configuration cannot run; nothing has been written.
        OSError: ``out`` cannot be written.
    """
    if engine not in ("local", "ray"):
        raise unknown("engine", engine, ("local", "ray"))
    wanted = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not wanted or min(wanted) < 0 or len(set(wanted)) < len(wanted):
        raise UsageError(f"seeds must be a positive number or different numbers of at least 0, got {seeds!r}")
    if workers is not None and workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}")
    experiment.check(config)
    description = experiment.describe(config)
    names = [arm["name"] for arm in description["arms"]]
    for name in arms:
        if name not in names:
            raise unknown("arm", name, names)
    jobs = [(name, seed) for seed in wanted for name in names if not arms or name in arms]

    result = Run(out / experiment.slug / record.config_hash(config))
    distributed = int(os.environ.get("WORLD_SIZE", "1")) > 1
    leader = int(os.environ.get("RANK", "0")) == 0
    done = _finished(result.folder)
    result.skipped = [job for job in jobs if job in done]
    pending = [job for job in jobs if job not in result.skipped]
    if leader:
        _remove_leftovers(result.folder)
        record.write_run(
            result.folder,
            {
                **_only(description, {*arms, *(arm for arm, _ in done)} if arms else set(names)),
                "preset": preset,
                "config": asdict(config),
                "config_hash": record.config_hash(config),
                "seeds": sorted({*wanted, *(seed for _, seed in done)}),
                "versions": record.versions(),
                "hardware": record.hardware(),
            },
        )
    call = partial(_job, experiment, config)
    with tempfile.TemporaryDirectory(prefix="weightsmith-live-") as live:
        if distributed:
            outcomes = _in_this_process(call, pending)
        elif engine == "ray":
            outcomes = _on_ray(call, pending, address, workers)
        else:
            outcomes = _in_processes(partial(call, live=Path(live)), pending, workers)
        watching = watch(result, Path(live) if engine == "local" else None, len(jobs)) if watch and leader else None
        with watching or contextlib.nullcontext(lambda: None) as step:
            for outcome in outcomes:
                if leader:
                    _keep(result, outcome)
                step()
    return result


def _job(
    experiment: Experiment[Any], config: Any, arm: str, seed: int, threads: int | None = None, live: Path | None = None
) -> JobResult | Failure:
    before = torch.get_num_threads()
    recorder = Recorder(live=live / f"{arm} seed {seed}.jsonl" if live else None)
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        with Stopwatch() as watch:
            metrics = record.finite(experiment.job(config, arm, seed, recorder))
        missing = {metric.name for metric in experiment.metrics} - metrics.keys()
        if missing:
            raise ValueError(f"the job did not return {', '.join(sorted(missing))}")
        return JobResult(
            arm=arm,
            seed=seed,
            metrics=metrics,
            rows=recorder.rows,
            started=watch.started,
            wall_seconds=watch.seconds,
            peak_memory=watch.peak_memory,
            threads=torch.get_num_threads(),
            versions=record.versions(),
            hardware=record.hardware(),
        )
    except Exception as error:  # one job's error must not take the others down
        return Failure(arm, seed, f"{type(error).__name__}: {error}", traceback.format_exc())
    finally:
        torch.set_num_threads(before)
        if recorder.live is not None:
            recorder.live.unlink(missing_ok=True)


def _in_this_process(call: Callable[..., JobResult | Failure], jobs: Sequence[Job]) -> Iterator[JobResult | Failure]:
    for arm, seed in jobs:
        yield call(arm, seed)


def _in_processes(
    call: Callable[..., JobResult | Failure], jobs: Sequence[Job], workers: int | None
) -> Iterator[JobResult | Failure]:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    most = workers or (1 if torch.cuda.is_available() else cores)
    count = min(most, len(jobs))
    if count <= 1:
        return _in_this_process(call, jobs)
    import joblib

    pool = joblib.Parallel(n_jobs=count, backend="loky", return_as="generator_unordered", batch_size=1)
    return pool(joblib.delayed(_orphan_ends)(call, os.getpid(), arm, seed) for arm, seed in jobs)


def _orphan_ends(call: Callable[..., JobResult | Failure], parent: int, arm: str, seed: int) -> JobResult | Failure:
    _end_with(parent)
    return call(arm, seed, threads=1)


def _end_with(parent: int) -> None:
    # a pool's workers outlive a parent that was killed with -9, and would go on computing for nobody
    import threading

    name = f"end with {parent}"
    if any(thread.name == name for thread in threading.enumerate()):
        return

    def watch() -> None:
        while True:
            try:
                os.kill(parent, 0)
            except ProcessLookupError:
                os._exit(1)
            time.sleep(1.0)

    threading.Thread(target=watch, name=name, daemon=True).start()


def _call(call: Callable[..., JobResult | Failure], arm: str, seed: int) -> JobResult | Failure:
    return call(arm, seed)


def _on_ray(
    call: Callable[..., JobResult | Failure], jobs: Sequence[Job], address: str | None, workers: int | None
) -> Iterator[JobResult | Failure]:
    ray = require("ray", extra="search", purpose="--engine ray")
    own = not ray.is_initialized()
    if own:
        passed_on = {name: value for name, value in os.environ.items() if name.startswith(("WEIGHTSMITH_", "HF_"))}
        options: Mapping[str, Any] = {"num_cpus": workers} if address is None else {}
        try:
            ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                runtime_env={"env_vars": passed_on},
                logging_level="ERROR",
                **options,
            )
        except ConnectionError as error:
            raise UsageError(f"address {address!r} does not answer as a Ray cluster: {error}") from error
    try:
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        remote = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(_call)
        shared = ray.put(partial(call, threads=None if gpus else 1))
        waiting = {remote.remote(shared, arm, seed): (arm, seed) for arm, seed in jobs}
        while waiting:
            (done,), _ = ray.wait(list(waiting), num_returns=1)
            arm, seed = waiting.pop(done)
            try:
                yield ray.get(done)
            except ray.exceptions.RayError as error:
                yield Failure(arm, seed, f"{type(error).__name__}: {error}", traceback.format_exc())
    finally:
        if own:
            ray.shutdown()


def _keep(result: Run, outcome: JobResult | Failure) -> None:
    trace = result.folder / outcome.arm / f"seed-{outcome.seed}.error.txt"
    if isinstance(outcome, Failure):
        record.write_atomically(trace, outcome.trace)
        result.failures.append(outcome)
        return
    record.write_job(result.folder, outcome)
    trace.unlink(missing_ok=True)
    result.finished.append((outcome.arm, outcome.seed))


def _remove_leftovers(folder: Path) -> None:
    # what a killed run left half written; an hour's grace, as another process may be writing now
    for path in [*folder.glob(".*.tmp"), *folder.glob("*/.*.tmp")]:
        if time.time() - path.stat().st_mtime > 3600:
            shutil.rmtree(path) if path.is_dir() else path.unlink()


def _only(description: Mapping[str, Any], arms: set[str]) -> dict[str, Any]:
    return {
        **description,
        "arms": [arm for arm in description["arms"] if arm["name"] in arms],
        "claims": [claim for claim in description["claims"] if {claim["winner"], claim["loser"]} <= arms],
    }


def _finished(folder: Path) -> set[Job]:
    jobs = [path.parent for path in folder.glob("*/seed-*/result.json")]
    return {(job.parent.name, int(job.name.removeprefix("seed-"))) for job in jobs}
