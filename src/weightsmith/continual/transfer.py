"""What was lost and gained while tasks came one after another, in the measures of the field.

``A[j, i]`` is the score on task ``i`` after training task ``j``, of ``T`` tasks.

Source: arXiv 2410.10868, equations 49 to 54; "mean over steps" is the average incremental accuracy of earlier papers.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Literal

from weightsmith.core.errors import UsageError, unknown

Better = Literal["higher", "lower"]


@dataclass(frozen=True, slots=True)
class Transfer:
    """A sequence of tasks in five numbers; ``nan`` where too few tasks have been trained.

    Attributes:
        final: ``mean_i A[T, i]``: at the end, on all tasks. Also known as MFN or average accuracy.
        over_steps: Mean over ``j`` of ``mean_{i <= j} A[j, i]``: on the tasks seen, after every task. MAA.
        new: ``mean_i A[i, i]``: right after each task. MFT.
        forgetting: ``mean_{i < T} (max_{i <= j < T} A[j, i] - A[T, i])``: lost since the best; at best 0 or less.
        backward: ``mean_{i < T} (A[T, i] - A[i, i])``: gained since it was trained. BWT.
        forward: ``mean_{i > 1} A[i - 1, i]``: on a task before it is trained; nothing is subtracted. FWT.
    """

    final: float
    over_steps: float
    new: float
    forgetting: float
    backward: float
    forward: float


def transfer(rows: Sequence[tuple[str, Mapping[str, float]]], *, better: Better = "higher") -> Transfer:
    """Compute the measures.

    Args:
        rows: After every task its name, and the scores of all tasks by name. A task that comes again counts from its
            first time on.
        better: Which direction of a score is good; with ``"lower"`` forgetting is a rise, and backward transfer a fall.

    Raises:
        UsageError: There is no row, or a score of a trained task is missing.
    """
    if better not in ("higher", "lower"):
        raise unknown("better", str(better), ("higher", "lower"))
    if not rows:
        raise UsageError("rows must hold at least one task")
    sign = 1.0 if better == "higher" else -1.0
    learnt: dict[str, int] = {}
    for at, (task, _) in enumerate(rows):
        learnt.setdefault(task, at)
    for task, scores in rows:
        if missing := [name for name in learnt if name not in scores]:
            raise UsageError(f"the row after {task!r} has no score of {missing[0]!r}")
    a = [[sign * scores[task] for task in learnt] for _, scores in rows]
    times, last = list(learnt.values()), len(rows) - 1
    earlier = [(i, time) for i, time in enumerate(times) if time < last]
    return Transfer(
        final=sign * _mean(a[last]),
        over_steps=sign
        * _mean([_mean([row[i] for i, time in enumerate(times) if time <= j]) for j, row in enumerate(a)]),
        new=sign * _mean([a[time][i] for i, time in enumerate(times)]),
        forgetting=_mean([max(a[j][i] for j in range(time, last)) - a[last][i] for i, time in earlier]),
        backward=_mean([a[last][i] - a[time][i] for i, time in earlier]),
        forward=sign * _mean([a[time - 1][i] for i, time in enumerate(times) if time > 0]),
    )


def _mean(values: Sequence[float]) -> float:
    return fmean(values) if values else math.nan
