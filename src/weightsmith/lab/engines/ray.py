"""A Ray cluster: one that is there, or one on this machine."""

import contextlib
import os
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from weightsmith.core.errors import UsageError, require
from weightsmith.lab.engines.base import Busy, Done, Engine, Failure, Work, compute, do, keep
from weightsmith.lab.engines.mirror import mirror, send_by_value
from weightsmith.lab.experiment import Resources
from weightsmith.lab.record import JobResult

_MOST_CODE = 2**20  # bytes of scripts in the current folder that travel along


@contextlib.contextmanager
def ray_cluster(
    *,
    resources: Resources,
    workers: int | None = None,
    time_limit: float | None = None,
    address: str | None = None,
) -> Iterator[Engine]:
    """Do jobs on a Ray cluster; nothing is started before there is something to do."""
    ray = require("ray", extra="search", purpose="--engine ray")
    with contextlib.ExitStack() as stack:

        def do_all(works: Sequence[Work]) -> Iterator[Done | Failure]:
            if not works:
                return
            send_by_value(ray.cloudpickle.register_pickle_by_value)
            if not ray.is_initialized():
                _connect(ray, address, workers)
                stack.callback(ray.shutdown)
            yield from _do_all(ray, works, resources, workers, time_limit)

        yield do_all


def _connect(ray: Any, address: str | None, workers: int | None) -> None:
    here = str(Path.cwd())
    passed_on = {name: value for name, value in os.environ.items() if name.startswith(("WEIGHTSMITH_", "HF_"))}
    passed_on["PYTHONPATH"] = os.pathsep.join(dict.fromkeys(path for path in [*sys.path, here] if path))
    environment: dict[str, Any] = {"env_vars": passed_on}
    options: Mapping[str, Any] = {"num_cpus": workers} if address is None else {}
    with tempfile.TemporaryDirectory(prefix="weightsmith-code-") as folder:
        if address is not None:
            environment |= _code(Path(folder))
        try:
            ray.init(
                address=address,
                include_dashboard=False,
                log_to_driver=False,
                runtime_env=environment,
                logging_level="ERROR",
                **options,
            )
        except ConnectionError as error:
            raise UsageError(f"address {address!r} does not answer as a Ray cluster: {error}") from error


def _code(folder: Path) -> dict[str, Any]:
    """What a machine needs that does not have the user's files: own modules, and the scripts of the current folder."""
    modules, scripts = folder / "modules", folder / "scripts"
    modules.mkdir()
    scripts.mkdir()
    found = list(Path.cwd().glob("*.py"))
    if sum(path.stat().st_size for path in found) <= _MOST_CODE:
        for path in found:
            shutil.copyfile(path, scripts / path.name)
    environment: dict[str, Any] = {"py_modules": [str(path) for path in mirror(modules)]}
    return environment | ({"working_dir": str(scripts)} if any(scripts.iterdir()) else {})


def _do_all(
    ray: Any, works: Sequence[Work], resources: Resources, workers: int | None, time_limit: float | None
) -> Iterator[Done | Failure]:
    gpus = (resources.gpus or 1.0) if ray.cluster_resources().get("GPU") else 0.0
    remote = ray.remote(num_cpus=resources.cpus, num_gpus=gpus, max_retries=3)(_far)
    queue, waiting = list(works), dict[Any, Work]()
    while queue or waiting:
        while queue and (workers is None or len(waiting) < workers):
            work = queue.pop(0)
            waiting[remote.remote(work, resources.cpus, time_limit)] = work
        (done,), _ = ray.wait(list(waiting), num_returns=1)
        work = waiting.pop(done)
        try:
            outcome = ray.get(done)
        except ray.exceptions.RayError as error:
            outcome = Failure(work.arm, work.seed, f"{type(error).__name__}: {error}", traceback.format_exc())
        yield outcome if isinstance(outcome, Done) else keep(work, outcome)


def _far(work: Work, threads: int, time_limit: float | None) -> Done | JobResult | Failure:
    """Do a job on whichever machine this is; where the run folder is not shared, in a temporary one."""
    with _at_most(time_limit):
        if (work.folder / "run.json").is_file():
            done = do(work, threads=threads)
            assert not isinstance(done, Busy)
            return done
        with tempfile.TemporaryDirectory(prefix="weightsmith-job-") as folder:
            return compute(replace(work, folder=Path(folder)), threads)


@contextlib.contextmanager
def _at_most(seconds: float | None) -> Iterator[None]:
    """Raise a TimeoutError in this process's main thread when the block takes longer."""
    if seconds is None:
        yield
        return

    def end(*_: Any) -> None:
        raise TimeoutError(f"it took longer than the time limit of {seconds:g} seconds")

    before = signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
