"""Several processes, started by ``torchrun`` or ``accelerate launch``, that do every job together."""

import atexit
import contextlib
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from weightsmith.lab.engines.base import (
    Done,
    Engine,
    Failure,
    Work,
    compute,
    finished,
    has_start,
    keep,
    locked,
    read_start,
    start_folder,
    write_start,
)
from weightsmith.lab.record import JobResult

Value = TypeVar("Value")

_PATIENCE = 60.0  # seconds: an error of one process alone leaves the others in an exchange that never ends
_LONGEST_JOB = timedelta(days=30)
_group: Any = None  # of the processes, for what they tell each other about jobs


def is_distributed() -> bool:
    """Whether this process is one of several that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_leader() -> bool:
    """Whether this process writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


def join() -> None:
    """Meet the other processes.

    Raises:
        RuntimeError: Accelerate has taken this process for the only one already.
    """
    from accelerate import PartialState

    if not dist.is_initialized():
        atexit.register(_leave)
    cpu = not torch.accelerator.is_available()
    if cpu:
        os.environ["ACCELERATE_USE_CPU"] = "true"  # torchrun does not say so, and every process would train alone
    if PartialState(cpu=cpu).num_processes != int(os.environ["WORLD_SIZE"]):
        raise RuntimeError("Accelerate was used in this process before the run and does not know of the others")


def _leave() -> None:
    if dist.is_initialized():  # threads of a group that is still there end the process with an error
        dist.destroy_process_group()


def from_leader(find: Callable[[], Value]) -> Value:
    """What the leader finds, on every process; its error as well. With one process it is simply found."""
    if _group is None:
        return find()
    told: list[Any] = [None, None]
    if is_leader():
        try:
            told[0] = find()
        except Exception as error:
            told[1] = error
    dist.broadcast_object_list(told, src=0, group=_group)
    if told[1] is not None:
        raise told[1]
    answer: Value = told[0]
    return answer


@contextlib.contextmanager
def together() -> Iterator[Engine]:
    """Do one job after the other, each by all processes; the leader locks, writes, and says what is due."""
    global _group
    _group = dist.new_group(backend="gloo", timeout=_LONGEST_JOB)
    try:
        yield _do_all
        dist.barrier(_group)  # nobody leaves while another still reads an answer
    finally:
        _group = None


def _do_all(works: Sequence[Work]) -> Iterator[Done | Failure]:
    for work in works:
        with contextlib.ExitStack() as held:
            outcome: Done | Failure = Done(work.arm, work.seed)
            if not from_leader(partial(_claim, work, held)):
                ours = compute(work, start=_start, live=is_leader())
                outcome = from_leader(partial(keep, work, _first_failure(work, ours) or ours))
        yield outcome


def _claim(work: Work, held: contextlib.ExitStack) -> bool:
    held.enter_context(locked(work.lock, wait=True))
    return finished(work)


def _first_failure(work: Work, outcome: JobResult | Failure) -> Failure | None:
    """A failure of any of the processes."""
    failure = outcome if isinstance(outcome, Failure) else None
    alone = threading.Timer(_PATIENCE, partial(_end_all, work, failure))
    alone.daemon = True
    if failure is not None:
        alone.start()
    gathered: list[Failure | None] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, failure, group=_group)
    alone.cancel()
    return next(filter(None, gathered), None)


def _end_all(work: Work, failure: Failure | None) -> None:
    # the launcher ends the others when one of its processes ends with an error
    if failure is not None:
        with contextlib.suppress(OSError):
            keep(work, failure)
        sys.stderr.write(f"{work.arm}, seed {work.seed} failed on one process only:\n{failure.trace}\n")
        sys.stderr.flush()
    os._exit(1)


def _start(work: Work) -> Any:
    """What the arms of a seed share, made by all processes together, which may train in it."""
    if work.experiment.start is None:
        return None
    if not from_leader(partial(has_start, work)):
        start_folder(work).mkdir(parents=True, exist_ok=True)
        data = work.experiment.start(work.config, work.seed, start_folder(work))
        from_leader(partial(write_start, work, data))
    return read_start(work)
