"""The tangent kernel from random directions: ``K = mean of (J v)(J v)^T`` over normal ``v``, in forward mode.

The kernel is never formed. Inner products of two kernels come from pairs of different directions, ``(f_i . g_j)^2``
with ``i != j``, and so are unbiased: with equal directions the noise of a sketch would count as a difference.
"""

import logging
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.func import jvp, vmap

from weightsmith.diagnose._function import Function
from weightsmith.diagnose._jacobian import gradients
from weightsmith.diagnose.alignment import ratio

_log = logging.getLogger(__name__)
_MOST_AT_ONCE = 32

Direction = dict[str, Tensor]


def factors(function: Function, probes: int, seed: int, dtype: torch.dtype, budget: int) -> Tensor:
    """``J v`` for the directions that belong to ``seed``, the same before and after training: ``(N, O, probes)``."""
    found: list[Tensor] = []
    size = sum(parameter.numel() * parameter.itemsize for parameter in function.params.values())
    at_once = max(1, min(_MOST_AT_ONCE, budget // (8 * size)))
    ways = [_several, _one_by_one, _twice, _by_gradients]
    while len(found) < probes:
        count = min(at_once, probes - len(found))
        directions = [_direction(function, seed * 1_000_003 + len(found) + index) for index in range(count)]
        try:
            found += [part.to(dtype) for part in ways[0](function, directions)]
        except (RuntimeError, NotImplementedError) as error:  # an operation without a batched or forward derivative
            if len(ways) == 1:
                raise
            _log.debug("%s cannot differentiate this model: %s", ways.pop(0).__name__, error)
    return torch.stack(found, -1)


def _direction(function: Function, seed: int) -> Direction:
    generator = torch.Generator().manual_seed(seed)
    return {name: _normal(parameter, generator).to(parameter) for name, parameter in function.params.items()}


def _normal(parameter: Tensor, generator: torch.Generator) -> Tensor:
    """Standard normal numbers; torch's complex ones have that variance in both parts together, not in each."""
    if not parameter.is_complex():
        return torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
    return torch.randn(parameter.shape, generator=generator, dtype=torch.complex128) * math.sqrt(2)


def _several(function: Function, directions: list[Direction]) -> list[Tensor]:
    values = {name: parameter.detach() for name, parameter in function.params.items()}
    stacked = {name: torch.stack([direction[name] for direction in directions]) for name in values}
    with torch.no_grad():
        found = vmap(lambda direction: jvp(function.batch, (values,), (direction,))[1])(stacked)
    return list(found.detach())


def _one_by_one(function: Function, directions: list[Direction]) -> list[Tensor]:
    values = {name: parameter.detach() for name, parameter in function.params.items()}
    with torch.no_grad():
        return [jvp(function.batch, (values,), (direction,))[1].detach() for direction in directions]


def _twice(function: Function, directions: list[Direction]) -> list[Tensor]:
    """``J v`` as the derivative of ``J^T u . v`` by ``u``, which needs no forward mode."""
    params = list(function.params.values())
    with torch.backends.mkldnn.flags(enabled=False):
        out = function.batch()
        u = torch.zeros_like(out, requires_grad=True)
        back = torch.autograd.grad(out, params, u, create_graph=True, allow_unused=True)
        return [_along(back, list(direction.values()), u) for direction in directions]


def _by_gradients(function: Function, directions: list[Direction]) -> list[Tensor]:
    """``J v`` from the gradients of one sample at a time, for operations that have a first derivative only."""
    params = list(function.params.values())
    found: list[list[Tensor]] = [[] for _ in directions]
    for sample in range(function.samples):
        parts = gradients(function.part(sample, sample + 1).batch()[0], params)
        for products, direction in zip(found, directions, strict=True):
            products.append(
                torch.stack([_dot(part, v) for part, v in zip(parts, direction.values(), strict=True)]).sum(0)
            )
    return [torch.stack(products) for products in found]


def _dot(part: Tensor, v: Tensor) -> Tensor:
    """Products ``(O,)`` of derivatives ``(O, ...)`` with a direction ``(...)``, real and imaginary parts apart."""
    if part.is_complex():
        part, v = torch.view_as_real(part), torch.view_as_real(v)
    return part.reshape(len(part), -1) @ v.flatten()


def _along(back: Sequence[Tensor | None], direction: list[Tensor], u: Tensor) -> Tensor:
    total = sum(
        (torch.view_as_real(grad) * torch.view_as_real(v)).sum() if grad.is_complex() else (grad * v).sum()
        for grad, v in zip(back, direction, strict=True)
        if grad is not None
    )
    if not isinstance(total, Tensor) or not total.requires_grad:
        return torch.zeros_like(u)
    return torch.autograd.grad(total, u, retain_graph=True)[0].detach()


def inner(one: Tensor, other: Tensor) -> Tensor:
    """``(probes, probes)``: inner products of the kernels of single directions, ``|F_i^T G_j|^2``.

    Args:
        one: ``(R, Q, probes)``: rows of the kernel, and what it is summed over.
        other: The same.
    """
    rows, summed, probes = one.shape
    f, g = (t.double().reshape(rows, summed * probes) for t in (one, other))
    return (f.T @ g).square().reshape(summed, probes, summed, probes).sum((0, 2))


def alignment(before: Tensor, after: Tensor, what: str) -> tuple[float, float]:
    """The alignment of two sketched kernels and its standard error, by leaving out one direction at a time.

    Args:
        before: ``(R, Q, probes)``.
        after: The same, with the same directions.
        what: For warnings.
    """
    probes = before.shape[2]
    products = [inner(a, b) for a, b in ((before, after), (before, before), (after, after))]
    sums = [m.sum() - m.diagonal().sum() for m in products]
    product, first, second = (total.item() / (probes * (probes - 1)) for total in sums)
    value = ratio(product, first, second, what)
    if math.isnan(value):
        return value, math.nan
    without = []
    for m, total in zip(products, sums, strict=True):
        own = m.sum(0) + m.sum(1) - 2 * m.diagonal()
        without.append((total - own) / ((probes - 1) * (probes - 2)))
    cosines = without[0] / (without[1].clamp_min(1e-300) * without[2].clamp_min(1e-300)).sqrt()
    error = ((probes - 1) * (cosines - cosines.mean()).square().mean()).sqrt().item()
    return value, error
