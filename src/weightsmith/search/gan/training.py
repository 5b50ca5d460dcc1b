"""Training a generator and a discriminator of fixed architecture from scratch; arXiv 2111.15097, section 4, and its
code.

Hinge loss, Adam for both, a discriminator step in every iteration and a generator step in every ``n_critic``-th, a
moving average of the generator's parameters, and the state with the lowest distance is kept.
"""

import copy
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.core.files import file_atomically
from weightsmith.search.code import code_of
from weightsmith.search.evaluation import drawing_from
from weightsmith.search.gan.losses import (
    discriminator_step,
    generator_step,
    norms_of,
    restore_statistics_,
    statistics_of,
)
from weightsmith.search.stored import reading

Row = dict[str, float]


@dataclass(frozen=True, slots=True)
class TrainOptions:
    """How a pair is trained.

    Attributes:
        steps: Discriminator steps; the paper's 600 epochs of CIFAR-10 with batches of 40 are 750,000.
        dis_batch: Real and generated images of a discriminator step.
        gen_batch: Generated images of a generator step.
        lr_g: Learning rate of the generator.
        lr_d: Learning rate of the discriminator.
        betas: Of Adam.
        n_critic: Discriminator steps per generator step.
        ema: Decay of the average of the generator's parameters, updated after each of its steps.
        clip_norm: Largest gradient norm of either network; 50 for STL-10.
        judge_every: Discriminator steps between two calls of ``judge``; 0: only at the end.
        judge_after: Discriminator steps before the first of these calls.
        save_every: Discriminator steps between two checkpoints.
    """

    steps: int = 750_000
    dis_batch: int = 40
    gen_batch: int = 80
    lr_g: float = 2e-4
    lr_d: float = 2e-4
    betas: tuple[float, float] = (0.0, 0.9)
    n_critic: int = 5
    ema: float = 0.999
    clip_norm: float | None = None
    judge_every: int = 0
    judge_after: int = 0
    save_every: int = 1000

    @classmethod
    def stl10(cls) -> "TrainOptions":
        """The settings for STL-10: larger batches, other learning rates, clipped gradients."""
        return cls(steps=984_000, dis_batch=64, gen_batch=128, lr_g=3e-4, clip_norm=50.0)

    def check(self) -> None:
        """Refuse values out of range.

        Raises:
            UsageError: Names the argument.
        """
        for name in ("steps", "dis_batch", "gen_batch", "n_critic", "save_every"):
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 <= self.ema < 1:
            raise UsageError(f"ema must be at least 0 and below 1, got {self.ema}")


@dataclass(frozen=True, slots=True)
class Trained:
    """What `train_gan` returns.

    Attributes:
        generator: With averaged parameters and live BatchNorm statistics, of the best judgement or the end.
        distance: The best judgement; NaN without a judge.
        rows: One per judgement: ``step`` and ``distance``.
        skipped: Steps that were not taken because a loss was not finite.
    """

    generator: nn.Module
    distance: float
    rows: tuple[Row, ...]
    skipped: int


def train_gan(
    generator: nn.Module,
    discriminator: nn.Module,
    images: Tensor,
    options: TrainOptions | None = None,
    *,
    seed: int = 0,
    judge: Callable[[nn.Module], float] | None = None,
    folder: Path | str | None = None,
) -> Trained:
    """Train a pair from scratch; the arguments' weights are trained in place.

    Args:
        generator: ``(B, L) -> (B, C, H, W)`` with an attribute ``latent``.
        discriminator: ``(B, C, H, W) -> (B, 1)``.
        images: uint8 ``(N, C, H, W)``.
        options: How.
        seed: Of batches and latents.
        judge: ``generator -> distance``, lower is better, given a copy with averaged parameters in evaluation mode.
        folder: Where checkpoints go; training goes on from the last one.

    Raises:
        UsageError: An argument is out of range, or ``folder`` holds another training or a damaged one.
    """
    options = options or TrainOptions()
    options.check()
    if images.dtype != torch.uint8 or images.dim() != 4 or not len(images):
        raise UsageError(f"images must be uint8 (N, C, H, W) and not empty, got {images.dtype} {tuple(images.shape)}")
    run = _Run(generator, discriminator, options, seed, judge)
    file = None if folder is None else Path(folder) / "gan.pt"
    if file is not None:
        run.resume(file)
    like, latent = next(generator.parameters()), int(generator.latent)  # type: ignore[arg-type]
    generator.train()
    discriminator.train()
    norms = norms_of(generator, discriminator)
    while run.step < options.steps:
        step = run.step
        # a seed per step: a resumed training needs no state of a generator
        with drawing_from((seed * 1_000_003 + step) % 2**63):
            rows = torch.randint(len(images), (options.dis_batch,))
            real = images[rows].to(like.device).to(like.dtype) / 127.5 - 1
            z = torch.randn(options.dis_batch, latent).to(like)
            z_g = torch.randn(options.gen_batch, latent).to(like)
            clip = options.clip_norm
            before = statistics_of(norms)
            loss = discriminator_step(discriminator, generator, run.d_optimizer, real, z, clip_norm=clip)
            if step % options.n_critic == 0 and math.isfinite(loss):
                loss = generator_step(discriminator, generator, run.g_optimizer, z_g, clip_norm=clip)
                run.average()
        if not math.isfinite(loss):
            run.skipped += 1
            restore_statistics_(norms, before)
        run.step += 1
        last = run.step == options.steps
        due = options.judge_every and run.step >= options.judge_after and run.step % options.judge_every == 0
        if judge is not None and (last or due):
            run.judge(judge)
        if file is not None and (last or run.step % options.save_every == 0):
            run.save(file)
    return run.result(judged=judge is not None)


