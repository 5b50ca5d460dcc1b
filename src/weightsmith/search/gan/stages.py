"""The two stages of EAGAN: generators against one discriminator, then discriminators each with its own generator.

Stage 1 (many-to-one): the candidates share the weights of one super-generator and face one discriminator of fixed
architecture. Stage 2 (one-to-one): every candidate of the super-discriminator trains a generator of its own, a copy of
stage 1's; a candidate's fitness is that of its generator. After every round all generators are reset to the best one.

Source: arXiv 2111.15097, section 3.2 and algorithm 1.
"""

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.search.gan.fitness import Partners
from weightsmith.search.gan.losses import (
    discriminator_step,
    generator_step,
    norms_of,
    restore_statistics_,
    statistics_of,
)
from weightsmith.search.options import Trainer
from weightsmith.search.space import Genotype, SearchSpace
from weightsmith.search.supernet import SuperNet

Network = Callable[[Tensor], Tensor]


@dataclass(frozen=True, slots=True)
class StageOptions:
    """How the shared weights are trained.

    Attributes:
        warm_up: Discriminator steps before the first population is drawn.
        steps: Discriminator steps per generation.
        dis_batch: Real and generated images of a discriminator step.
        gen_batch: Generated images of a generator step.
        lr_g: Learning rate of generators.
        lr_d: Learning rate of discriminators.
        betas: Of Adam.
        n_critic: Discriminator steps per generator step; the paper's code has 1 in stage 1 and 5 in stage 2.
        subnets_per_step: Sub-networks whose gradients are averaged in a step of stage 1.
        zero_unsampled: Treat missing gradients as zeros, see `weightsmith.search.supernet.zero_unsampled_grads_`.
    """

    warm_up: int = 62_500
    steps: int = 12_500
    dis_batch: int = 40
    gen_batch: int = 80
    lr_g: float = 2e-4
    lr_d: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.9)
    n_critic: int = 1
    subnets_per_step: int = 1
    zero_unsampled: bool = False

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            UsageError: Names the argument.
        """
        for name in ("steps", "dis_batch", "gen_batch", "n_critic", "subnets_per_step"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.warm_up < 0 or self.lr_g <= 0 or self.lr_d <= 0:
            raise UsageError(
                f"warm_up must be at least 0 and learning rates above 0, got {self.warm_up}, {self.lr_g}, {self.lr_d}"
            )
        if self.gen_batch % self.subnets_per_step or self.dis_batch % self.subnets_per_step:
            raise UsageError(f"subnets_per_step must divide both batches, got {self.subnets_per_step}")

    def adam(self, model: nn.Module, lr: float) -> torch.optim.Adam:
        """The optimizer of a network."""
        return torch.optim.Adam(model.parameters(), lr, betas=(float(self.betas[0]), float(self.betas[1])))


class _Stage(Trainer):
    """What both stages share: images, steps, and what happens when a loss is not finite.

    Attributes:
        skipped: Steps that were not taken, by slot, in the last generation.
    """

    def __init__(self, images: Tensor, options: StageOptions) -> None:
        options.check()
        if images.dtype != torch.uint8 or images.dim() != 4 or not len(images):
            raise UsageError(
                f"images must be uint8 (N, C, H, W) and not empty, got {images.dtype} {tuple(images.shape)}"
            )
        self.images, self.options = images, options
        self.skipped: dict[int, int] = {}

    def _real(self, like: Tensor) -> Tensor:
        rows = torch.randint(len(self.images), (self.options.dis_batch,))
        return self.images[rows].to(like.device).to(like.dtype) / 127.5 - 1

    def _latents(self, number: int, latent: int, like: Tensor) -> Tensor:
        return torch.randn(number, latent).to(like)

    def _count(self, slots: Sequence[int], loss: float, norms: Sequence[nn.Module], before: Sequence[Tensor]) -> None:
        if np.isfinite(loss):
            return
        restore_statistics_(norms, before)
        for slot in slots:
            self.skipped[slot] = self.skipped.get(slot, 0) + 1


class StageOne(_Stage):
    """Trains a super-generator, passed to ``evolve`` as ``model``, against one discriminator of fixed architecture.

    Args:
        discriminator: ``(B, C, H, W) -> (B, 1)``.
        images: Training images, uint8 ``(N, C, H, W)``.
        options: How.
    """

    def __init__(self, discriminator: nn.Module, images: Tensor, options: StageOptions) -> None:
        super().__init__(images, options)
        self.discriminator = discriminator
        self._d_optimizer = options.adam(discriminator, options.lr_d)
        self._g_optimizer: torch.optim.Adam | None = None
        self._loaded: Mapping[str, Any] | None = None

    def warm_up(self, model: Any, space: SearchSpace, seed: int) -> None:
        """Train with a fresh random genotype in every step."""
        rng = np.random.default_rng(seed)
        number = self.options.subnets_per_step
        self._run(model, self.options.warm_up, lambda: ([], [space.sample(rng) for _ in range(number)]))

    def train(self, model: Any, population: Sequence[Genotype], seed: int) -> None:
        """Train with a random individual in every step."""
        rng = np.random.default_rng(seed)

        def draw() -> tuple[list[int], list[Genotype]]:
            slots = rng.integers(len(population), size=self.options.subnets_per_step).tolist()
            return slots, [population[slot] for slot in slots]

        self._run(model, self.options.steps, draw)
        self.failed = frozenset(self.skipped)

    def state_dict(self) -> dict[str, Any]:
        """The discriminator and both optimizers."""
        g = self._g_optimizer.state_dict() if self._g_optimizer is not None else None
        return {"d": self.discriminator.state_dict(), "d_optimizer": self._d_optimizer.state_dict(), "g_optimizer": g}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a `state_dict` back."""
        self.discriminator.load_state_dict(state["d"])
        self._d_optimizer.load_state_dict(state["d_optimizer"])
        self._loaded = state["g_optimizer"]

    def _run(self, model: SuperNet, steps: int, draw: Callable[[], tuple[list[int], list[Genotype]]]) -> None:
        options, self.skipped = self.options, {}
        if self._g_optimizer is None:
            self._g_optimizer = options.adam(model, options.lr_g)
        if self._loaded is not None:
            self._g_optimizer.load_state_dict(dict(self._loaded))
            self._loaded = None
        like, latent = next(model.parameters()), int(model.latent)  # type: ignore[arg-type]
        model.train()
        self.discriminator.train()
        norms = norms_of(model, self.discriminator)
        for step in range(steps):
            slots, genotypes = draw()

            def generator(z: Tensor, genotypes: list[Genotype] = genotypes) -> Tensor:
                # the mean over equal parts of a batch is the mean of the sub-networks' gradients (equation 5)
                parts = zip(z.chunk(len(genotypes)), genotypes, strict=True)
                return torch.cat([model(part, genotype) for part, genotype in parts])

            before = statistics_of(norms)
            z = self._latents(options.dis_batch, latent, like)
            loss = discriminator_step(self.discriminator, generator, self._d_optimizer, self._real(like), z)
            if step % options.n_critic == 0 and np.isfinite(loss):
                z = self._latents(options.gen_batch, latent, like)
                loss = generator_step(
                    self.discriminator, generator, self._g_optimizer, z, zero_unsampled=options.zero_unsampled
                )
            self._count(slots, loss, norms, before)


