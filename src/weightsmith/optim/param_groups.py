"""Which parameters decay: matrices and kernels do, biases and gains do not."""

from typing import Any

from torch import nn
from torch.nn.parameter import is_lazy

from weightsmith.core.errors import UsageError


def param_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split a model's trainable parameters into those that decay (two dimensions or more) and the rest.

    Args:
        model: Any module; a tied parameter appears once, a frozen one not at all.
        weight_decay: Decay of the first group; the second group has 0.

    Returns:
        Groups for any optimizer; a group without parameters is left out.

    Raises:
        UsageError: A parameter is lazy, so that its dimensions are unknown.
    """
    lazy = [name for name, p in model.named_parameters() if is_lazy(p)]
    if lazy:
        raise UsageError(f"{', '.join(lazy)}: lazy parameters have no dimensions yet: run one batch through the model")
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    groups: list[dict[str, Any]] = [
        {"params": [p for p in trainable if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.dim() < 2], "weight_decay": 0.0},
    ]
    return [group for group in groups if group["params"]]
