"""Averages of weights in memory: of state dicts after training, and of a model while it trains.

The running averages are ``torch.optim.swa_utils.AveragedModel``: call ``update_parameters(model)`` after a step, use
``.module`` at the end, and let ``torch.optim.swa_utils.update_bn`` measure batch norm's statistics anew.
"""

import copy
from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from weightsmith.core.errors import UsageError


def average_state_dicts(
    states: Sequence[Mapping[str, Tensor]], weights: Sequence[float] | None = None
) -> dict[str, Tensor]:
    """Average tensors of the same names: ``sum_i w_i theta_i``, accumulated in float64, rounded once.

    Args:
        states: State dicts of one architecture, oldest first. They are left as they are.
        weights: ``(n,)``, at least 0, for example from `metric_weights`; scaled to sum 1. ``None``: all equal.

    Returns:
        New tensors; integer and boolean ones, and what is no tensor (``get_extra_state``), are the newest's.

    Raises:
        UsageError: There is none, or names, shapes, dtypes or the number of weights differ.
    """
    shares = normalized(weights, len(states))
    newest = states[-1]
    for index, state in enumerate(states):
        if state.keys() != newest.keys():
            differing = sorted(state.keys() ^ newest.keys())
            raise UsageError(f"states[{index}] differs from the newest in the names {', '.join(differing[:5])}")
        for name, tensor in state.items():
            mine, theirs = _described(tensor), _described(newest[name])
            if mine != theirs:
                raise UsageError(f"states[{index}] has {name!r} as {mine}, the newest as {theirs}")
    return {name: _mean([state[name] for state in states], shares) for name in newest}


def normalized(weights: Sequence[float] | None, count: int) -> list[float]:
    """Scale weights to sum 1, after checking that there are ``count`` of them and none is negative."""
    if not count:
        raise UsageError("there is nothing to average")
    given = [1.0] * count if weights is None else [float(weight) for weight in weights]
    if len(given) != count:
        raise UsageError(f"weights must be {count} numbers, one per checkpoint, got {len(given)}")
    total = sum(given)
    if not (total > 0 and total < float("inf") and min(given) >= 0):
        raise UsageError(f"weights must be at least 0, finite and not all 0, got {given}")
    return [weight / total for weight in given]


def _described(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else "no tensor"


def _mean(tensors: list[Any], shares: list[float]) -> Any:
    if not isinstance(tensors[-1], Tensor):
        return copy.deepcopy(tensors[-1])
    newest: Tensor = tensors[-1].detach()
    if not (newest.is_floating_point() or newest.is_complex()):
        return newest.clone()
    wide = torch.float64 if newest.device.type != "mps" else torch.float32  # which has no float64
    if newest.is_complex():
        wide = torch.complex128
    # the newest plus weighted differences: exact for equal tensors, and for a single one
    base = newest.to(wide)
    total = base.clone()
    for tensor, share in zip(tensors[:-1], shares, strict=False):
        away = tensor.detach().to(wide) - base
        if not away.isfinite().all():
            away.masked_fill_(tensor.detach().to(wide) == base, 0)  # both infinite, as in the mask of an attention
        total.add_(away, alpha=share)
    return total.to(newest.dtype)


def _copyable(model: nn.Module) -> nn.Module:
    # pruning and other hooks leave what they computed last, with its graph, which cannot be copied; each forward pass
    # computes it anew
    for module in model.modules():
        for name, value in vars(module).items():
            if isinstance(value, Tensor) and value.grad_fn is not None:
                setattr(module, name, value.detach())
    return model


def ema(model: nn.Module, decay: float = 0.999) -> AveragedModel:
    """Keep an exponential moving average of a model while it trains: ``avg = decay avg + (1 - decay) theta``.

    Args:
        model: What trains.
        decay: In [0, 1); about ``1 / (1 - decay)`` updates are remembered.
    """
    if not 0 <= decay < 1:
        raise UsageError(f"decay must be at least 0 and below 1, got {decay}")
    return AveragedModel(_copyable(model), multi_avg_fn=get_ema_multi_avg_fn(decay))


def swa(model: nn.Module) -> AveragedModel:
    """Keep the plain mean of all states of a model that it is shown.

    Source: "Averaging Weights Leads to Wider Optima and Better Generalization" (arXiv 1803.05407), algorithm 1.

    Args:
        model: What trains.
    """
    return AveragedModel(_copyable(model))


class LAWA(AveragedModel):
    """Keep the plain mean of the latest ``k`` states of a model that it is shown.

    From saved folders it is ``scheme="uniform"`` with ``last=k``. Its ``state_dict`` holds the ``k`` states, so that a
    run resumes exactly.

    Source: "Stop Wasting My Time! Saving Days of ImageNet and BERT Training with Latest Weight Averaging"
    (arXiv 2209.14981), section 2.

    Args:
        model: What trains.
        k: How many states; as many copies of the weights are kept.
    """

    def __init__(self, model: nn.Module, k: int = 4) -> None:
        if k < 1:
            raise UsageError(f"k must be at least 1, got {k}")
        super().__init__(_copyable(model))
        self._latest: deque[dict[str, Tensor]] = deque(maxlen=k)

    def update_parameters(self, model: nn.Module) -> None:
        """Take in the model's present state, and let the oldest go."""
        self._latest.append(copy.deepcopy(model.state_dict()))
        self.module.load_state_dict(average_state_dicts(list(self._latest)))
        self.n_averaged += 1

    def get_extra_state(self) -> Any:
        """The states themselves; part of ``state_dict()``."""
        return list(self._latest)

    def set_extra_state(self, state: Any) -> None:
        """Take over what `get_extra_state` gave."""
        self._latest = deque(state, maxlen=self._latest.maxlen)
