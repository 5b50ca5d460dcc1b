"""LoRA on a network, what it was at every checkpoint of a run, and the network with several checkpoints merged."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightsmith.average import average_state_dicts
from weightsmith.average.low_rank import best_of_rank, covariance_gap, stacked
from weightsmith.core.errors import UsageError
from weightsmith.core.weights import output_head

State = dict[str, Tensor]


class LowRank(nn.Module):
    """``W + (alpha / r) B A``, ``A (r, in)``, ``B (out, r)``; ``B`` begins at 0 (arXiv 2106.09685, section 4.1)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        out, into = weight.shape
        self.scale = alpha / rank
        self.a = nn.Parameter(nn.init.kaiming_uniform_(weight.new_empty(rank, into), a=math.sqrt(5)))
        self.b = nn.Parameter(weight.new_zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Add the update to ``weight (out, in)``."""
        return weight + self.scale * self.b @ self.a


def adapt_(model: nn.Module, rank: int, alpha: float) -> nn.ModuleList:
    """Freeze a model, put an adapter on every linear layer but a language model's head, and return the adapters."""
    model.requires_grad_(False)
    targets = _targets(model)
    adapters = nn.ModuleList(LowRank(layer.weight, rank, alpha) for layer in targets)
    for layer, adapter in zip(targets, adapters, strict=True):
        parametrize.register_parametrization(layer, "weight", adapter)
    return adapters


class Snapshots:
    """The adapters at each checkpoint, kept with a run in flight."""

    def __init__(self, adapters: nn.Module) -> None:
        self.adapters = adapters
        self.states: list[State] = []

    def take(self, _: nn.Module) -> dict[str, float]:
        """Keep the present state."""
        self.states.append({name: tensor.detach().clone() for name, tensor in self.adapters.state_dict().items()})
        return {}

    def state_dict(self) -> dict[str, Any]:
        """What has been kept."""
        return {"states": self.states}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take it back."""
        self.states = list(state["states"])


@contextmanager
def merged(
    model: nn.Module, states: Sequence[State], weights: Sequence[float], mode: str, *, rank: int, alpha: float
) -> Iterator[None]:
    """The model with merged adapters in its weights, within the block.

    Args:
        model: Without adapters.
        states: Of the adapters.
        weights: One for each; their sum is 1.
        mode: What is averaged: ``"factors"``, ``"exact"``: updates, ``"svd"``: updates, then cut to the rank.
        rank: Of the adapters.
        alpha: Their scaling is alpha / rank.
    """
    scale, targets = alpha / rank, _targets(model)
    if mode == "factors":
        states, weights = [average_state_dicts(states, weights)], [1.0]
    before = [layer.weight.detach().clone() for layer in targets]
    with torch.no_grad():
        for index, layer in enumerate(targets):
            a, b = stacked(*_factors(states, index), [scale * weight for weight in weights])
            if mode == "svd":
                a, b, _ = best_of_rank(a, b, rank)
            layer.weight.addmm_(b.to(layer.weight), a.to(layer.weight))
    try:
        yield
    finally:
        with torch.no_grad():
            for layer, weight in zip(targets, before, strict=True):
                layer.weight.copy_(weight)


def mean_gap(states: Sequence[State], weights: Sequence[float]) -> float:
    """Share of the mean update that averaging factors loses, mean over layers."""
    layers = {int(name.partition(".")[0]) for name in states[0]}
    return sum(covariance_gap(*_factors(states, index), weights) for index in layers) / len(layers)


def _factors(states: Sequence[State], index: int) -> tuple[list[Tensor], list[Tensor]]:
    return [state[f"{index}.a"] for state in states], [state[f"{index}.b"] for state in states]


def _targets(model: nn.Module) -> list[nn.Linear]:
    head = output_head(model)
    layers = [module for module in model.modules() if isinstance(module, nn.Linear) and module is not head]
    if not layers:
        raise UsageError("adapters need a model with linear layers: try --model mlp or vit_tiny")
    return layers
