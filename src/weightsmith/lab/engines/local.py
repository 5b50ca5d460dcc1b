"""A pool of processes on this machine.

A worker that is killed costs its own job; the pool puts another in its place. Workers end with their parent, however it
ends: they hold the reading end of a pipe that only the parent can write to.
"""

import concurrent.futures
import contextlib
import fcntl
import multiprocessing
import os
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from multiprocessing.connection import Connection
from pathlib import Path
from typing import IO, Any

import cloudpickle
import torch
from pebble import ProcessExpired, ProcessPool

from weightsmith.lab.engines.base import Busy, Done, Engine, Failure, Work, do, keep
from weightsmith.lab.experiment import Resources

_held: list[IO[str]] = []  # a worker's lock on its GPU, released when the process ends


def worker_count(resources: Resources) -> int:
    """How many jobs fit on this machine at a time."""
    if torch.cuda.is_available():
        share = resources.gpus if 0 < resources.gpus < 1 else 1.0
        return int(torch.cuda.device_count() / share) or 1
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // resources.cpus)


@contextlib.contextmanager
def local(*, resources: Resources, workers: int | None = None, time_limit: float | None = None) -> Iterator[Engine]:
    """Do jobs in a pool of processes; one after the other in this process when there is one worker and no limit."""
    count = workers or worker_count(resources)
    if count == 1 and time_limit is None:
        yield lambda works: _one_by_one(works, resources.cpus)
        return
    with contextlib.ExitStack() as stack:
        pool: list[ProcessPool] = []

        def do_all(works: Sequence[Work]) -> Iterator[Done | Failure]:
            if not works:
                return
            if not pool:  # nothing to do: nothing is started
                pool.append(stack.enter_context(_pool(min(count, len(works)))))
            busy: list[Work] = []
            yield from _round(pool[0], works, resources.cpus, time_limit, busy)
            yield from _round(pool[0], busy, resources.cpus, time_limit, None)

        yield do_all


def _one_by_one(works: Sequence[Work], threads: int) -> Iterator[Done | Failure]:
    busy = []
    for work in works:
        outcome = do(work, threads=threads, wait=False)
        if isinstance(outcome, Busy):
            busy.append(work)
        else:
            yield outcome
    for work in busy:
        outcome = do(work, threads=threads)
        assert not isinstance(outcome, Busy)
        yield outcome


@contextlib.contextmanager
def _pool(count: int) -> Iterator[ProcessPool]:
    context = multiprocessing.get_context("spawn")
    alive, ours = context.Pipe(duplex=False)
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    with tempfile.TemporaryDirectory(prefix="weightsmith-gpus-") as locks, ours, alive:
        share = max(1, round(count / gpus)) if gpus else 1
        pool = ProcessPool(count, context=context, initializer=_begin, initargs=(alive, sys.path, gpus, share, locks))
        try:
            yield pool
            pool.close()
        except BaseException:
            pool.stop()
            raise
        finally:
            pool.join()


def _round(
    pool: ProcessPool, works: Sequence[Work], threads: int, limit: float | None, busy: list[Work] | None
) -> Iterator[Done | Failure]:
    """Do every job once; those that another process is doing go to ``busy``, or are waited for where it is ``None``."""
    wait = busy is None
    futures: dict[Any, Work] = {
        pool.schedule(_call, (cloudpickle.dumps(work), threads, wait), timeout=limit): work for work in works
    }
    for future in concurrent.futures.as_completed(futures):
        work = futures[future]
        try:
            outcome = future.result()
        except TimeoutError:
            outcome = keep(
                work, Failure(work.arm, work.seed, f"it took longer than the time limit of {limit:g} seconds")
            )
        except ProcessExpired as error:
            outcome = keep(work, Failure(work.arm, work.seed, f"its process was killed (exit code {error.exitcode})"))
        if not isinstance(outcome, Busy):
            yield outcome
        elif busy is not None:
            busy.append(work)


def _call(work: bytes, threads: int, wait: bool) -> Done | Failure | Busy:
    return do(cloudpickle.loads(work), threads=threads, wait=wait)


def _begin(alive: Connection, path: list[str], gpus: int, share: int, locks: str) -> None:
    """What a worker does first."""
    sys.path[:] = path
    threading.Thread(target=_end_with_parent, args=(alive,), daemon=True).start()
    for place in range(gpus * share):
        file = Path(locks, str(place)).open("w")  # noqa: SIM115  (held for as long as the process lives)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            continue
        _held.append(file)
        os.environ["CUDA_VISIBLE_DEVICES"] = _visible(place % gpus)
        return


def _visible(index: int) -> str:
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    return chosen.split(",")[index] if chosen else str(index)


def _end_with_parent(alive: Connection) -> None:
    with contextlib.suppress(EOFError, OSError):
        alive.recv()  # nothing is ever sent: this returns when the parent's end is closed
    os._exit(1)
