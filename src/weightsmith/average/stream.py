"""Average checkpoints of any size in constant memory: a piece of every file, their mean, the next piece.

``theta = theta_n + sum_i w_i (theta_i - theta_n)`` equals ``sum_i w_i theta_i`` because weights sum to 1; written so,
equal checkpoints average to exactly themselves, and each one's distance from the newest comes for free. Sums are kept
in float64: in float32 some ten in a million bfloat16 results would be rounded to the wrong neighbor.
"""

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from weightsmith.average.sources import Place, finite, narrowed

_BYTES_PER_ELEMENT = 32  # the newest's, the difference, the sum, and what is read or written, at most 8 each


class Mean:
    """The weighted mean of checkpoints, tensor by tensor, and how far each is from the newest.

    Args:
        shares: ``(n,)``, weights of sum 1, oldest first.
        dtype: What floating-point tensors are written as; ``None``: the newest's.
        chunk_mb: Memory for all working buffers together.
    """

    def __init__(self, shares: Sequence[float], *, dtype: torch.dtype | None = None, chunk_mb: float = 16) -> None:
        self._shares, self._dtype = list(shares), dtype
        self._piece = max(1, int(chunk_mb * 2**20) // _BYTES_PER_ELEMENT)
        self._squares = [0.0] * len(shares)
        self._norm = 0.0

    def dtype_of(self, newest: Place) -> torch.dtype:
        """What a tensor is written as."""
        return self._dtype if self._dtype is not None and newest.dtype.is_floating_point else newest.dtype

    @property
    def measured(self) -> bool:
        """Whether there is anything that distances could be about."""
        return self._norm > 0

    def distances(self) -> list[float]:
        """``||theta_i - theta_n|| / ||theta_n||`` over all tensors averaged so far."""
        return [math.sqrt(square / self._norm) for square in self._squares]

    def measure(self, name: str, places: Sequence[Place]) -> None:
        """Take a tensor that is averaged elsewhere into the distances."""
        for _ in self.pieces(name, places):
            pass

    def pieces(self, name: str, places: Sequence[Place]) -> Iterator[Tensor]:
        """Average one tensor.

        Args:
            name: For errors.
            places: The tensor in every checkpoint, oldest first.

        Yields:
            Consecutive elements; each piece is overwritten by the next.

        Raises:
            UsageError: A checkpoint holds NaN or infinity there, or the mean does not fit into the dtype asked for.
        """
        newest = places[-1]
        count, length = math.prod(newest.shape), self._piece
        if not newest.dtype.is_floating_point:
            yield from _copied(newest, count, length)
            return
        base, difference, total = (torch.empty(min(count, length), dtype=torch.float64) for _ in range(3))
        written = self.dtype_of(newest)
        for first in range(0, count, length):
            n = min(length, count - first)
            here, away, mean = base[:n], difference[:n], total[:n]
            _read(newest, first, here)
            self._norm += self._square(here, newest, name)
            mean.copy_(here)
            for index, place in enumerate(places[:-1]):
                _read(place, first, away)
                self._squares[index] += self._square(away.sub_(here), place, name)
                mean.add_(away, alpha=self._shares[index])
            yield narrowed(mean, written, name) if self._dtype is not None else mean.to(written)

    def _square(self, x: Tensor, place: Place, name: str) -> float:
        square = torch.dot(x, x).item()
        if not math.isfinite(square):
            finite(x, place, name)  # else its values are finite and only their squares are not
        return square


def _read(place: Place, first: int, into: Tensor) -> None:
    if place.dtype == into.dtype:
        place.read(into, first)
    else:
        raw = torch.empty(len(into), dtype=place.dtype)
        place.read(raw, first)
        into.copy_(raw)


def _copied(place: Place, count: int, length: int) -> Iterator[Tensor]:
    for first in range(0, count, length):
        piece = torch.empty(min(length, count - first), dtype=place.dtype)
        place.read(piece, first)
        yield piece
