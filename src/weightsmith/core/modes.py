"""Context managers that restore the state of a model."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from weightsmith.core.graph import Live


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


@contextmanager
def untouched(model: nn.Module) -> Iterator[Callable[[], list[Live | None]]]:
    """Undo what the code of a model does to the model, apart from values of parameters, and to torch's generator.

    Yields:
        What tells which tensors have changed so far; ``None`` among them: the random generator of torch.
    """
    attributes = [(module, dict(module.__dict__)) for module in model.modules()]
    held = [
        (items, items.copy()) for _, names in attributes for items in names.values() if isinstance(items, dict | list)
    ]
    tensors = {
        Live(module, name): (tensor, tensor._version)
        for module, names in attributes
        for name, tensor in [*module._buffers.items(), *module._parameters.items(), *names.items()]
        if isinstance(tensor, Tensor) and not tensor.is_inference()
    }
    # torch.fx hands out parameters as proxies, so that nothing happens to their values
    values = [(tensor, version, tensor.detach().clone()) for tensor, version in tensors.values()
              if not isinstance(tensor, nn.Parameter)]  # fmt: skip
    state = torch.get_rng_state()

    def changed() -> list[Live | None]:
        found: list[Live | None] = [
            live for live, (tensor, version) in tensors.items()
            if tensor._version != version or getattr(live.owner, live.name, None) is not tensor
        ]  # fmt: skip
        return found if torch.equal(state, torch.get_rng_state()) else [*found, None]

    try:
        yield changed
    finally:
        torch.set_rng_state(state)
        for module, names in attributes:
            module.__dict__.clear()
            module.__dict__.update(names)
        for items, before in held:
            items.clear()
            items.update(before) if isinstance(items, dict) else items.extend(before)
        with torch.no_grad():
            for tensor, version, value in values:
                if tensor._version != version:
                    tensor.copy_(value)
