"""Run an experiment: every (arm, seed) is one job, done once, in parallel, and never again.

A job is a function of configuration, arm, seed and fingerprint. Its files appear as a whole when it ends, so killing a
run loses what its jobs have trained since their last checkpoints, and the same command does only what is missing. Seeds
come in looks: after each the claims are judged, and the run stops when the primary ones are decided.
"""

import contextlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, Literal

from weightsmith.core.errors import UsageError, unknown
from weightsmith.core.own_code import digest
from weightsmith.lab import fingerprint, machine, record
from weightsmith.lab.engines import Failure, Work, engine_named
from weightsmith.lab.engines.base import finished, remove_leftovers
from weightsmith.lab.engines.distributed import from_leader, is_leader
from weightsmith.lab.engines.local import worker_count
from weightsmith.lab.experiment import Experiment
from weightsmith.lab.identity import differing
from weightsmith.lab.probe import Probe, probe
from weightsmith.lab.record import JobResult
from weightsmith.lab.stats import Plan, decided, judge
from weightsmith.lab.task import Task
from weightsmith.lab.tasks import shared_task

JobName = tuple[str, int]
Watch = Callable[["Run", int], contextlib.AbstractContextManager[Callable[[], None]]]


@dataclass(slots=True)
class Run:
    """What `run` did.

    Attributes:
        folder: The run folder, ``<out>/<slug>/<key>``.
        skipped: Jobs that were finished before.
        finished: Jobs that this call finished.
        failures: Jobs that raised, were killed or took too long.
        news: What the user should know, a line each: why nothing is reused, which files were put aside.
    """

    folder: Path
    skipped: list[JobName] = field(default_factory=list)
    finished: list[JobName] = field(default_factory=list)
    failures: list[Failure] = field(default_factory=list)
    news: list[str] = field(default_factory=list)


def run(
    experiment: Experiment[Any],
    config: Any,
    *,
    preset: str = "laptop",
    seeds: Literal["auto"] | int | Sequence[int] = "auto",
    arms: Sequence[str] = (),
    out: Path = Path("runs"),
    engine: str = "local",
    address: str | None = None,
    workers: int | None = None,
    time_limit: float | None = None,
    fresh: bool = False,
    announce: Callable[["Estimate"], None] | None = None,
    watch: Watch | None = None,
) -> Run:
    """Do every job of an experiment that is not done yet.

    Args:
        experiment: What to compare.
        config: A complete configuration, usually one of ``experiment.presets`` with fields replaced.
        preset: The name of the preset that ``config`` started from, for the report.
        seeds: ``"auto"``: 3, then 5, 10 and 20 seeds, until the primary claims are decided; or how many
            (``0 .. seeds - 1``), or which.
        arms: Names of the arms to run; all of them when empty. The declared claims stay the family that is judged.
        out: Parent of the run folders.
        engine: ``"local"``: a pool of processes; ``"ray"``: a Ray cluster. Under ``torchrun`` or ``accelerate launch``
            every job is done by all processes together.
        address: Address of a Ray cluster; ``None``: start one on this machine.
        workers: Jobs at a time; ``None``: one per CPU core, or one per GPU.
        time_limit: Seconds that a job may take; ``None``: any.
        fresh: Remove what earlier runs with the same key have left, and start over.
        announce: Called with what the run will cost, before the first job.
        watch: ``watch(run, total)`` gives a context manager around the work, whose value is called after every job.

    Returns:
        What was done and where. Jobs that failed are listed, not raised.

    Raises:
        UsageError: The configuration cannot run, and nothing has been written; or the first job to end found so, and
            the other jobs are not run.
        OSError: ``out`` cannot be written.
    """
    plan, batches = _plan(seeds)
    if workers is not None and workers < 1:
        raise UsageError(f"workers must be at least 1, got {workers}")
    if time_limit is not None and not time_limit > 0:
        raise UsageError(f"time_limit must be above 0 seconds, got {time_limit}")
    chosen = engine_named(
        engine, address=address, workers=workers, time_limit=time_limit, resources=experiment.resources
    )
    description = experiment.describe(config)
    wanted, left_out = _wanted(experiment, config, arms)
    task, cost = check(experiment, config)
    identity = fingerprint.identity(experiment, config, task.fingerprint if task is not None else "")
    result = Run(out / experiment.slug / digest(*identity.values()))
    if announce is not None and is_leader():
        found = _estimate(experiment, config, wanted, batches, workers, cost)
        announce(found if found.seconds is not None else _by_finished(found, result.folder, wanted, batches, fresh))
    if fresh and is_leader() and result.folder.exists():
        shutil.rmtree(result.folder)
    if is_leader() and result.folder.is_dir():
        remove_leftovers(result.folder)
    result.news += _why_new(result.folder, identity)
    if task is not None and "validation" in task.facts:
        result.news.append(f"validation: {task.facts['validation']}")
    description |= {
        "preset": preset,
        "config": asdict(config),
        "fingerprint": dict(identity),
        "plan": asdict(plan),
        "left_out": left_out,
        "task": _told(task, cost) if task is not None and cost is not None else _stated(experiment, config),
        "versions": machine.versions(),
        "hardware": machine.hardware(),
    }

    total = len(wanted) * max(len(batch) for batch in batches)
    watching = watch(result, total) if watch and is_leader() else contextlib.nullcontext(lambda: None)
    with watching as step, chosen as do_all:
        for batch in batches:
            works = [Work(experiment, config, result.folder, name, seed) for seed in batch for name in wanted]
            if is_leader():
                record.write_run(result.folder, {**description, "seeds": sorted({*batch, *_seeds(result.folder)})})
            done = _finished(works, result)
            step()
            for outcome in do_all([work for work in works if (work.arm, work.seed) not in done]):
                if isinstance(outcome, Failure):
                    if outcome.usage and not (result.failures or result.finished or result.skipped):
                        raise _refused(outcome, result.folder)
                    result.failures.append(outcome)
                else:
                    result.finished.append((outcome.arm, outcome.seed))
                step()
            if result.failures or (len(batches) > 1 and _decided(experiment, config, result.folder, plan, batch)):
                break
    return result


