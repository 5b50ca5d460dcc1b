"""Who evaluates: this process, worker processes on this machine, or the workers of a Ray cluster.

Weights travel once per generation. A worker that dies is replaced and its individual evaluated again.
"""

import contextlib
import os
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from weightsmith.core.errors import UsageError, reason, require
from weightsmith.search.evaluation import Evaluation, Individual, Values, Weights

EvaluateAll = Callable[[Weights, Sequence[Individual]], Iterator[tuple[int, Values]]]
"""``(weights, individuals) -> (slot, values)`` in the order in which they get ready."""

_MOST_DEATHS = 3


class EvaluationFailed(RuntimeError):
    """The user's function raised, or killed its process again and again; the message holds the genotype."""


@dataclass(frozen=True, slots=True)
class Resources:
    """What evaluations run on.

    Attributes:
        engine: ``"local"`` or ``"ray"``.
        workers: Processes; ``None``: this one (local), as many as the cluster has room for (Ray).
        address: Of a running cluster, for example ``"auto"``; ``None``: Ray starts one on this machine.
        threads: Torch threads of an evaluation, and CPUs that Ray reserves. Results may depend on it, not on `workers`.
        gpus: Share of a GPU per Ray worker.
        device: Where workers put their copy of the model, for example ``"cuda"``; ``""``: where the model is.
    """

    engine: str = "local"
    workers: int | None = None
    address: str | None = None
    threads: int = 1
    gpus: float = 0.0
    device: str = ""

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            UsageError: Names the argument.
        """
        if self.engine not in ("local", "ray"):
            raise UsageError(f"engine must be 'local' or 'ray', got {self.engine!r}")
        if self.address is not None and self.engine != "ray":
            raise UsageError(f"address is for engine='ray', got {self.address!r} with engine='local'")
        for name in ("workers", "threads"):
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < 1):
                raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")
        if self.gpus < 0:
            raise UsageError(f"gpus must be at least 0, got {self.gpus}")


@contextlib.contextmanager
def workers_for(evaluate: Callable[..., Any], model: Any, resources: Resources) -> Iterator[EvaluateAll]:
    """Start what evaluates, for as long as the block runs."""
    options = {"threads": resources.threads, "device": resources.device}
    if resources.engine == "local" and (resources.workers or 1) == 1:
        yield _here(Evaluation(evaluate, model, **options))  # type: ignore[arg-type]
        return
    try:
        payload = cloudpickle.dumps((evaluate, model, options))
    except Exception as error:  # whatever user code raises while it is pickled
        raise UsageError(
            f"evaluate and model must be picklable to be sent to workers, got {reason(error)}: pass workers=1, or a "
            "model that holds only what is evaluated"
        ) from error
    with _processes(payload, resources) if resources.engine == "local" else _actors(payload, resources) as evaluate_all:
        yield evaluate_all


def _here(evaluation: Evaluation) -> EvaluateAll:
    def evaluate_all(weights: Weights, individuals: Sequence[Individual]) -> Iterator[tuple[int, Values]]:
        evaluation.load(weights)
        for individual in individuals:
            try:
                yield individual.slot, evaluation(individual)
            except UsageError:
                raise
            except Exception as error:
                raise EvaluationFailed(f"evaluating {individual.genotype} failed: {reason(error)}") from error

    return evaluate_all


def outcome(evaluation: Evaluation, individual: Individual) -> tuple[str, Any]:
    """Evaluate in a worker: ``("done", values)``, or what went wrong as text that any process can read."""
    try:
        return "done", evaluation(individual)
    except UsageError as error:
        return "refused", str(error)
    except Exception as error:
        return "failed", f"{reason(error)}\n{traceback.format_exc()}"


def _values(individual: Individual, kind: str, found: Any) -> Values:
    if kind == "refused":
        raise UsageError(found)
    if kind == "failed":
        raise EvaluationFailed(f"evaluating {individual.genotype} failed: {found}")
    values: Values = found
    return values


class _Deaths:
    """Counts how often the worker of an individual died."""

    def __init__(self) -> None:
        self._deaths: dict[int, int] = {}

    def count(self, individual: Individual, words: str) -> None:
        self._deaths[individual.slot] = deaths = self._deaths.get(individual.slot, 0) + 1
        if deaths >= _MOST_DEATHS:
            raise EvaluationFailed(f"{deaths} workers died while evaluating {individual.genotype}: {words}")


# --- processes on this machine ------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Process:
    process: "subprocess.Popen[bytes]"
    pipe: "Connection[Any, Any]"
    busy: Individual | None = None

    def stop(self) -> None:
        self.pipe.close()  # a worker ends when its pipe does
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _stop(workers: Sequence[_Process]) -> None:
    for worker in workers:
        worker.stop()


def _start(payload: bytes) -> _Process:
    ours, theirs = Pipe()
    with theirs:
        paths = os.pathsep.join(dict.fromkeys([*filter(None, sys.path), str(Path.cwd())]))
        command = [sys.executable, "-m", "weightsmith.search.worker", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=os.environ | {"PYTHONPATH": paths})
    ours.send_bytes(payload)
    return _Process(process, ours)


@contextlib.contextmanager
def _processes(payload: bytes, resources: Resources) -> Iterator[EvaluateAll]:
    workers: list[_Process] = []
    with tempfile.TemporaryDirectory(prefix="weightsmith-search-") as folder, contextlib.ExitStack() as stack:
        stack.callback(_stop, workers)
        number = 0

        def evaluate_all(weights: Weights, individuals: Sequence[Individual]) -> Iterator[tuple[int, Values]]:
            nonlocal number
            number += 1
            file = Path(folder) / f"weights-{number}.pt"
            torch.save(dict(weights), file)
            (Path(folder) / f"weights-{number - 1}.pt").unlink(missing_ok=True)
            queue, deaths = list(individuals), _Deaths()
            while len(workers) < min(resources.workers or 1, len(queue)):
                workers.append(_start(payload))
            while queue or any(worker.busy for worker in workers):
                for place, worker in enumerate(workers):
                    if worker.busy is None and queue:
                        try:
                            worker.pipe.send((str(file), queue[0]))
                        except OSError:  # it died while idle
                            worker.stop()
                            deaths.count(queue[0], "it ended before the evaluation began")
                            workers[place] = _start(payload)
                            continue
                        worker.busy = queue.pop(0)
                waiting = {worker.pipe: place for place, worker in enumerate(workers) if worker.busy is not None}
                for pipe in wait(list(waiting), timeout=1.0):
                    place = waiting[pipe]  # type: ignore[index]
                    worker, individual = workers[place], workers[place].busy
                    assert individual is not None
                    try:
                        kind, found = worker.pipe.recv()
                    except (EOFError, OSError):
                        worker.stop()
                        deaths.count(individual, f"exit code {worker.process.returncode}")
                        workers[place] = _start(payload)
                        queue.insert(0, individual)
                        continue
                    worker.busy = None
                    yield individual.slot, _values(individual, kind, found)

        yield evaluate_all


# --- a Ray cluster -------------------------------------------------------------------------------------------------


class _Actor:
    """What lives in a Ray worker; it keeps the weights of the last generation that it has seen."""

    def __init__(self, payload: bytes) -> None:
        evaluate, model, options = cloudpickle.loads(payload)
        self._evaluation, self._version = Evaluation(evaluate, model, **options), -1

    def ready(self) -> bool:
        return True

    def evaluate(self, version: int, weights: list[Any], individual: Individual) -> tuple[str, Any]:
        if version != self._version:
            import ray

            self._evaluation.load({name: torch.as_tensor(value) for name, value in ray.get(weights[0]).items()})
            self._version = version
        return outcome(self._evaluation, individual)


@contextlib.contextmanager
def _actors(payload: bytes, resources: Resources) -> Iterator[EvaluateAll]:
    ray = require("ray", extra="search", purpose="engine='ray'")
    with contextlib.ExitStack() as stack:
        if not ray.is_initialized():
            _connect(ray, resources)
            stack.callback(ray.shutdown)
        cluster = ray.cluster_resources()
        room = int(cluster.get("CPU", 1)) // resources.threads
        if resources.gpus:
            room = min(room, int(cluster.get("GPU", 0) / resources.gpus))
        if room < 1:
            raise UsageError(
                f"the Ray cluster has no room for a worker of {resources.threads} CPUs and {resources.gpus:g} GPUs: "
                "lower threads or gpus"
            )
        number = min(resources.workers or room, room)
        kept = ray.put(payload)
        remote = ray.remote(num_cpus=resources.threads, num_gpus=resources.gpus)(_Actor)
        actors: list[Any] = []
        stack.callback(lambda: [ray.kill(actor) for actor in actors if actor is not None])
        version = 0

        def evaluate_all(weights: Weights, individuals: Sequence[Individual]) -> Iterator[tuple[int, Values]]:
            nonlocal version
            version += 1
            shipped = ray.put({name: value.cpu() for name, value in weights.items()})
            queue, deaths = list(individuals), _Deaths()
            running: dict[Any, tuple[int, Individual | None]] = {}

            def start(place: int) -> None:
                # used once it answers: a worker that the cluster has no room for now must not hold up the others
                actors[place] = remote.remote(kept)
                running[actors[place].ready.remote()] = place, None

            for place in range(len(actors), min(number, len(queue))):
                actors.append(None)
                start(place)
            idle = [place for place in range(len(actors)) if all(place != busy for busy, _ in running.values())]
            left = len(queue)
            while left:
                while queue and idle:
                    place, individual = idle.pop(0), queue.pop(0)
                    running[actors[place].evaluate.remote(version, [shipped], individual)] = place, individual
                (done,), _ = ray.wait(list(running), num_returns=1)
                place, asked = running.pop(done)
                try:
                    found = ray.get(done)
                except (ray.exceptions.RayActorError, ray.exceptions.WorkerCrashedError) as error:
                    if asked is not None:
                        queue.insert(0, asked)
                    deaths.count(asked or queue[0], reason(error))
                    start(place)
                    continue
                idle.append(place)
                if asked is not None:
                    left -= 1
                    yield asked.slot, _values(asked, *found)

        yield evaluate_all


def _connect(ray: Any, resources: Resources) -> None:
    paths = os.pathsep.join(dict.fromkeys([*filter(None, sys.path), str(Path.cwd())]))
    options: dict[str, Any] = {}
    if resources.address is None and resources.workers is not None:
        options["num_cpus"] = resources.workers * resources.threads
    try:
        ray.init(
            address=resources.address,
            include_dashboard=False,
            log_to_driver=False,
            logging_level="ERROR",
            runtime_env={"env_vars": {"PYTHONPATH": paths}},
            **options,
        )
    except ConnectionError as error:
        raise UsageError(f"address {resources.address!r} does not answer as a Ray cluster: {error}") from error
