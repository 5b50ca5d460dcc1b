"""Steps on a function of a few tensors: measurements that need neither data nor a network."""

from collections.abc import Callable

import torch
from torch import Tensor


def minimize(optimizer: torch.optim.Optimizer, loss: Callable[[int], Tensor], *, steps: int) -> None:
    """Take steps down a function of the optimizer's parameters.

    Args:
        optimizer: Holds the parameters.
        loss: ``step -> scalar``, counted from 0.
        steps: How many.
    """
    for step in range(steps):
        optimizer.zero_grad()
        loss(step).backward()
        optimizer.step()
