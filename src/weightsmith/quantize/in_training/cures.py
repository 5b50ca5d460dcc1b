"""Two older cures for oscillation to compare with.

Iterative freezing pins codes whose frequency exceeds a threshold; dampening pulls weights to the middle of their bin.

Source: "Overcoming Oscillations in Quantization-Aware Training", Markus Nagel, Marios Fournarakis, Yelysei Bondarenko,
Tijmen Blankevoort, ICML 2022, arXiv 2203.11086.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, unknown
from weightsmith.quantize.in_training.oscillation import Oscillation
from weightsmith.quantize.in_training.weight_quantizer import Site, WeightQuantizer, low_bit_sites


class Freezing(Oscillation):
    """Follows the codes of one tensor and freezes those that oscillate.

    Args:
        codes: The codes before the first step.
        momentum: Of the frequency and of the average code.
        dtype: Of the averages.

    Attributes:
        frozen: Bool, shaped like the codes.
        frozen_codes: What frozen entries keep, int8.
        average: Moving average of the codes, ``None`` before freezing begins.
    """

    _kept = (*Oscillation._kept, "frozen", "frozen_codes", "average")

    def __init__(self, codes: Tensor, momentum: float = 0.01, *, dtype: torch.dtype = torch.float32) -> None:
        super().__init__(codes, momentum, dtype=dtype)
        self.frozen = torch.zeros_like(self.previous, dtype=torch.bool)
        self.frozen_codes = torch.zeros_like(self.previous)
        self.average: Tensor | None = None

    @torch.no_grad()
    def freeze(self, codes: Tensor, threshold: float) -> Tensor:
        """Take the next codes and freeze those whose frequency is above a threshold.

        Args:
            codes: Of the latent weights.
            threshold: Of the frequency; 0: freeze nothing yet.

        Returns:
            The codes in effect in this step: what freezes now is seen in the next.
        """
        codes = torch.where(self.frozen, self.frozen_codes, codes.detach().to(torch.int8))
        self.step(codes)
        if threshold > 0:
            exact = codes.to(self.frequency.dtype)
            average = exact if self.average is None else self.average
            over = self.frequency > threshold
            self.frozen_codes = torch.where(over, average.round().to(torch.int8), self.frozen_codes)
            self.frozen = self.frozen | over
            self.average = torch.lerp(average, exact, self.momentum)
        return codes


@dataclass(frozen=True, slots=True)
class _Cosine:
    """A value that moves along half a cosine from ``first`` to ``last`` once a part of the steps has passed."""

    first: float
    last: float
    steps: int
    start: float

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise UsageError(f"steps must be at least 1, got {self.steps}")
        if not 0 <= self.start < 1:
            raise UsageError(f"start must be at least 0 and below 1, got {self.start}")

    def at(self, taken: int) -> float:
        """The value after as many steps; 0 before it begins."""
        progress = (taken / self.steps - self.start) / (1 - self.start)
        if progress < 0:
            return 0.0
        return self.last + 0.5 * (self.first - self.last) * (1 + math.cos(math.pi * min(progress, 1.0)))


class IterativeFreezing:
    """Freezes low-bit weights that oscillate, at a threshold that falls along a cosine.

    Call `step` once per optimizer step, before it. A frozen weight keeps its code, still multiplied by the present
    scale, and its latent gets no gradient.

    Args:
        model: What ``prepare_ofq_`` returned.
        steps: Optimizer steps of the whole training.
        threshold: Frequencies between which the threshold falls; the paper: 0.1 to 0.011 at 3 bits, 0.01 at 4 bits.
        start: The part of training before which nothing is frozen.
        momentum: Of frequency and average; 2 to 3 times below the threshold at least.

    Raises:
        UsageError: An argument is out of range, or the model has no quantized weight.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        threshold: tuple[float, float] = (0.1, 0.011),
        start: float = 0.25,
        momentum: float = 0.01,
    ) -> None:
        self._schedule = _Cosine(*threshold, steps, start)
        if not 0 < threshold[1] <= threshold[0] <= 1:
            raise UsageError(f"threshold must fall from at most 1 to above 0, got {threshold}")
        if momentum >= threshold[1]:
            raise UsageError(
                f"momentum must be below the last threshold {threshold[1]}, or one oscillation freezes: got {momentum}"
            )
        self._model, self.taken = model, 0
        self._sites = {site.name: site for site in low_bit_sites(model)}
        self._states = {
            name: Freezing(site.quantizer.codes(site.latent()), momentum) for name, site in self._sites.items()
        }

    @property
    def threshold(self) -> float:
        """The present threshold; 0 before freezing begins."""
        return self._schedule.at(self.taken)

    @torch.no_grad()
    def step(self) -> None:
        """Look at the codes that the last forward pass has used; not in evaluation mode."""
        if not self._model.training:
            return
        threshold = self.threshold
        for name, site in self._sites.items():
            self._states[name].freeze(site.quantizer.codes(site.latent(), frozen=False), threshold)
        self.taken += 1
        self._pass_on()

    def frozen(self) -> float:
        """Per cent of the weights that are frozen."""
        masks = [state.frozen for state in self._states.values()]
        return 100 * sum(int(mask.sum()) for mask in masks) / sum(mask.numel() for mask in masks)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        return {"taken": self.taken, "states": {name: state.state_dict() for name, state in self._states.items()}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.taken = state["taken"]
        for name, freezing in self._states.items():
            freezing.load_state_dict(state["states"][name])
        self._pass_on()

    def _pass_on(self) -> None:
        for name, site in self._sites.items():
            state = self._states[name]
            if state.average is not None:
                site.quantizer.frozen, site.quantizer.frozen_codes = state.frozen, state.frozen_codes


class Dampening:
    """A penalty that pulls low-bit weights to the levels they are rounded to; its weight rises along a cosine.

    Args:
        model: What ``prepare_ofq_`` returned.
        steps: Optimizer steps of the whole training.
        weight: The largest weight of the penalty.
        start: The part of training before which its weight is 0.
        aggregate: ``"row"``: sum over output rows, average over the rest; ``"sum"``: sum over all.

    Raises:
        UsageError: An argument is out of range, or the model has no quantized weight.
    """

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        weight: float = 0.1,
        start: float = 0.25,
        aggregate: Literal["row", "sum"] = "row",
    ) -> None:
        self._schedule = _Cosine(0.0, weight, steps, start)
        if aggregate not in ("row", "sum"):
            raise unknown("aggregate", aggregate, ("row", "sum"))
        if weight < 0:
            raise UsageError(f"weight must not be negative, got {weight}")
        self.aggregate, self.taken = aggregate, 0
        self._sites = low_bit_sites(model)

    @property
    def weight(self) -> float:
        """The present weight of the penalty."""
        return self._schedule.at(self.taken)

    def __call__(self) -> Tensor:
        """Return the penalty to add to the loss, a scalar that only latent weights get gradients from."""
        return self.weight * torch.stack([_distance(site, self.aggregate) for site in self._sites]).sum()

    def step(self) -> None:
        """Move the schedule on; call it after the optimizer's step."""
        self.taken += 1

    def state_dict(self) -> dict[str, int]:
        """All that a resumed run needs."""
        return {"taken": self.taken}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Take over what `state_dict` returned."""
        self.taken = state["taken"]


def dampening(quantizer: WeightQuantizer, rows: Tensor, aggregate: Literal["row", "sum"] = "row") -> Tensor:
    """Squared distance between a weight, clipped to the range of its grid, and its quantized value.

    Args:
        quantizer: Of the weight.
        rows: The latent rows that it quantizes.
        aggregate: As for `Dampening`.

    Returns:
        A scalar; ``rows`` gets a gradient, the scale gets none.
    """
    step = quantizer.step(rows).detach()
    level = (quantizer.codes(rows) + quantizer.offset) * step
    low, high = ((code + quantizer.offset) * step for code in (-quantizer.half_range, quantizer.half_range - 1))
    distance = (level - torch.minimum(torch.maximum(rows.to(step.dtype), low), high)).square()
    return distance.sum() if aggregate == "sum" else distance.sum(quantizer.axis).mean()


def _distance(site: Site, aggregate: Literal["row", "sum"]) -> Tensor:
    return dampening(site.quantizer, site.rows(), aggregate)
