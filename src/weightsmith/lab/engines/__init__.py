"""Where jobs are done: by a pool of processes, on a Ray cluster, or by several processes together each.

An engine is a context manager around a function that takes jobs and gives their outcomes as they come, so that a pool
stays up from one look at the data to the next.
"""

from contextlib import AbstractContextManager
from functools import partial

from weightsmith.core.errors import unknown
from weightsmith.lab.engines.base import Done, Engine, Failure, Work
from weightsmith.lab.engines.distributed import is_distributed, join, together
from weightsmith.lab.engines.local import local
from weightsmith.lab.engines.ray import ray_cluster
from weightsmith.lab.experiment import Resources

__all__ = ["Done", "Engine", "Failure", "Work", "engine_named"]


def engine_named(
    name: str,
    *,
    resources: Resources,
    workers: int | None = None,
    time_limit: float | None = None,
    address: str | None = None,
) -> AbstractContextManager[Engine]:
    """Look up an engine.

    Args:
        name: ``"local"`` or ``"ray"``; several processes started together do every job together whatever the name.
        resources: What one job occupies.
        workers: Jobs at a time; ``None``: as many as fit.
        time_limit: Seconds that a job may take; ``None``: any.
        address: Of a Ray cluster; ``None``: start one here.

    Raises:
        UsageError: The name is not known.
    """
    engines = {
        "local": partial(local, resources=resources, workers=workers, time_limit=time_limit),
        "ray": partial(ray_cluster, resources=resources, workers=workers, time_limit=time_limit, address=address),
    }
    if name not in engines:
        raise unknown("engine", name, engines)
    if is_distributed():
        join()  # before anything else asks Accelerate how many processes there are
        return together()
    return engines[name]()
