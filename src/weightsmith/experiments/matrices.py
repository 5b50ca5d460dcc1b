"""What people would use today on a network's matrices: Muon there, AdamW on everything else, as one optimizer."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class MatricesAndRest(torch.optim.Optimizer):
    """``torch.optim.Muon`` on parameters of two dimensions, ``torch.optim.AdamW`` on the others.

    Muon's update is scaled to AdamW's usual size (``adjust_lr_fn="match_rms_adamw"``): one learning rate serves both.

    Args:
        params: Parameters.
        lr: Learning rate.
        weight_decay: Decoupled weight decay.
    """

    def __init__(self, params: Iterable[Tensor], lr: float, weight_decay: float) -> None:
        params = list(params)
        matrices = [param for param in params if param.dim() == 2]
        rest = [param for param in params if param.dim() != 2]
        options: dict[str, Any] = {"lr": lr, "weight_decay": weight_decay}
        self.parts: list[torch.optim.Optimizer] = []
        if matrices:
            self.parts.append(torch.optim.Muon(matrices, adjust_lr_fn="match_rms_adamw", **options))
        if rest:
            self.parts.append(torch.optim.AdamW(rest, **options))
        super().__init__(params, options)
        # schedules set the rates of these groups, which are the parts' own
        self.param_groups = [group for part in self.parts for group in part.param_groups]

    def step(self, closure: Any = None) -> Any:
        """Take one step of both."""
        loss = closure() if closure is not None else None
        for part in self.parts:
            part.step()
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The states of both."""
        return {"parts": [part.state_dict() for part in self.parts]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore both."""
        for part, state in zip(self.parts, state_dict["parts"], strict=True):
            part.load_state_dict(state)
        self.param_groups = [group for part in self.parts for group in part.param_groups]
