"""Pairs of a generator and a discriminator on images of any data set: settings, data, a training from scratch."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weightsmith.core.device import default_device
from weightsmith.core.errors import UsageError
from weightsmith.lab.data.sources import locate
from weightsmith.lab.gallery import Picture, keep_gallery
from weightsmith.lab.job import Job
from weightsmith.lab.probe import fastest
from weightsmith.lab.tasks import TrainConfig, shared_task
from weightsmith.search import EvolveOptions, gan
from weightsmith.search.gan.scoring import NotFinite

_VALIDATION = 2**32  # added to the seed of the latents by which a state of a training is chosen


@dataclass(frozen=True, slots=True)
class Config(TrainConfig):
    """What the experiment on architecture search compares, and how."""

    side: int = 8
    """Side of the images in pixels, divisible by 8; data are padded with black and averaged down."""
    channels: int = 16
    """Channels of generators."""
    dis_channels: int = 16
    """Channels of discriminators."""
    latent: int = 24
    """Length of the latent vector, divisible by 3."""
    discriminator: str = "D_autogan"
    """The fixed discriminator of stage 1."""
    cell_gain: float = 0.5
    """Factor on first convolution weights in generator cells; 1 in the paper, where short trainings may collapse."""
    population: int = 16
    """Individuals of stage 1."""
    rounds: int = 6
    """Rounds of stage 1."""
    warm_up: int = 300
    """Discriminator steps before the first population."""
    steps: int | None = 40
    """Discriminator steps per round of stage 1."""
    batch_size: int = 32
    """Images of a discriminator step."""
    gen_batch: int = 32
    """Images of a generator step."""
    lr_g: float = 5e-4
    """Learning rate of generators."""
    lr_d: float = 2e-3
    """Learning rate of discriminators."""
    samples: int = 1000
    """Images by which an individual, and a state of a training from scratch, is judged."""
    population2: int = 8
    """Individuals of stage 2."""
    rounds2: int = 4
    """Rounds of stage 2."""
    bursts: int = 12
    """Bursts per round of stage 2: some discriminator steps and one generator step of one pair."""
    n_critic2: int = 5
    """Discriminator steps of a burst."""
    final_steps: int = 250
    """Discriminator steps of a training from scratch."""
    final_critic: int = 1
    """Discriminator steps per generator step there."""
    final_samples: int = 2000
    """Images by which a network trained from scratch is judged."""
    judge_every: int = 50
    """Discriminator steps between two looks at a training from scratch, of which the best state is kept."""
    judge_after: int = 0
    """Discriminator steps before the first look."""
    ema: float = 0.98
    """Decay of the average of the generator's parameters there."""
    clip_norm: float | None = None
    """Largest gradient norm there."""
    random_architectures: int = 8
    """Random genotypes that are trained from scratch."""
    inception: str = ""
    """File with Inception's weights; empty: a small classifier of the data judges, and scores are called FCD and CS."""
    transfer: str = ""
    """Second data set, on which stage 1's winner and the published generator are trained too, each against D_S."""
    transfer_side: int = 48
    """Side of its images."""
    transfer_steps: int = 984_000
    """Discriminator steps of a training on it."""
    search_engine: str = "auto"
    """Where individuals are evaluated: local, or ray where the cluster has room beside the jobs; auto is local."""
    search_workers: int | None = None
    """Parallel evaluations; by default one process, or as many as the cluster has room for."""

    def check(self, *positive: str) -> None:
        """Refuse values out of range, and a second data set that is not there."""
        TrainConfig.check(self, *positive)
        if self.task != "images":
            raise UsageError(f"task must be images, got {self.task!r}: the search is about image generators")
        for name in ("side", "transfer_side"):
            if getattr(self, name) % 8 or getattr(self, name) < 8:
                raise UsageError(
                    f"{name} must be divisible by 8, since generators double it three times, got {getattr(self, name)}"
                )
        for name in ("population", "population2"):
            EvolveOptions(getattr(self, name)).check()
        if self.random_architectures < 2:
            raise UsageError(f"random_architectures must be at least 2, got {self.random_architectures}")
        if self.search_engine not in ("auto", "local", "ray"):
            raise UsageError(f"search_engine must be auto, local or ray, got {self.search_engine!r}")
        gan.discriminator_genotype(self.discriminator)
        if self.transfer:
            try:
                locate(self.transfer)
            except UsageError as error:
                raise UsageError(
                    f"transfer {self.transfer!r} is not there: {error}; or leave transfer empty"
                ) from error

    def transferred(self) -> "Config":
        """The settings for the second data set: the paper's for STL-10."""
        published = gan.TrainOptions.stl10()
        return replace(
            self, data=self.transfer, side=self.transfer_side, size=self.transfer_side, columns=(), subset="",
            batch_size=published.dis_batch, gen_batch=published.gen_batch, lr_g=published.lr_g, lr_d=published.lr_d,
            clip_norm=published.clip_norm, final_steps=self.transfer_steps, judge_after=self.transfer_steps // 2,
        )  # fmt: skip

    @property
    def distance_name(self) -> str:
        """What the Fréchet distance is called."""
        return "FID" if self.inception else "FCD"

    def generator_sizes(self, images: Tensor) -> dict[str, int]:
        """Sizes of a generator for these images."""
        sizes = {"channels": self.channels, "bottom": self.side // 8, "latent": self.latent}
        return sizes | {"image_channels": images.shape[1]}

    def discriminator_sizes(self, images: Tensor) -> dict[str, int]:
        """Sizes of a discriminator for these images."""
        return {"channels": self.dis_channels, "image_channels": images.shape[1]}

    def stage(self, number: int) -> gan.StageOptions:
        """How the shared weights of a stage are trained."""
        found = gan.StageOptions(
            warm_up=self.warm_up, steps=self.steps or 1, dis_batch=self.batch_size, gen_batch=self.gen_batch,
            lr_g=self.lr_g, lr_d=self.lr_d,
        )  # fmt: skip
        if number == 1:
            return found
        return replace(found, warm_up=self.warm_up // 4, steps=self.bursts * self.n_critic2, n_critic=self.n_critic2)


@dataclass(frozen=True, slots=True)
class Data:
    """Training images as bytes, ``(N, C, side, side)``, and what generators of them are judged by."""

    images: Tensor
    reference: gan.Reference


_known: dict[tuple[Any, ...], Data] = {}


def data_of(config: Config) -> Data:
    """Read the images; the last two sets stay in memory, since every arm asks for them."""
    task = shared_task(config)
    key = (task.fingerprint, config.side, config.inception)
    if key not in _known:
        split: Any = task.train
        if not hasattr(split, "read"):
            raise UsageError("the search needs a data set of images: give --data a name, a file or a folder")
        images = fitted_to(split.read(split.rows, None), config.side)
        if config.inception:
            network: Any = gan.Inception(config.inception, device=default_device())
        else:
            network = gan.train_stand_in(images, split.labels)
        while len(_known) > 1:
            _known.pop(next(iter(_known)))
        _known[key] = Data(images, gan.Reference.of(images, network))
    return _known[key]


def fitted_to(images: Tensor, side: int) -> Tensor:
    """Pad uint8 images with black to a square whose side is a multiple of ``side``, then average blocks."""
    height, width = images.shape[-2:]
    blocks = math.ceil(max(height, width) / side)
    down, right = blocks * side - height, blocks * side - width
    padded = F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
    return padded if blocks == 1 else F.avg_pool2d(padded.float(), blocks).to(torch.uint8)


@dataclass(frozen=True, slots=True)
class Outcome:
    """A generator trained from scratch; ``distance`` is NaN where it failed."""

    distance: float
    score: float
    parameters: int

    @property
    def failed(self) -> bool:
        """Whether its images could not be judged."""
        return not math.isfinite(self.distance)


def from_scratch(config: Config, job: Job, genotype: Any, discriminator: Any, *, name: str = "final") -> Outcome:
    """Train a pair from scratch, keep the generator's best state on latents of their own, and judge it on others."""
    data = data_of(config)
    sizes = config.generator_sizes(data.images)
    torch.manual_seed(job.seed)
    generator = gan.Generator(genotype, cell_gain=config.cell_gain, **sizes).to(default_device())
    opponent = gan.Discriminator(discriminator, **config.discriminator_sizes(data.images)).to(default_device())
    options = gan.TrainOptions(
        steps=config.final_steps, dis_batch=config.batch_size, gen_batch=config.gen_batch, lr_g=config.lr_g,
        lr_d=config.lr_d, n_critic=config.final_critic, ema=config.ema, clip_norm=config.clip_norm,
        judge_every=config.judge_every, judge_after=config.judge_after,
    )  # fmt: skip
    judge = _judge(config, data, job, name)
    trained = gan.train_gan(
        generator, opponent, data.images, options, seed=job.seed, judge=judge, folder=job.folder / name
    )
    size = gan.generator_parameters(genotype, **sizes)
    try:
        smooth = gan.recalibrate_(trained.generator, config.latent, seed=job.seed)
        made = gan.generate(smooth, config.final_samples, config.latent, seed=job.seed, device=default_device())
    except NotFinite:
        return Outcome(math.nan, math.nan, size)
    keep_gallery(job.keep, [Picture.of(made[:64], "Samples", f"{job.arm}: {name}")])
    found = gan.score(made, data.reference)
    return Outcome(math.nan if found.failed else found.distance, found.inception, size)


def _judge(config: Config, data: Data, job: Job, name: str) -> Callable[[Any], float]:
    looks, best = 0, math.inf

    def judge(generator: Any) -> float:
        nonlocal looks, best
        seed = job.seed + _VALIDATION
        try:
            smooth = gan.recalibrate_(generator, config.latent, seed=seed)
            made = gan.generate(smooth, config.samples, config.latent, seed=seed, device=default_device())
        except NotFinite:
            return math.inf
        found = gan.score(made, data.reference)
        looks, best = looks + 1, min(best, found.distance)
        job.record.show({"step": f"{name}, look {looks}", "best": best})
        return math.inf if found.failed else found.distance

    return judge


def step_seconds(config: Config) -> float:
    """Time a discriminator step of the published pair, with its share of a generator step."""
    images = torch.zeros(
        config.batch_size, shared_task(config).example().inputs.shape[1], config.side, config.side, dtype=torch.uint8
    )
    generator = gan.Generator("G*", cell_gain=config.cell_gain, **config.generator_sizes(images)).to(default_device())
    opponent = gan.Discriminator(config.discriminator, **config.discriminator_sizes(images)).to(default_device())
    options = gan.TrainOptions(
        steps=config.final_critic, dis_batch=config.batch_size, gen_batch=config.gen_batch, n_critic=config.final_critic
    )
    return fastest(lambda: gan.train_gan(generator, opponent, images, options)) / config.final_critic
