"""The step and zero-point to begin with: from the largest weights, or searched for the smallest rounding error.

The searches minimize the mean of ``|w - w_hat|^2.4`` as in the FlexRound authors' code (arXiv 2306.00317) and in BRECQ
(arXiv 2102.05426). All rows are searched at once, in chunks.
"""

import torch
from torch import Tensor

from weightsmith.quantize.grid import Grid

SMALLEST_STEP = 1e-8
_POWER = 2.4
_CHUNK = 2**22  # elements searched at once


@torch.no_grad()
def find_step(rows: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    """Find step and zero-point of each row.

    Args:
        rows: ``(R, N)``, float32 or float64; each row gets a step of its own.
        grid: Its ``granularity`` is not looked at.

    Returns:
        ``(step, zero_point)``, both ``(R, 1)`` in the dtype of ``rows``; zero-points are whole numbers.
    """
    one_sided = bool((rows >= 0).all() or (rows <= 0).all())
    chunk = max(1, _CHUNK // rows.shape[1])
    found = [_find(part, grid, one_sided) for part in rows.split(chunk)]
    step, zero = (torch.cat(parts) for parts in zip(*found, strict=True))
    return step, zero


def _find(rows: Tensor, grid: Grid, one_sided: bool) -> tuple[Tensor, Tensor]:
    low, high = rows.amin(1, keepdim=True).clamp_max(0), rows.amax(1, keepdim=True).clamp_min(0)
    if grid.search == "minmax":
        return _step(low, high, grid)
    if grid.search == "shrink":
        return _best(rows, grid, [(low * (1 - 0.01 * i), high * (1 - 0.01 * i)) for i in range(80)])
    if grid.symmetric or one_sided:
        # the symmetric step looks at the larger end only, so [0, t] stands for [-t, t]
        most = torch.maximum(high, -low)
        ends = [(low.sign() * most * (i / 100), high.sign() * most * (i / 100)) for i in range(1, 101)]
        return _best(rows, grid, ends)
    return _best_window(rows, low, high, grid.levels)


def _step(low: Tensor, high: Tensor, grid: Grid) -> tuple[Tensor, Tensor]:
    if grid.symmetric:
        most = torch.maximum(high, -low)
        step = most / (2 ** (grid.bits - 1) - 1) if grid.narrow else 2 * most / grid.levels
        return step.clamp_min(SMALLEST_STEP), torch.zeros_like(step)
    step = ((high - low) / grid.levels).clamp_min(SMALLEST_STEP)
    return step, (-(low / step).round()).clamp(0, grid.levels)


def _best(rows: Tensor, grid: Grid, ends: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    smallest, largest = grid.code_range
    best, step, zero = (torch.full_like(rows[:, :1], torch.inf) for _ in range(3))
    for low, high in ends:
        new_step, new_zero = _step(low, high, grid)
        error = _error(rows, (rows / new_step).round_(), new_step, smallest - new_zero, largest - new_zero)
        better = error < best
        best, step, zero = (
            torch.where(better, new, old) for new, old in ((error, best), (new_step, step), (new_zero, zero))
        )
    return step, zero


def _best_window(rows: Tensor, low: Tensor, high: Tensor, levels: int) -> tuple[Tensor, Tensor]:
    """Search the width of the range and its place around zero: 100 widths, every zero-point that can be best.

    A window that sticks out of the weights by more than a step is never better than the same window shifted back, and
    of the k-th smallest and the k-th largest weight at least one misses the window by half of what their distance
    exceeds it. The first shortens the list of zero-points, the second tells when narrower windows cannot win.
    """
    full = high - low
    ordered = rows.sort(1).values
    half = rows.shape[1] // 2
    gaps = ordered.flip(1)[:, :half] - ordered[:, :half]
    best, step, zero = (torch.full_like(low, torch.inf) for _ in range(3))
    active = torch.arange(len(rows), device=rows.device)
    for percent in range(100, 0, -1):
        width = full[active] * (percent / 100)
        out_of_reach = ((gaps[active] - width) / 2).clamp_min_(0).pow_(_POWER).sum(1, keepdim=True) * 2 / rows.shape[1]
        active = active[(out_of_reach <= best[active]).flatten()]
        if not len(active):
            break
        part, width = rows[active], full[active] * (percent / 100)
        new_step = (width / levels).clamp_min(SMALLEST_STEP)
        codes = (part / new_step).round_()
        last = (1 - low[active] / new_step).floor_().clamp_(0, levels)
        first = torch.minimum((levels - 1 - high[active] / new_step).ceil_().clamp_(0, levels), last)
        new_best, new_zero = torch.full_like(width, torch.inf), torch.zeros_like(width)
        for shift in range(int((last - first).max()) + 1):
            tried = torch.minimum(first + shift, last)
            error = _error(part, codes, new_step, -tried, levels - tried)
            better = error < new_best
            new_best, new_zero = torch.where(better, error, new_best), torch.where(better, tried, new_zero)
        won = (new_best <= best[active]).flatten()
        best[active[won]], step[active[won]] = new_best[won], new_step[won]
        zero[active[won]] = (new_zero * width / levels / new_step).round()[won]
    return step, zero


def _error(rows: Tensor, codes: Tensor, step: Tensor, low: Tensor, high: Tensor) -> Tensor:
    return codes.clamp(low, high).mul_(step).sub_(rows).abs_().pow_(_POWER).mean(1, keepdim=True)
