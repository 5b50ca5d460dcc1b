"""Elastic weight consolidation (EWC): weights that mattered to earlier tasks are held in place.

    penalty = strength / 2  sum_i F_i (theta_i - theta*_i)^2

``theta*`` are the parameters after the last task and ``F`` the mean squared gradients, summed over tasks. A rival of
the average, under the same conditions.

Source: Kirkpatrick et al., "Overcoming catastrophic forgetting in neural networks", PNAS 2017, arXiv 1612.00796,
equation 3; Fisher information summed over tasks as in Huszár's note, arXiv 1712.03847.
"""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.continual.averaged import named_trainable
from weightsmith.core.errors import UsageError


class EWC:
    """The penalty, and what it remembers of the tasks so far.

    Args:
        model: Its trainable parameters are held.
        strength: Above 0.

    Raises:
        UsageError: ``strength`` is out of range, or nothing is trainable.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> ewc = EWC(model, strength=100.0)
        >>> ewc.consolidate(model(torch.randn(4)).square().sum() for _ in range(8))  # after a task
        >>> loss = model(torch.randn(4)).sum() + ewc.penalty()  # in the next
    """

    def __init__(self, model: nn.Module, strength: float) -> None:
        if not strength > 0:
            raise UsageError(f"strength must be above 0, got {strength!r}")
        self.model, self.strength = model, strength
        self._names = [name for name, _ in named_trainable(model)]
        if not self._names:
            raise UsageError("model has no trainable parameter")
        self._fisher: dict[str, Tensor] = {}
        self._anchor: dict[str, Tensor] = {}

    @property
    def nbytes(self) -> int:
        """Bytes of what is remembered."""
        return sum(tensor.nbytes for held in (self._fisher, self._anchor) for tensor in held.values())

    def penalty(self) -> Tensor:
        """What to add to the loss; 0 before the first task has ended."""
        if not self._anchor:
            return torch.zeros((), device=self.model.get_parameter(self._names[0]).device)
        held = ((name, self.model.get_parameter(name)) for name in self._names)
        terms = [(self._fisher[name] * (p - self._anchor[name]).square()).sum() for name, p in held]
        return self.strength / 2 * torch.stack(terms).sum()

    def consolidate(self, losses: Iterable[Tensor]) -> None:
        """Remember a task that has been trained.

        Args:
            losses: Of examples, or small batches of them, of its training data: as many as there are, one at a time.

        Raises:
            UsageError: There is none.
        """
        parameters = [self.model.get_parameter(name) for name in self._names]
        total, count = [torch.zeros_like(p) for p in parameters], 0
        for loss in losses:
            for held, gradient in zip(total, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True):
                if gradient is not None:
                    held.addcmul_(gradient, gradient)
            count += 1
        if not count:
            raise UsageError("losses must hold at least one loss")
        for name, parameter, held in zip(self._names, parameters, total, strict=True):
            self._fisher[name] = self._fisher.get(name, 0) + held / count
            self._anchor[name] = parameter.detach().clone()

    def state_dict(self) -> dict[str, Any]:
        """What is remembered."""
        return {"fisher": dict(self._fisher), "anchor": dict(self._anchor)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave.

        Raises:
            UsageError: It is of other parameters; nothing has been changed.
        """
        own = {name: self.model.get_parameter(name) for name in self._names}
        for held in (state["fisher"], state["anchor"]):
            if held and {name: p.shape for name, p in own.items()} != {name: t.shape for name, t in held.items()}:
                raise UsageError(
                    f"the state is of other parameters: it has {', '.join(held)}, the model {', '.join(own)}"
                )
        self._fisher, self._anchor = (
            {name: tensor.to(own[name].device) for name, tensor in held.items()}
            for held in (state["fisher"], state["anchor"])
        )
