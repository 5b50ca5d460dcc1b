"""Evaluation mode for as long as a block runs."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """Put a module and all within it into evaluation mode; afterwards each is in its former mode, also after an error.

    Args:
        module: Whatever its parts' modes are: they may differ.
    """
    modes = [(part, part.training) for part in module.modules()]
    try:
        module.eval()
        yield
    finally:
        for part, training in modes:
            part.training = training
