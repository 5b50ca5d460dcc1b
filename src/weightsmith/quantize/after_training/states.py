"""Context managers that restore model state."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from weightsmith.core.modes import evaluating


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients; flags are restored."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    with evaluating(model):
        try:
            model.requires_grad_(False)
            yield
        finally:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)


@contextmanager
def moved(module: nn.Module, device: torch.device | str | None) -> Iterator[None]:
    """On another device; ``None``: where it is."""
    home = next(module.parameters()).device
    try:
        module.to(device or home)
        yield
    finally:
        module.to(home)


@contextmanager
def single_precision(module: nn.Module) -> Iterator[None]:
    """Half-precision parameters and buffers in float32; afterwards the very tensors that were there."""
    narrow = (torch.float16, torch.bfloat16)
    held = [(tensor, tensor.data) for tensor in [*module.parameters(), *module.buffers()] if tensor.dtype in narrow]
    try:
        for tensor, data in held:
            tensor.data = data.float()
        yield
    finally:
        for tensor, data in held:
            tensor.data = data
