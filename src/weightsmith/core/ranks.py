"""Work of several processes that one of them has to do alone."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, distributed

from weightsmith.core.errors import UsageError, reason


def on_first_rank(write: Callable[[], object]) -> None:
    """Let one process write, while the others wait; all must call this.

    Without a process group it is a plain call. An error on the first process is an error on all, so that none waits for
    a file that will never be there.

    Raises:
        UsageError: On the other processes, what went wrong on the first one.
    """
    if not (distributed.is_available() and distributed.is_initialized()):
        write()
        return
    problem: Exception | None = None
    if distributed.get_rank() == 0:
        try:
            write()
        except Exception as error:
            problem = error
    told = [None if problem is None else reason(problem)]
    distributed.broadcast_object_list(told, src=0)
    if problem is not None:
        raise problem
    if told[0] is not None:
        raise UsageError(f"the first process could not write: {told[0]}")


@torch.no_grad()
def from_first_rank_(tensors: Iterable[Tensor]) -> None:
    """Give every process the values that the first one has; all must call this."""
    if distributed.is_available() and distributed.is_initialized():
        for tensor in tensors:
            distributed.broadcast(tensor, src=0)
