"""States that a model is put into for a while, and comes back from whatever happens."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def at_rest(model: nn.Module) -> Iterator[None]:
    """In evaluation mode and without gradients; flags are restored."""
    modes = [(module, module.training) for module in model.modules()]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        model.eval().requires_grad_(False)
        yield
    finally:
        for module, training in modes:
            module.training = training
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


@contextmanager
def written(layers: Mapping[str, nn.Module], values: Mapping[str, Tensor]) -> Iterator[None]:
    """Let layers compute with other weights."""
    held = {name: layer._parameters.pop("weight") for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            vars(layer)["weight"] = values[name]
        yield
    finally:
        for name, layer in layers.items():
            vars(layer).pop("weight")
            others = dict(layer._parameters)
            layer._parameters.clear()
            layer._parameters.update({"weight": held[name], **others})
