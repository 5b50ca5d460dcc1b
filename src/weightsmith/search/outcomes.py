"""What became of an evaluation in a worker: values, the user's error, or a dead process."""

import traceback
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from weightsmith.core.errors import UsageError, reason
from weightsmith.search.evaluation import Evaluation, Individual, Values, Weights

EvaluateAll = Callable[[Weights, Sequence[Individual]], Iterator[tuple[int, Values]]]
"""``(weights, individuals) -> (slot, values)`` in the order in which they get ready."""

_MOST_DEATHS = 3


class EvaluationFailed(RuntimeError):
    """The user's function raised, or killed its process again and again; the message holds the genotype."""


def outcome(evaluation: Evaluation, individual: Individual) -> tuple[str, Any]:
    """Evaluate in a worker: ``("done", values)``, or what went wrong as text that any process can read."""
    try:
        return "done", evaluation(individual)
    except UsageError as error:
        return "refused", str(error)
    except Exception as error:
        return "failed", f"{reason(error)}\n{traceback.format_exc()}"


def values_of(individual: Individual, kind: str, found: Any) -> Values:
    """The values, or the worker's error raised here."""
    if kind == "refused":
        raise UsageError(found)
    if kind == "failed":
        raise EvaluationFailed(f"evaluating {individual.genotype} failed: {found}")
    values: Values = found
    return values


class Deaths:
    """Counts how often the worker of an individual died."""

    def __init__(self) -> None:
        self._deaths: dict[int, int] = {}

    def count(self, individual: Individual, words: str) -> None:
        """Count one more; too many of one individual raise `EvaluationFailed`."""
        self._deaths[individual.slot] = deaths = self._deaths.get(individual.slot, 0) + 1
        if deaths >= _MOST_DEATHS:
            raise EvaluationFailed(f"{deaths} workers died while evaluating {individual.genotype}: {words}")
