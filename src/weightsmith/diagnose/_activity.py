"""What the layers of a model compute on some inputs: similarities of samples, and signs."""

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.diagnose._function import as_call, count, first_tensor, quietly

Activity = Callable[[Any], Tensor] | None
NAN = 2
"""Stands for a sign that is no number."""


def observe(
    model: nn.Module, layers: Sequence[str], inputs: Any, activity: Activity, batch_dim: int
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Run a model once and keep what its layers compute.

    Returns:
        By layer: ``H H^T``, with ``H`` scaled to a largest number of 1, float64; and signs of ``H`` as int8, `NAN`
        where it is none.
    """
    samples = count(inputs, batch_dim)
    seen: dict[str, list[Tensor]] = {name: [] for name in layers}
    modules = dict(model.named_modules())

    def keep(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_module: nn.Module, _inputs: Any, returned: Any) -> None:
            found = _units(name, returned, samples, activity, batch_dim)
            if found is not None:
                seen[name].append(found)

        return hook

    with quietly(model), torch.no_grad(), ExitStack() as hooks:
        for name in layers:
            hooks.callback(modules[name].register_forward_hook(keep(name)).remove)
        args, kwargs = as_call(inputs)
        model(*args, **kwargs)
    similarities: dict[str, Tensor] = {}
    signs: dict[str, Tensor] = {}
    for name, parts in seen.items():
        if not parts:
            continue
        h = torch.cat(parts, 1)
        scale = h.double().abs().amax() if h.numel() else h.new_zeros(())
        wide = h.double() / scale if 0 < scale < math.inf else h.double()
        similarities[name] = (wide @ wide.T).cpu()
        signs[name] = torch.where(h.isnan(), NAN, torch.sign(h)).to(torch.int8).cpu()
    return similarities, signs


def _units(name: str, returned: Any, samples: int, activity: Activity, batch_dim: int) -> Tensor | None:
    if activity is not None:
        units = activity(returned)
        if units.dim() < 1 or len(units) != samples:
            raise UsageError(f"activity must return (N, units) for N = {samples}, got {tuple(units.shape)} of {name}")
        return _real(units.reshape(samples, -1))
    found = first_tensor(returned)
    if found is None or not (found.is_floating_point() or found.is_complex()):
        return None
    axis = batch_dim if found.dim() > batch_dim and found.shape[batch_dim] == samples else 0
    if found.dim() and found.shape[axis] == samples:
        return _real(found.movedim(axis, 0).reshape(samples, -1))
    if batch_dim == 0 and found.dim() and len(found) % samples == 0 and len(found):
        return _real(found.reshape(samples, -1))  # positions folded into the batch
    return None


def _real(h: Tensor) -> Tensor:
    return (torch.view_as_real(h).flatten(1) if h.is_complex() else h).detach()
