"""Choose a hyperparameter on the validation split, with the same number of trials for every arm."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Generic, TypeVar

from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.lab.experiment import Arm, Better, Metric
from weightsmith.lab.job import Job
from weightsmith.lab.task import Task
from weightsmith.lab.tasks import TaskConfig
from weightsmith.lab.train import Fitted

Result = TypeVar("Result")


def chosen_rate(
    arms: Sequence[Arm], label: str = "chosen learning rate", help: str = "The rate with the best validation score."
) -> Metric:
    """What tells which learning rate each arm has chosen, as ``best_lr``: a choice between near equals."""
    return Metric("best_lr", label, None, ".3g", help=help, chosen_by=tuple(arm.name for arm in arms))


@dataclass(frozen=True, slots=True)
class Trial(Generic[Result]):
    """One value that was tried.

    Attributes:
        value: The hyperparameter.
        score: On the validation split; ``nan`` when training diverged.
        result: What else came out, for example the trained model.
    """

    value: float
    score: float
    result: Result


@dataclass(frozen=True, slots=True)
class Swept(Generic[Result]):
    """The outcome of a sweep.

    Attributes:
        best: The trial with the best score; its result is the only one that is kept.
        at_edge: The best value is the smallest or the largest that was tried: a better one may lie beyond.
        trials: How many values were tried.
    """

    best: Trial[Result]
    at_edge: bool
    trials: int


def sweep(
    values: Sequence[float],
    attempt: Callable[[float, int], tuple[float, Result]],
    *,
    more: int = 0,
    better: Better = "higher",
) -> Swept[Result]:
    """Try every value, then ``more`` around the best one; every arm of an experiment gets the same number of trials.

    While the best value is the smallest or the largest so far, the next trial lies beyond it, at the ratio of the two
    outermost values; otherwise it is the geometric mean of the best value and its better neighbor.

    Args:
        values: What to try first, for example learning rates; all above 0 if there are ``more``.
        attempt: ``(value, number of the trial from 0) -> (validation score, result)``; a score that is not finite loses
            to every other.
        more: Trials after those.
        better: Which scores are good.

    Returns:
        The best trial; ties go to the earlier one.

    Raises:
        UsageError: ``values`` is empty, holds a value twice, or one that is out of range.
    """
    if not values or len(set(values)) < len(values) or not all(map(math.isfinite, values)):
        raise UsageError(f"values must be different numbers, got {values}")
    if more and min(values) <= 0:
        raise UsageError(f"values must be above 0 for {more} more trials at their ratios, got {values}")
    sign = 1.0 if better == "higher" else -1.0
    scores: dict[float, float] = {}
    best: Trial[Result] | None = None
    for number in range(len(values) + more):
        value = values[number] if number < len(values) else _next(scores)
        score, result = attempt(value, number)
        scores[value] = sign * score if math.isfinite(score) else -math.inf
        if best is None or scores[value] > scores[best.value]:
            best = Trial(value, score, result)
    assert best is not None
    return Swept(best, len(scores) > 1 and best.value in (min(scores), max(scores)), len(scores))


def _next(scores: dict[float, float]) -> float:
    tried = sorted(scores)
    if max(scores.values()) == -math.inf:  # all diverged: only a smaller one can help
        return tried[0] / (math.sqrt(10) if len(tried) == 1 else tried[1] / tried[0])
    at = tried.index(max(scores, key=lambda value: scores[value]))
    if len(tried) == 1:
        return tried[0] * math.sqrt(10)
    if at == 0:
        return tried[0] ** 2 / tried[1]
    if at == len(tried) - 1:
        return tried[-1] ** 2 / tried[-2]
    neighbor = max(tried[at - 1], tried[at + 1], key=lambda value: scores[value])
    return math.sqrt(tried[at] * neighbor)


@dataclass(frozen=True, slots=True)
class Tuned:
    """A model at the hyperparameter that the validation split prefers.

    Attributes:
        value: That hyperparameter.
        model: The model, trained with it.
        score: On the test split, per example where there is a score for each.
        at_edge: See `Swept`.
    """

    value: float
    model: nn.Module
    score: float | Tensor
    at_edge: bool


def tune(
    config: TaskConfig,
    task: Task,
    job: Job,
    values: Sequence[float],
    train: Callable[[float, Path], Fitted],
    *,
    more: int = 0,
    metric: str = "score",
) -> Tuned:
    """Train at several values, choose on the validation split, and read the test split for the best so far only.

    Each trial is recorded as a row of the phase ``sweep``. The job counts as diverged when every trial has.

    Args:
        config: Says how models are scored.
        task: What is trained.
        job: Whose folder and record are used.
        values: Of the hyperparameter, tried first; every arm should get the same number.
        train: ``(value, folder) -> Fitted``; the folder is the trial's own.
        more: Trials around the best value after those.
        metric: Key of the test score in the rows.
    """
    if not task.rows.get("validation", 1):
        raise UsageError("validation_fraction must be above 0: hyperparameters are chosen on the validation rows")
    better = task.metric.better or "higher"
    sign = 1.0 if better == "higher" else -1.0
    best = -math.inf
    test: float | Tensor = math.nan

    def attempt(value: float, number: int) -> tuple[float, nn.Module]:
        nonlocal best, test
        fitted = train(value, job.folder / f"trial-{number}")
        score = math.nan if fitted.diverged else _mean(config.score(task, fitted.model, "validation"))
        if math.isfinite(score) and sign * score > best:
            best, test = sign * score, config.score(task, fitted.model)
        job.record({"trial": number + 1, "rate": value, "score": score, metric: _mean(test)}, phase="sweep")
        return score, fitted.model

    swept = sweep(values, attempt, more=more, better=better)
    job.diverged = job.diverged or not math.isfinite(best)
    job.record({"at_edge": float(swept.at_edge)}, phase="swept")
    return Tuned(swept.best.value, swept.best.result, test, swept.at_edge)


def _mean(score: float | Tensor) -> float:
    return float(score.double().mean()) if isinstance(score, Tensor) else score
