"""Several processes, started by ``torchrun`` or ``accelerate launch``, that do every job together."""

import contextlib
import os
from collections.abc import Iterator, Sequence

from weightsmith.lab.engines.base import Done, Engine, Failure, Work, compute, keep


def is_distributed() -> bool:
    """Whether this process is one of several that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_leader() -> bool:
    """Whether this process writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def together() -> Iterator[Engine]:
    """Do one job after the other, each by all processes; the leader writes the results."""
    from accelerate import PartialState

    state = PartialState()

    def do_all(works: Sequence[Work]) -> Iterator[Done | Failure]:
        for work in works:
            outcome = compute(work)
            if state.is_main_process:
                keep(work, outcome)
            state.wait_for_everyone()
            yield Done(work.arm, work.seed) if not isinstance(outcome, Failure) else outcome

    yield do_all