class StageTwo(_Stage):
    """Trains a super-discriminator whose candidates are paired with the generators of a `Partners`.

    Args:
        discriminator: The super-discriminator.
        images: Training images, uint8 ``(N, C, H, W)``.
        options: How; a burst is ``n_critic`` discriminator steps and one generator step with one individual.
        reset: Copy the best generator, with its optimizer, to all slots after every round (weight resetting).
    """

    def __init__(self, discriminator: SuperNet, images: Tensor, options: StageOptions, *, reset: bool = True) -> None:
        super().__init__(images, options)
        self.discriminator, self.reset = discriminator, reset
        self._d_optimizer = options.adam(discriminator, options.lr_d)
        self._g_optimizers: list[torch.optim.Adam] = []
        self._loaded: list[Any] = []

    def warm_up(self, model: Any, space: SearchSpace, seed: int) -> None:
        """Train random discriminators against a copy of the generator, which is dropped afterwards."""
        rng, scratch = np.random.default_rng(seed), copy.deepcopy(model.of(0))
        optimizer = self.options.adam(scratch, self.options.lr_g)
        for _ in range(self.options.warm_up // self.options.n_critic):
            self._burst(0, space.sample(rng), scratch, optimizer)

    def train(self, model: Any, population: Sequence[Genotype], seed: int) -> None:
        """Train in bursts, each with a random individual and its own generator."""
        rng, self.skipped = np.random.default_rng(seed), {}
        self._prepare(model)
        for _ in range(self.options.steps // self.options.n_critic):
            slot = int(rng.integers(len(population)))
            self._burst(slot, population[slot], model.of(slot), self._g_optimizers[slot % len(model)])
        self.failed = frozenset(self.skipped)

    def selected(self, model: Any, best: int) -> None:
        """Reset all generators to the best one: parameters, running statistics and optimizer state."""
        if not self.reset:
            return
        self._prepare(model)
        best %= len(model)
        weights = copy.deepcopy(model.of(best).state_dict())
        moving = self._g_optimizers[best].state_dict()
        for slot, optimizer in enumerate(self._g_optimizers):
            if slot != best:
                model.of(slot).load_state_dict(weights)
                optimizer.load_state_dict(copy.deepcopy(moving))

    def state_dict(self) -> dict[str, Any]:
        """The super-discriminator and all optimizers."""
        return {
            "d": self.discriminator.state_dict(),
            "d_optimizer": self._d_optimizer.state_dict(),
            "g_optimizers": [optimizer.state_dict() for optimizer in self._g_optimizers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take a `state_dict` back."""
        self.discriminator.load_state_dict(state["d"])
        self._d_optimizer.load_state_dict(state["d_optimizer"])
        self._loaded = list(state["g_optimizers"])

    def _prepare(self, model: Partners) -> None:
        if not self._g_optimizers:
            self._g_optimizers = [self.options.adam(generator, self.options.lr_g) for generator in model]
            for optimizer, state in zip(self._g_optimizers, self._loaded, strict=False):
                optimizer.load_state_dict(state)

    def _burst(self, slot: int, genotype: Genotype, generator: nn.Module, optimizer: torch.optim.Adam) -> None:
        like, latent = next(generator.parameters()), int(generator.latent)  # type: ignore[arg-type]
        generator.train()
        self.discriminator.train()
        norms = norms_of(generator)
        before = statistics_of(norms)

        def scored(x: Tensor) -> Tensor:
            scores: Tensor = self.discriminator(x, genotype)
            return scores

        zero = self.options.zero_unsampled
        for _ in range(self.options.n_critic):
            z = self._latents(self.options.dis_batch, latent, like)
            loss = discriminator_step(scored, generator, self._d_optimizer, self._real(like), z, zero_unsampled=zero)
            if not np.isfinite(loss):
                return self._count([slot], loss, norms, before)
        z = self._latents(self.options.gen_batch, latent, like)
        return self._count([slot], generator_step(scored, generator, optimizer, z), norms, before)