def _refused(failure: Failure, folder: Path) -> UsageError:
    details = folder / failure.arm / f"seed-{failure.seed}.error.txt"
    error = failure.error.removeprefix(f"{UsageError.__name__}: ").rstrip()
    return UsageError(f"{failure.arm}, seed {failure.seed}: {error}\n  the other jobs are not run; details: {details}")


def check(experiment: Experiment[Any], config: Any) -> tuple[Task | None, Probe | None]:
    """Refuse a configuration that cannot run, and put one real batch through the model.

    Returns:
        The task and what a step of it costs; ``None`` when the experiment has no task.

    Raises:
        UsageError: What is wrong and what to do.
    """
    experiment.check(config)
    if experiment.task is None:
        return None, None
    shared_task.cache_clear()  # in a notebook the data may have changed since the last run
    task = experiment.task(config)
    with machine.threads(experiment.resources.cpus):
        return task, probe(task, getattr(config, "batch_size", None))


@dataclass(frozen=True, slots=True)
class Estimate:
    """What a run will cost, before anything is paid.

    Attributes:
        jobs: Number of jobs by number of seeds, one entry per look.
        seconds: Time by number of seeds; ``None`` where nothing tells it. One timed step of the model is multiplied by
            the number of steps; without one, the jobs that are not done yet take as long as finished ones of their arm.
        memory: Peak memory of a job, bytes; ``None`` where it cannot be told.
        workers: Jobs at a time.
        whole: Whether the time holds evaluations too.
        finished: Number of finished jobs that the time is taken from; 0: it is not taken from jobs.
    """

    jobs: dict[int, int]
    seconds: dict[int, float] | None
    memory: int | None
    workers: int
    whole: bool = False
    finished: int = 0


def estimate(
    experiment: Experiment[Any],
    config: Any,
    *,
    seeds: Literal["auto"] | int | Sequence[int] = "auto",
    arms: Sequence[str] = (),
    workers: int | None = None,
    out: Path = Path("runs"),
    fresh: bool = False,
) -> Estimate:
    """Tell what `run` with these arguments would cost; checks the configuration as it does.

    Raises:
        UsageError: The configuration cannot run.
    """
    _, batches = _plan(seeds)
    wanted, _ = _wanted(experiment, config, arms)
    task, cost = check(experiment, config)
    found = _estimate(experiment, config, wanted, batches, workers, cost)
    if found.seconds is not None:
        return found
    identity = fingerprint.identity(experiment, config, task.fingerprint if task is not None else "")
    return _by_finished(found, out / experiment.slug / digest(*identity.values()), wanted, batches, fresh)


def _estimate(
    experiment: Experiment[Any],
    config: Any,
    arms: Sequence[str],
    batches: Sequence[Sequence[int]],
    workers: int | None,
    cost: Probe | None,
) -> Estimate:
    at_a_time = workers or worker_count(experiment.resources)
    counts = [len(batch) for batch in batches]
    seconds = None
    each = None if cost is None else cost.seconds
    if experiment.step_seconds is not None:
        with machine.threads(experiment.resources.cpus):
            each = experiment.step_seconds(config)
    if each is not None and experiment.steps is not None:
        per_seed = each * sum(experiment.steps(config, arm) for arm in arms)
        seconds = {count: per_seed * count / at_a_time for count in counts}
    memory = None if cost is None else cost.memory
    jobs = {count: count * len(arms) for count in counts}
    return Estimate(jobs, seconds, memory, at_a_time, experiment.step_seconds is not None)


