"""Architectures of generative adversarial networks: EAGAN's two-stage search.

| name | what it is |
|---|---|
| ``GENERATOR_SPACE``, ``DISCRIMINATOR_SPACE`` | the genotypes |
| ``GENERATORS``, ``DISCRIMINATORS`` | published ones by name |
| ``generator_genotype``, ``discriminator_genotype`` | look one up by name, or read it from text |
| ``Generator``, ``Discriminator``, ``SimpleDiscriminator`` | super-networks and single networks |
| ``generator_parameters``, ``discriminator_parameters`` | sizes in closed form |
| ``StageOne``, ``StageTwo``, ``StageOptions``, ``partners`` | how shared weights are trained, for ``search.evolve`` |
| ``ScoreGenerator``, ``OBJECTIVES`` | what an individual is judged by |
| ``train_gan``, ``TrainOptions`` | training a pair from scratch |
| ``score``, ``generate``, ``Reference``, ``Inception``, ``train_stand_in`` | scores with fingerprints |
| ``inception_score``, ``frechet_distance``, ``kernel_distance``, ``moments`` | the formulas |
| ``discriminator_loss``, ``generator_loss``, ``discriminator_step``, ``generator_step`` | the hinge loss |
"""

from weightsmith.search.gan.counts import discriminator_parameters, generator_parameters
from weightsmith.search.gan.discriminator import Discriminator, SimpleDiscriminator
from weightsmith.search.gan.fitness import OBJECTIVES, ScoreGenerator, partners
from weightsmith.search.gan.generator import Generator
from weightsmith.search.gan.genotypes import (
    DISCRIMINATOR_SPACE,
    DISCRIMINATORS,
    GENERATOR_SPACE,
    GENERATORS,
    discriminator_genotype,
    generator_genotype,
)
from weightsmith.search.gan.judges import Inception, train_stand_in
from weightsmith.search.gan.losses import discriminator_loss, discriminator_step, generator_loss, generator_step
from weightsmith.search.gan.metrics import frechet_distance, inception_score, kernel_distance, moments
from weightsmith.search.gan.scoring import Reference, generate, recalibrate_, score
from weightsmith.search.gan.stages import StageOne, StageOptions, StageTwo
from weightsmith.search.gan.training import TrainOptions, train_gan

__all__ = [
    "DISCRIMINATORS",
    "DISCRIMINATOR_SPACE",
    "GENERATORS",
    "GENERATOR_SPACE",
    "OBJECTIVES",
    "Discriminator",
    "Generator",
    "Inception",
    "Reference",
    "ScoreGenerator",
    "SimpleDiscriminator",
    "StageOne",
    "StageOptions",
    "StageTwo",
    "TrainOptions",
    "discriminator_genotype",
    "discriminator_loss",
    "discriminator_parameters",
    "discriminator_step",
    "frechet_distance",
    "generate",
    "generator_genotype",
    "generator_loss",
    "generator_parameters",
    "generator_step",
    "inception_score",
    "kernel_distance",
    "moments",
    "partners",
    "recalibrate_",
    "score",
    "train_gan",
    "train_stand_in",
]
