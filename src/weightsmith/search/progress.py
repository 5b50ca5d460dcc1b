"""How far a search is, told while it runs."""

import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Progress:
    """Told after every phase and every evaluation.

    Attributes:
        phase: What has just been done: ``"warm up"``, ``"train"`` or ``"evaluate"``.
        generation: Counted from 1.
        generations: How many there will be.
        individual: Evaluated in this generation.
        population: How many there are.
        best: The first objective of the best individual so far that did not fail; ``None``: none yet.
        seconds_left: From the time that this run's generations took; ``None``: none has been evaluated yet.
    """

    phase: str
    generation: int
    generations: int
    individual: int
    population: int
    best: float | None
    seconds_left: float | None


Watch = Callable[[Progress], None]


class Clock:
    """Estimates what is left; a resumed search counts what it does itself."""

    def __init__(self, total: int) -> None:
        self._total, self._begin, self._done = total, time.monotonic(), 0

    def left(self, evaluated: int, *, now: bool) -> float | None:
        """Seconds until ``total`` evaluations, of which ``evaluated`` are there, one of them done just ``now``."""
        self._done += now
        if not self._done:
            return None
        return (time.monotonic() - self._begin) / self._done * (self._total - evaluated)
