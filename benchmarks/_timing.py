"""Time several callables fairly: interleaved in one process, so that a noisy machine slows all of them equally."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds that one callable took, one entry per round."""

    seconds: tuple[float, ...]

    @property
    def min(self) -> float:
        """The fastest round: the least disturbed one."""
        return min(self.seconds)

    @property
    def median(self) -> float:
        """The typical round."""
        return statistics.median(self.seconds)


def interleave(
    callables: Mapping[str, Callable[[], object]], *, rounds: int = 10, warmup: int = 2
) -> dict[str, Timing]:
    """Call each of ``callables`` once per round, in turn.

    Args:
        callables: What to time, by name; each takes no argument.
        rounds: How many measured rounds.
        warmup: How many rounds before them are not measured (allocation, compilation).

    Returns:
        The times of each callable, in the same order.
    """
    seconds: dict[str, list[float]] = {name: [] for name in callables}
    for index in range(warmup + rounds):
        for name, call in callables.items():
            start = time.perf_counter()
            call()
            elapsed = time.perf_counter() - start
            if index >= warmup:
                seconds[name].append(elapsed)
    return {name: Timing(tuple(times)) for name, times in seconds.items()}


def show(title: str, timings: Mapping[str, Timing], *, baseline: str) -> None:
    """Print a table of milliseconds and of ratios to ``baseline`` (below 1: faster than it).

    Args:
        title: Heading of the table.
        timings: What ``interleave`` returned.
        baseline: The name whose time is 1.
    """
    table = Table(title=title)
    table.add_column("")
    for heading in ("min ms", "median ms", "min ratio", "median ratio"):
        table.add_column(heading, justify="right")
    base = timings[baseline]
    for name, timing in timings.items():
        table.add_row(
            name,
            f"{timing.min * 1e3:.2f}",
            f"{timing.median * 1e3:.2f}",
            f"{timing.min / base.min:.2f}x",
            f"{timing.median / base.median:.2f}x",
        )
    Console().print(table)
