"""What is worth knowing of an average while it runs: how often it falls back, and whether it averages at all."""

import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from weightsmith.continual.averaged import Part
from weightsmith.core.errors import WeightsmithWarning

_WINDOW = 20  # steps after which the averaging weights are looked at
_LARGE = 0.1  # a median averaging weight above this hardly averages
NO_GRADIENTS = (
    "DynamicEMA.step found no gradient: it must be called after optimizer.step() and before zero_grad(); in Trainer "
    "that is on_optimizer_step (on_step_end is too late)"
)


@dataclass(slots=True)
class Watch:
    """Counts and warnings of an average.

    Attributes:
        advice: What to do where it hardly averages; empty: weights and gradients are not looked at.
        pairs: Tensors times steps so far.
        fallbacks: How many of them had the fallback weight; on the device.
        recent: Averaging weights since they were looked at.
        moved: Whether a gradient was not zero since then; on the device.
    """

    advice: str
    pairs: int = 0
    fallbacks: Tensor | int = 0
    recent: list[Tensor] = field(default_factory=list)
    moved: Tensor | bool = False
    _warned_finite: bool = False
    _warned_large: bool = False

    def count(self, part: Part, alpha: Tensor, active: Tensor, fell: Tensor) -> None:
        """Take the averaging weights of a step: of which parameters, and which of them are fallbacks, ``(p,)``."""
        self.pairs += sum(p.requires_grad for p in part.parameters)
        self.fallbacks = self.fallbacks + fell.sum()
        self.recent.append(torch.where(active, alpha, torch.nan))

    def check_finite(self, part: Part, finite: Tensor, step: int) -> None:
        """Count, and warn once; on a GPU only now and then, because reading the count waits for the device."""
        part.skipped = part.skipped + (~finite).to(torch.int64)
        due = finite.device.type == "cpu" or (step + 1) % _WINDOW == 0
        if self._warned_finite or not due or not bool((part.skipped > 0).any()):
            return
        self._warned_finite = True
        name = next(name for name, count in part.by_name(part.skipped) if count)
        warnings.warn(
            f"{name} or its gradient is not finite: its average stays as it is in such steps",
            WeightsmithWarning,
            stacklevel=5,
        )

    def state(self) -> dict[str, Any]:
        """What is stored, as plain data."""
        return {
            "pairs": self.pairs,
            "fallbacks": int(self.fallbacks),
            "moved": bool(self.moved),
            "recent": [alpha.cpu() for alpha in self.recent],
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take back what `state` gave."""
        self.pairs, self.fallbacks, self.moved = state["pairs"], state["fallbacks"], state["moved"]
        self.recent = list(state["recent"])

    def look_back(self, step: int) -> None:
        """Now and then: refuse what has had no gradient, and warn where the average hardly averages.

        Raises:
            RuntimeError: All gradients were zero.
        """
        if step % _WINDOW:
            return
        weights = torch.cat([alpha.cpu() for alpha in self.recent])
        self.recent = []
        moved, self.moved = bool(self.moved), False
        if not self.advice:
            return
        if not moved:
            raise RuntimeError(NO_GRADIENTS)
        median = float(weights.nanmedian())
        if median > _LARGE and not self._warned_large:
            self._warned_large = True
            warnings.warn(
                f"the median averaging weight of {_WINDOW} steps is {median:.2f}, so the average hardly differs from "
                f"the live weights: {self.advice}",
                WeightsmithWarning,
                stacklevel=4,
            )
