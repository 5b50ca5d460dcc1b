"""New masks for weights that share a threshold, in the memory of one piece of a weight at a time."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from weightsmith.prune.ranking import percentile

_PIECE = 1 << 17  # fits a cache, with what is computed from it
_STRIDE = 997  # prime, so that it does not fall in step with rows


@dataclass(frozen=True, slots=True)
class Ranked:
    """A weight, its present mask, and how its entries are scored.

    Attributes:
        weight: Any shape, pruned entries zero.
        mask: Boolean, of the same shape.
        score: See `weightsmith.prune.scoring.scorer`.
    """

    weight: Tensor
    mask: Tensor
    score: Callable[[Tensor, int], Tensor]

    def pieces(self, dtype: torch.dtype) -> Iterator[tuple[int, Tensor]]:
        """Scores on the CPU, piece by piece, with the position of each piece's first entry."""
        flat = self.weight.reshape(-1)
        for position in range(0, len(flat), _PIECE):
            yield position, self.score(flat[position : position + _PIECE].cpu(), position).to(dtype).contiguous()


def prune_ranked(
    weights: Sequence[Ranked], amount: float, *, exact: bool = False, min_density: float = 0.0
) -> list[Tensor] | None:
    """Remove the lowest share of the nonzero scores.

    Args:
        weights: What shares the threshold.
        amount: The share.
        exact: Break ties by position.
        min_density: Every weight keeps at least this share of its entries.

    Returns:
        New masks on the CPU; ``None``: all scores are 0.
    """
    # half precision is ranked in float32, which holds its values exactly
    double = any(ranked.weight.dtype == torch.float64 for ranked in weights)
    dtype = torch.float64 if double else torch.float32

    def scores() -> Iterator[Tensor]:
        return (piece for ranked in weights for _, piece in ranked.pieces(dtype))

    sample = torch.cat([ranked.score(ranked.weight.reshape(-1)[::_STRIDE].cpu(), 0).to(dtype) for ranked in weights])
    cut = percentile(scores, amount, sample)
    if cut is None:
        return None
    threshold, index = cut
    ties_to_remove = 0
    if exact:
        ties_to_remove = index - sum(int(((piece > 0) & (piece < threshold)).sum()) for piece in scores())
    found = []
    for ranked in weights:
        kept = np.empty(ranked.mask.numel(), bool)
        for position, piece in ranked.pieces(dtype):
            values, keep = piece.numpy(), kept[position : position + len(piece)]
            np.greater_equal(values, threshold, out=keep)
            if ties_to_remove:
                ties = np.flatnonzero(values == threshold)[:ties_to_remove]
                keep[ties] = False
                ties_to_remove -= len(ties)
        kept &= ranked.mask.reshape(-1).cpu().numpy()
        least = math.ceil(min_density * len(kept))
        mask = torch.from_numpy(kept).reshape(ranked.mask.shape)
        found.append(_highest(ranked, least, dtype) if np.count_nonzero(kept) < least else mask)
    return found


def _highest(ranked: Ranked, count: int, dtype: torch.dtype) -> Tensor:
    """The ``count`` entries of the highest score, among those that are left."""
    left = ranked.mask.reshape(-1).cpu()
    scores = torch.cat([piece for _, piece in ranked.pieces(dtype)]).masked_fill(~left, -1.0)
    best = scores.topk(min(count, int(left.count_nonzero()))).indices
    return torch.zeros_like(left).index_fill_(0, best, True).reshape(ranked.mask.shape)
