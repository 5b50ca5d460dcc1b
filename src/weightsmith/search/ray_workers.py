"""Workers of a Ray cluster; weights go to its object store once per generation."""

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import cloudpickle
import torch

from weightsmith.core.errors import UsageError, reason, require
from weightsmith.search.evaluation import Evaluation, Individual, Values, Weights
from weightsmith.search.outcomes import Deaths, EvaluateAll, outcome, values_of
from weightsmith.search.resources import Resources


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
def actors_of(payload: bytes, resources: Resources) -> Iterator[EvaluateAll]:
    """Actors for as long as the block runs, on the cluster that there is or one that is started for it."""
    ray = require("ray", extra="search", purpose="engine='ray'")
    with contextlib.ExitStack() as stack:
        if ray.is_initialized() and ray.get_runtime_context().get_task_id() is not None:
            # a task that waits for a lock keeps its CPU, and workers that never get a place are waited for without end
            raise UsageError(
                "engine='ray' cannot be used within a task of a Ray cluster, such as a job of --engine ray: evaluate "
                "with engine='local' (search_engine=local), or run the jobs with --engine local"
            )
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
            queue, deaths = list(individuals), Deaths()
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
                    yield asked.slot, values_of(asked, *found)

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
