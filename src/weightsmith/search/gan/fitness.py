"""What a candidate of either stage is worth: its generator's scores and its size."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from weightsmith.search.evaluation import Individual
from weightsmith.search.gan.scoring import NotFinite, Reference, generate, recalibrate_, score
from weightsmith.search.space import Genotype
from weightsmith.search.supernet import count_parameters

OBJECTIVES: Mapping[str, Literal["min", "max"]] = {"distance": "min", "inverse_inception": "min", "parameters": "min"}
"""Fréchet distance, the reciprocal of the Inception Score, size of the stand-alone network; all minimized."""

_FAILED = {"distance": 1e9, "inverse_inception": 1.0, "inception": 1.0}


class Partners(nn.ModuleList):
    """The generators of stage 2, one per slot, or a single one that all slots share; ``evolve``'s ``model``."""

    def of(self, slot: int) -> nn.Module:
        """The generator of a slot."""
        return self[slot % len(self)]


def partners(generator: nn.Module, number: int) -> Partners:
    """Make independent copies of a generator: training one leaves the others as they are."""
    return Partners(copy.deepcopy(generator) for _ in range(number))


@dataclass(frozen=True, slots=True)
class ScoreGenerator:
    """``evaluate`` of both stages: recalibrate a copy, generate, score.

    Attributes:
        reference: The real images.
        samples: Images per individual.
        recalibrate: Give the copy's BatchNorm its own statistics first; ``False`` is the released code.
        size: ``genotype -> parameters`` where size is not that of the generator: in stage 2, of the discriminator.
    """

    reference: Reference
    samples: int = 5000
    recalibrate: bool = True
    size: Callable[[Genotype], int] | None = None

    def __call__(self, model: Any, individual: Individual) -> dict[str, float]:
        """Score an individual; the same latents for all of a generation."""
        if isinstance(model, Partners):
            generator: Any = copy.deepcopy(model.of(individual.slot))
        else:
            generator = model.subnet(individual.genotype)
        size = self.size(individual.genotype) if self.size is not None else count_parameters(generator)
        if self.recalibrate:
            recalibrate_(generator, generator.latent, seed=individual.seed)
        device = next(generator.parameters()).device
        try:
            images = generate(
                generator.eval(), self.samples, generator.latent, seed=individual.seed, device=str(device)
            )
        except NotFinite:
            return _FAILED | {"failed": 1.0, "parameters": size}
        found = score(images, self.reference)
        return {
            "distance": found.distance,
            "inverse_inception": 1 / found.inception,
            "inception": found.inception,
            "parameters": size,
            "failed": float(found.failed),
        }