class _Run:
    """What changes while a pair trains."""

    def __init__(
        self, generator: nn.Module, discriminator: nn.Module, options: TrainOptions, seed: int, judge: Any
    ) -> None:
        self.generator, self.discriminator, self.options = generator, discriminator, options
        betas = (float(options.betas[0]), float(options.betas[1]))
        self.g_optimizer = torch.optim.Adam(generator.parameters(), options.lr_g, betas=betas)
        self.d_optimizer = torch.optim.Adam(discriminator.parameters(), options.lr_d, betas=betas)
        self.averaged = [parameter.detach().clone() for parameter in generator.parameters()]
        self.asked = {"seed": seed, **{name: str(value) for name, value in asdict(options).items()}}
        self.asked["code of judge"] = "" if judge is None else code_of(judge)
        self.step, self.skipped, self.best = 0, 0, math.inf
        self.rows: list[Row] = []
        self.kept: dict[str, Tensor] | None = None

    @torch.no_grad()
    def average(self) -> None:
        decay = self.options.ema
        torch._foreach_lerp_(self.averaged, [p.detach() for p in self.generator.parameters()], 1 - decay)

    def smooth(self) -> nn.Module:
        copied = copy.deepcopy(self.generator)
        with torch.no_grad():
            for parameter, value in zip(copied.parameters(), self.averaged, strict=True):
                parameter.copy_(value)
        return copied.eval()

    def judge(self, judge: Callable[[nn.Module], float]) -> None:
        candidate = self.smooth()
        state = copy.deepcopy(candidate.state_dict())
        distance = float(judge(candidate))
        self.rows.append({"step": float(self.step), "distance": distance})
        if not math.isfinite(distance):
            distance = math.inf  # and never the best
        if distance < self.best or self.kept is None:
            self.best, self.kept = distance, state

    def result(self, *, judged: bool) -> Trained:
        generator = self.smooth()
        if self.kept is not None:
            generator.load_state_dict(self.kept)
        return Trained(generator, self.best if judged else math.nan, tuple(self.rows), self.skipped)

    def save(self, file: Path) -> None:
        held: dict[str, Any] = {
            name: getattr(self, name) for name in ("asked", "step", "skipped", "best", "rows", "kept", "averaged")
        }
        for name in ("generator", "discriminator", "g_optimizer", "d_optimizer"):
            held[name] = getattr(self, name).state_dict()
        with file_atomically(file) as fresh:
            torch.save(held, fresh)

    def resume(self, file: Path) -> None:
        if not file.is_file():
            return
        with reading(file, "a training of a GAN") as held:
            if held["asked"] != self.asked:
                raise UsageError(f"{file} is of a training with other settings: name another folder")
            for name in ("generator", "discriminator", "g_optimizer", "d_optimizer"):
                getattr(self, name).load_state_dict(held[name])
            self.step, self.skipped, self.best = int(held["step"]), int(held["skipped"]), float(held["best"])
            self.rows, self.kept = [dict(row) for row in held["rows"]], held["kept"]
            for value, kept in zip(self.averaged, held["averaged"], strict=True):
                value.copy_(kept)
