"""How much a weight counts: what is ranked when the smallest are pruned."""

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, unknown

Score = Literal["magnitude", "magnitude_normalized", "magnitude_times_init", "random"]
SCORES: tuple[Score, ...] = ("magnitude", "magnitude_normalized", "magnitude_times_init", "random")


def check_score(score: str) -> None:
    """Refuse a name that is not known.

    Raises:
        UsageError: It is none of ``SCORES``.
    """
    if score not in SCORES:
        raise unknown("score", score, SCORES)


def scorer(score: Score, start: float, seed: int) -> Callable[[Tensor, int], Tensor]:
    """Make a function from a piece of a weight to the score of its entries.

    ``magnitude``: ``|w|``. ``magnitude_normalized``: ``|w|`` over the root mean square of the tensor's first values, so
    that layers of different width compare; a global threshold on bare magnitudes empties wide layers whose training is
    short. ``magnitude_times_init``: ``|w|`` of pieces that hold ``w * w_init``. ``random``: a fixed random order.

    Args:
        score: Which one.
        start: Root mean square of the tensor's first values.
        seed: Of the random order, one per tensor.

    Returns:
        ``(piece (n,), position of the piece) -> (n,)``, float32, or float64 for such weights; never below 0. Entries
        that are 0 score 0.
    """
    # a tensor that starts at zero, such as the last layer of a residual block, is not scaled
    scale = start if score == "magnitude_normalized" and start > 0 else 1.0

    def magnitude(piece: Tensor, _: int) -> Tensor:
        wide = piece if piece.dtype == torch.float64 else piece.float()
        return wide.abs() / scale if scale != 1.0 else wide.abs()

    def random(piece: Tensor, position: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
        return torch.rand(len(piece), generator=generator).clamp_min(1e-9) * (piece != 0)

    return random if score == "random" else magnitude


def check_min_density(min_density: float) -> None:
    """Refuse a least density outside ``[0, 1)``.

    Raises:
        UsageError: Names it.
    """
    if not 0 <= min_density < 1:
        raise UsageError(f"min_density must be a fraction from 0 up to but not including 1, got {min_density}")


def check_amount(amount: float) -> float:
    """Refuse a share outside ``[0, 1)``.

    Raises:
        UsageError: Says that shares are fractions.
    """
    if isinstance(amount, bool) or not isinstance(amount, int | float) or not 0 <= amount < 1:
        raise UsageError(f"amount must be a fraction from 0 up to but not including 1, got {amount!r}")
    return float(amount)


def pattern_sizes(pattern: str) -> tuple[int, int]:
    """How many entries of how many a pattern keeps: ``"2:4"`` or ``"4:8"``.

    Raises:
        UsageError: The pattern is another.
    """
    sizes = {"2:4": (2, 4), "4:8": (4, 8)}
    if pattern not in sizes:
        raise UsageError(f"pattern must be one of {', '.join(sizes)}, got {pattern!r}")
    return sizes[pattern]


def semi_structured(weight: Tensor, keep: int, of: int, *, axis: int = 0, stacked: bool = False) -> Tensor:
    """Mask that keeps the ``keep`` largest of every ``of`` neighbors along the inputs, as 2:4 kernels want it.

    Args:
        weight: ``(out, in, ...)`` or as ``axis`` says; ``in`` times the kernel's size must be a multiple of ``of``.
        keep: Entries kept.
        of: Size of a group.
        axis: Where the outputs are, see `weightsmith.core.weights.Layout`.
        stacked: Whether the first axis counts matrices.

    Returns:
        A boolean mask of the weight's shape.

    Raises:
        UsageError: The inputs are no multiple of ``of``.
    """
    first = int(stacked)
    rows = weight.detach().movedim(axis, first) if weight.dim() > 1 else weight.detach()[None]
    flat = rows.reshape(rows.shape[: first + 1].numel(), -1)
    if flat.shape[1] % of:
        raise UsageError(f"the inputs of a weight {tuple(weight.shape)} are no multiple of {of}")
    groups = (flat if flat.dtype == torch.float64 else flat.float()).abs().reshape(-1, of)
    kept = groups.topk(keep, dim=1).indices
    mask = torch.zeros(groups.shape, dtype=torch.bool, device=weight.device).scatter_(1, kept, True)
    mask = mask.reshape(rows.shape)
    return mask.movedim(first, axis) if weight.dim() > 1 else mask[0]
