"""Who evaluates: this process, worker processes on this machine, or the workers of a Ray cluster.

Weights travel once per generation. A worker that dies is replaced and its individual evaluated again.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import cloudpickle

from weightsmith.core.errors import UsageError, reason
from weightsmith.search.evaluation import Evaluation, Individual, Values, Weights
from weightsmith.search.outcomes import EvaluateAll, EvaluationFailed
from weightsmith.search.processes import processes
from weightsmith.search.ray_workers import actors_of
from weightsmith.search.resources import Resources


@contextlib.contextmanager
def workers_for(evaluate: Callable[..., Any], model: Any, resources: Resources) -> Iterator[EvaluateAll]:
    """Start what evaluates, for as long as the block runs."""
    options = {"threads": resources.threads, "device": resources.device}
    if resources.engine == "local" and (resources.workers or 1) == 1:
        yield _here(Evaluation(evaluate, model, **options))  # type: ignore[arg-type]
        return
    try:
        payload = cloudpickle.dumps((evaluate, model, options))
    except Exception as error:  # whatever user code raises while it is pickled
        raise UsageError(
            f"evaluate and model must be picklable to be sent to workers, got {reason(error)}: pass workers=1, or a "
            "model that holds only what is evaluated"
        ) from error
    made = processes if resources.engine == "local" else actors_of
    with made(payload, resources) as evaluate_all:
        yield evaluate_all


def _here(evaluation: Evaluation) -> EvaluateAll:
    def evaluate_all(weights: Weights, individuals: Sequence[Individual]) -> Iterator[tuple[int, Values]]:
        evaluation.load(weights)
        for individual in individuals:
            try:
                yield individual.slot, evaluation(individual)
            except UsageError:
                raise
            except Exception as error:
                raise EvaluationFailed(f"evaluating {individual.genotype} failed: {reason(error)}") from error

    return evaluate_all
