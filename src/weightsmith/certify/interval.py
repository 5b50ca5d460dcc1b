"""Intervals of tensors, held as ends or as center and radius, whichever the last operation gave."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.graph import leaves, replaced


class Interval:
    """Every tensor ``t`` with ``lower <= t <= upper``, elementwise.

    Linear operations want center and radius, monotone ones the ends; each form is computed when it is first asked for.

    Args:
        lower: Lower ends.
        upper: Upper ends, of the same shape.
    """

    __slots__ = ("_center", "_lower", "_radius", "_upper")

    def __init__(self, lower: Tensor, upper: Tensor) -> None:
        self._lower: Tensor | None = lower
        self._upper: Tensor | None = upper
        self._center: Tensor | None = None
        self._radius: Tensor | None = None

    @classmethod
    def ball(cls, center: Tensor, radius: Tensor) -> "Interval":
        """The interval ``center - radius .. center + radius``."""
        made = cls.__new__(cls)
        made._lower = made._upper = None
        made._center, made._radius = center, radius
        return made

    @property
    def lower(self) -> Tensor:
        """Lower ends."""
        if self._lower is None:
            assert self._center is not None
            assert self._radius is not None
            self._lower = self._center - self._radius
        return self._lower

    @property
    def upper(self) -> Tensor:
        """Upper ends."""
        if self._upper is None:
            assert self._center is not None
            assert self._radius is not None
            self._upper = self._center + self._radius
        return self._upper

    @property
    def center(self) -> Tensor:
        """``(lower + upper) / 2``."""
        if self._center is None:
            self._center = (self.lower + self.upper) / 2
        return self._center

    @property
    def radius(self) -> Tensor:
        """``(upper - lower) / 2``."""
        if self._radius is None:
            self._radius = (self.upper - self.lower) / 2
        return self._radius

    @property
    def sample(self) -> Tensor:
        """A tensor of the interval's shape and type, whichever is there."""
        found = self._lower if self._lower is not None else self._center
        assert found is not None
        return found

    @property
    def shape(self) -> torch.Size:
        """Shape of both ends."""
        return self.sample.shape

    def linear(self, call: Callable[[Tensor], Tensor]) -> "Interval":
        """Apply a linear function without negative coefficients, which maps either form on its own."""
        if self._center is not None and self._radius is not None:
            return Interval.ball(call(self._center), call(self._radius))
        return Interval(call(self.lower), call(self.upper))

    def __repr__(self) -> str:
        return f"Interval{tuple(self.shape)}"


def lower(tree: Any) -> Any:
    """Arguments with every interval replaced by its lower ends."""
    return replaced(tree, lambda leaf: leaf.lower if isinstance(leaf, Interval) else leaf)


def upper(tree: Any) -> Any:
    """Arguments with every interval replaced by its upper ends."""
    return replaced(tree, lambda leaf: leaf.upper if isinstance(leaf, Interval) else leaf)


def sample(tree: Any) -> Any:
    """Arguments with every interval replaced by some tensor of its shape."""
    return replaced(tree, lambda leaf: leaf.sample if isinstance(leaf, Interval) else leaf)


def intervals(tree: Any) -> list[Interval]:
    """The intervals among arguments."""
    return [leaf for leaf in leaves(tree) if isinstance(leaf, Interval)]
