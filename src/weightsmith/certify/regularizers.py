"""The two regularizers of the warmup: tight intervals, and as much active as inactive at every ReLU."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from weightsmith.certify.interval import Interval
from weightsmith.certify.passes import Pass, as_interval
from weightsmith.core.errors import UsageError

_RELUS = ("relu", "leaky_relu", "prelu")


class Regularization(NamedTuple):
    """The regularizers of one pass, each a number; the third is for the log alone.

    Attributes:
        tightness: Zero when no layer's mean radius is more than ``1 / tolerance`` times the input's.
        balance: Zero when at every ReLU active and inactive neurons weigh nearly the same.
        spread: Zero when the centers of every layer have at least the standard deviation ``tolerance``.
    """

    tightness: Tensor
    balance: Tensor
    spread: Tensor


@dataclass(frozen=True, slots=True)
class BoundRegularizer:
    """Regularizers of arXiv 2103.17268, section 3.3, on the bounds ``l, u`` that enter each of ``m`` ReLUs.

    Tightness ``1/(tau m) sum_i relu(tau - t_0 / t_i)`` with ``t_i`` the mean radius of layer ``i`` and ``t_0`` that of
    the input. Balance ``1/(tau m) sum_i relu(tau - q(alpha_i)) + relu(tau - q(beta_i))`` with ``q(v) = min(v, 1/v)``
    and the ratios ``alpha`` of the sums of centers, ``beta`` of their squared deviations, active against inactive
    neurons.

    Attributes:
        tolerance: ``tau``, in (0, 1].
    """

    tolerance: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.tolerance <= 1:
            raise UsageError(f"tolerance must be above 0 and at most 1, got {self.tolerance}")

    def __call__(self, done: Pass) -> Regularization:
        """Compute them for one pass.

        Args:
            done: The pass; `CertifiedTraining` gives its own.

        Raises:
            UsageError: The model has no ReLU.
        """
        layers = relu_inputs(done)
        if not layers:
            raise UsageError("the regularizers need a model with ReLUs; give regularizer=None for this one")
        box = done.values[done.graph.inputs[0]]
        first = as_interval(box).radius.mean()
        scale = 1 / (self.tolerance * len(layers))
        tightness = sum(self._short(first / layer.radius.mean().clamp_min(1e-12)) for layer in layers)
        balance = sum(self._balance(layer) for layer in layers)
        spread = sum(self._short(layer.center.std()) for layer in layers if layer.center.numel() > 1)
        zero = first.new_zeros(())
        return Regularization(zero + tightness * scale, zero + balance * scale, zero + spread * scale)

    def _short(self, value: Tensor) -> Tensor:
        return (self.tolerance - value).clamp_min(0)

    def _balance(self, layer: Interval) -> Tensor:
        active, inactive = (layer.lower > 0), (layer.upper < 0)
        center = layer.center
        if not bool(inactive.any()):
            return center.new_zeros(())
        if not bool(active.any()):  # the constant that the authors' code adds, without a gradient
            return center.new_tensor(2 * self.tolerance)
        zero = torch.zeros_like(center)
        sums = [torch.where(mask, center, zero).sum() for mask in (active, inactive)]
        deviations = (center - center.mean()).square()
        spreads = [torch.where(mask, deviations, zero).sum() for mask in (active, inactive)]
        return self._unbalanced(sums[0], -sums[1]) + self._unbalanced(*spreads)

    def _unbalanced(self, one: Tensor, other: Tensor) -> Tensor:
        ratio = one / other.clamp_min(1e-30)
        return self._short(torch.minimum(ratio, 1 / ratio.clamp_min(1e-12)))


def relu_inputs(done: Pass) -> list[Interval]:
    """Bounds of what enters each ReLU, in order."""
    return [as_interval(done.values[node.parents[0]]) for node in done.graph.nodes if node.op in _RELUS]
