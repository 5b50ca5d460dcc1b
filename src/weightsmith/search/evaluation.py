"""One individual evaluated, in whatever process: restored weights, its generation's seed, a fixed number of threads."""

import copy
import math
import numbers
import random
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from weightsmith.core.errors import UsageError, brief
from weightsmith.search.space import Genotype

Values = dict[str, float]
_NUMBERS: tuple[type, ...] = (numbers.Real, np.number, torch.Tensor)
Weights = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Individual:
    """What is to be evaluated.

    Attributes:
        genotype: The architecture.
        slot: Its place in the population.
        generation: Counted from 0.
        seed: The same for all individuals of a generation, so that they are compared on equal random numbers.
    """

    genotype: Genotype
    slot: int
    generation: int
    seed: int


Evaluate = Callable[[Any, Individual], Mapping[str, float]]


class Evaluation:
    """Calls the user's function on a copy of the model.

    The weights are restored and the global generators seeded before each call: a result depends on nothing but weights
    and individual, whichever process computes it, in whatever order.

    Args:
        evaluate: ``(model, individual) -> values``.
        model: The super-network, or ``None``.
        threads: Torch threads while evaluating.
        device: Where the copy lives; ``""``: a GPU where there is one, if the model is not on the CPU.
    """

    def __init__(self, evaluate: Evaluate, model: nn.Module | None, *, threads: int, device: str = "") -> None:
        self._evaluate, self._threads = evaluate, threads
        self._model = copy.deepcopy(model)
        if self._model is not None and device:
            self._model.to(device)
        self._weights: Weights = {}

    def load(self, weights: Weights) -> None:
        """Take the weights of a generation."""
        self._weights = weights

    def __call__(self, individual: Individual) -> Values:
        """Evaluate.

        Raises:
            UsageError: The function returned something else than numbers by name.
        """
        if self._model is not None:
            self._model.load_state_dict(self._weights)
            self._model.eval()
        threads = torch.get_num_threads()
        torch.set_num_threads(self._threads)
        try:
            with drawing_from(individual.seed):
                found = self._evaluate(self._model, individual)
        finally:
            torch.set_num_threads(threads)
        if not isinstance(found, Mapping):
            raise UsageError(f"evaluate must return numbers by name, got {brief(found)}")
        for name, value in found.items():
            if not isinstance(name, str) or not isinstance(value, _NUMBERS):
                raise UsageError(f"evaluate must return numbers by name, got {brief(value)} under {brief(name)}")
        return {name: float(value) for name, value in found.items()}


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Seed the global generators of Python, NumPy and torch within the block; afterwards they are as before."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    devices = [torch.cuda.get_rng_state(index) for index in range(torch.cuda.device_count())]
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])
        for index, state in enumerate(devices):
            torch.cuda.set_rng_state(state, index)


def check_values(values: Values, objectives: Mapping[str, str], genotype: Genotype) -> bool:
    """Whether all objectives are finite.

    Raises:
        UsageError: One is missing.
    """
    for name in objectives:
        if name not in values:
            raise UsageError(
                f"evaluate returned no {name!r} for {genotype}; it returned {', '.join(values) or 'nothing'}"
            )
    return all(math.isfinite(values[name]) for name in objectives)
