"""How the box grows during training: from 0 to its full size, per batch."""

from typing import Any, Literal, get_args

from weightsmith.core.errors import UsageError, unknown

Shape = Literal["smoothed", "linear"]


class EpsilonSchedule:
    """The box's size by training step: 0, then a rise over ``length`` epochs, then ``eps``.

    ``"smoothed"`` is a power ``k (s - s0)^p`` for the first quarter of the rise and, with the same slope there, a
    straight line for the rest; ``"linear"`` a straight line. Source: arXiv 2103.17268 and its code.

    Args:
        eps: Final size, above 0.
        steps_per_epoch: Batches per epoch.
        start: Epoch in which the rise begins, counted from 1; its first batch still has 0.
        length: Epochs that it takes; 0: ``eps`` from the start of that epoch on.
        shape: ``"smoothed"`` or ``"linear"``.
        middle: Share of the rise that is a power.
        power: Its exponent.

    Raises:
        UsageError: An argument is out of range.

    Example:
        >>> from weightsmith.certify import EpsilonSchedule
        >>> schedule = EpsilonSchedule(0.4, 5, length=4)
        >>> schedule.value(0), round(schedule.value(6), 4), schedule.value(20)
        (0.0, 0.0554, 0.4)
    """

    def __init__(
        self, eps: float, steps_per_epoch: int, *, start: int = 1, length: int = 20, shape: Shape = "smoothed",
        middle: float = 0.25, power: float = 4.0,
    ) -> None:  # fmt: skip
        if not 0 < eps < float("inf"):
            raise UsageError(f"eps must be above 0 and finite, got {eps}")
        if steps_per_epoch < 1 or start < 1 or length < 0:
            raise UsageError(
                "steps_per_epoch and start must be at least 1 and length at least 0, got "
                f"{steps_per_epoch}, {start} and {length}"
            )
        if shape not in get_args(Shape):
            raise unknown("shape", str(shape), get_args(Shape))
        if not 0 <= middle < 1 or power < 1:
            raise UsageError(f"middle must be in [0, 1) and power at least 1, got {middle} and {power}")
        self.eps_target, self.shape = eps, shape
        self.first, self.last = (start - 1) * steps_per_epoch, (start + length - 1) * steps_per_epoch
        self.middle = self.first + int(middle * (self.last - self.first))
        self.power, self.at = power, 0

    def value(self, step: int) -> float:
        """The size at a step: the number of training batches before it."""
        first, last, middle, p = self.first, self.last, self.middle, self.power
        if first == last:
            return self.eps_target if step >= first else 0.0
        if step <= first:
            return 0.0
        if step >= last:
            return self.eps_target
        if self.shape == "linear" or middle == first:
            return self.eps_target * (step - first) / (last - first)
        rise = float(middle - first)
        k = self.eps_target / ((last - middle) * p * rise ** (p - 1) + rise**p)
        if step < middle:
            size: float = k * float(step - first) ** p
            return size
        reached = k * rise**p
        size = min(reached + (self.eps_target - reached) * (step - middle) / (last - middle), self.eps_target)
        return size

    @property
    def eps(self) -> float:
        """The present size."""
        return self.value(self.at)

    @property
    def warming_up(self) -> bool:
        """Whether the rise is not over: the epochs before ``start + length``."""
        return self.at < self.last

    def step(self) -> None:
        """Count one training batch."""
        self.at += 1

    def state_dict(self) -> dict[str, Any]:
        """The number of batches so far."""
        return {"step": self.at}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self.at = int(state["step"])