def _by_finished(
    found: Estimate, folder: Path, arms: Sequence[str], batches: Sequence[Sequence[int]], fresh: bool
) -> Estimate:
    """The same with the time that finished jobs in the run folder tell, if there are any."""
    jobs = [job for job in record.read_jobs(folder) if isinstance(job, JobResult) and job.arm in arms]
    if not jobs:
        return found
    reused = set() if fresh else {(job.arm, job.seed) for job in jobs}
    each = {arm: fmean(job.wall_seconds for job in _of(arm, jobs) or jobs) for arm in arms}
    seconds = {
        len(batch): sum(each[arm] for seed in batch for arm in arms if (arm, seed) not in reused) / found.workers
        for batch in batches
    }
    return replace(found, seconds=seconds, whole=True, finished=len(jobs))


def _of(arm: str, jobs: Sequence[JobResult]) -> list[JobResult]:
    return [job for job in jobs if job.arm == arm]


def _wanted(experiment: Experiment[Any], config: Any, arms: Sequence[str]) -> tuple[list[str], list[str]]:
    """Names of the arms that run, and of those that are left out."""
    names = [arm.name for arm in experiment.arms(config)]
    for name in arms:
        if name not in names:
            raise unknown("arm", name, names)
    wanted = [name for name in names if not arms or name in arms]
    return wanted, [name for name in names if name not in wanted]


def seeds_of(text: str) -> Literal["auto"] | int | list[int]:
    """Read ``"auto"``, ``"5"`` or ``"0,3,4"``.

    Raises:
        UsageError: It is none of these.
    """
    if text == "auto":
        return "auto"
    try:
        numbers = [int(part) for part in text.split(",")]
    except ValueError as error:
        raise UsageError(f"seeds must be auto, a number, or numbers joined by commas, got {text!r}") from error
    return numbers if "," in text else numbers[0]


def _told(task: Task, cost: Probe) -> dict[str, Any]:
    facts = dict(task.facts)
    facts["model"] = f"{facts.get('model', 'your own')}, {cost.parameters:,} parameters"
    return {"name": task.name, "rows": task.rows, "facts": facts}


def _stated(experiment: Experiment[Any], config: Any) -> dict[str, Any] | None:
    """What an experiment without a task says that its jobs run on, in the form of a task's description."""
    return None if experiment.facts is None else {"name": "", "rows": {}, "facts": dict(experiment.facts(config))}


def _plan(seeds: Literal["auto"] | int | Sequence[int]) -> tuple[Plan, list[list[int]]]:
    """The rule by which the run stops, and the seeds of each look."""
    if seeds == "auto":
        plan = Plan()
        return plan, [list(range(look)) for look in plan.looks]
    chosen = list(range(seeds)) if isinstance(seeds, int) else list(seeds)
    if not chosen or min(chosen) < 0 or len(set(chosen)) < len(chosen):
        raise UsageError(
            f"seeds must be 'auto', a number of at least 1, or different numbers of at least 0, got {seeds!r}"
        )
    return Plan(looks=(len(chosen),)), [chosen]


def _decided(experiment: Experiment[Any], config: Any, folder: Path, plan: Plan, seeds: Sequence[int]) -> bool:
    jobs = [job for job in record.read_jobs(folder) if isinstance(job, JobResult) and job.seed in seeds]
    return decided(judge(experiment.claims(config), experiment.metrics(config), record.results_of(jobs), plan=plan))


def _finished(works: Sequence[Work], result: Run) -> set[JobName]:
    known = {*result.finished, *result.skipped}
    asked = [work for work in works if (work.arm, work.seed) not in known]
    there = from_leader(lambda: [finished(work) for work in asked])
    result.skipped += [(work.arm, work.seed) for work, done in zip(asked, there, strict=True) if done]
    return {*result.finished, *result.skipped}


def _seeds(folder: Path) -> set[int]:
    return {
        int(path.parent.name.removeprefix("seed-"))
        for path in folder.glob("*/seed-*/result.json")
        if path.parent.name[5:].isdigit()
    }


def _why_new(folder: Path, identity: Mapping[str, str]) -> list[str]:
    """When the same configuration has been run before: what has changed since, in one line."""
    if folder.exists():
        return []
    for other in sorted(folder.parent.glob("*/run.json"), key=lambda path: path.stat().st_mtime, reverse=True):
        try:
            before = record.read_run(other.parent).get("fingerprint", {})
        except UsageError:
            continue
        if before.get("configuration") == identity["configuration"]:
            parts = " and ".join(differing(before, identity))
            return [f"{parts} changed since {other.parent}: nothing of it is reused"]
    return []
