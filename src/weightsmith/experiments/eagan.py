"""Does evolution over shared weights find better GANs than chance, and does pairing help the second stage?

Per seed one search of stage 1 is done and shared: its winner is trained from scratch beside random architectures, the
winner of a random search with an equal budget, and the published generator. Three variants of stage 2 start from that
winner and its weights; the pair that each selects is trained from scratch as well.
"""

import math
import struct
import sys
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import kendalltau
from torch import Tensor
from torch.nn import functional as F

from weightsmith.core.errors import UsageError
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric, Value
from weightsmith.lab.job import Job
from weightsmith.lab.tasks import TrainConfig, shared_task
from weightsmith.search import EvolveOptions, Individual, Resources, SearchResult, evolve, gan

_FREE = "random"


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
    """Images by which an individual is judged."""
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
    ema: float = 0.98
    """Decay of the average of the generator's parameters there."""
    random_architectures: int = 8
    """Random genotypes that are trained from scratch."""
    inception: str = ""
    """File with Inception's weights; empty: a small classifier of the data judges, and scores are called FCD and CS."""
    search_engine: str = "auto"
    """Where individuals are evaluated: local, ray, or auto, which is the Ray cluster that the job runs on, if any."""
    search_workers: int | None = None
    """Parallel evaluations; by default one process, or as many as the cluster has room for."""
    device: str = ""
    """Where networks are trained; empty: a GPU where there is one."""

    def check(self) -> None:
        """Refuse values out of range."""
        TrainConfig.check(self)
        if self.task != "images":
            raise UsageError(f"task must be images, got {self.task!r}: the search is about image generators")
        if self.side % 8 or self.side < 8:
            raise UsageError(f"side must be divisible by 8, since generators double it three times, got {self.side}")
        for name in ("population", "population2"):
            EvolveOptions(getattr(self, name)).check()
        if self.random_architectures < 2:
            raise UsageError(f"random_architectures must be at least 2, got {self.random_architectures}")
        if self.search_engine not in ("auto", "local", "ray"):
            raise UsageError(f"search_engine must be auto, local or ray, got {self.search_engine!r}")
        gan.discriminator_genotype(self.discriminator)

    @property
    def distance_name(self) -> str:
        """What the Fréchet distance is called."""
        return "FID" if self.inception else "FCD"

    def generator_sizes(self, images: Tensor) -> dict[str, int]:
        """Sizes of a generator for these images."""
        return {
            "channels": self.channels, "bottom": self.side // 8, "latent": self.latent,
            "image_channels": images.shape[1],
        }  # fmt: skip

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

    def resources(self) -> Resources:
        """Where individuals are evaluated."""
        engine = self.search_engine
        if engine == "auto":
            ray = sys.modules.get("ray")
            engine = "ray" if ray is not None and ray.is_initialized() else "local"
        return Resources(engine, self.search_workers)


def arms(_: Config) -> list[Arm]:
    """The winner of stage 1 and its controls; stage 2 and its controls."""
    return [
        Arm("evolved", "winner of stage 1, trained from scratch", "evolved G"),
        Arm(_FREE, "mean of random architectures, trained from scratch", "random G"),
        Arm("random-search", "best of a random search with an equal budget, from scratch", "random search"),
        Arm("published", "the generator of the paper, trained from scratch", "G* (paper)"),
        Arm("one-to-one", "stage 2: every D its own G, reset to the best", "stage 2"),
        Arm("no-reset", "stage 2 without weight resetting", "no reset"),
        Arm("many-to-one", "stage 2 with a single G for all D", "one shared G"),
    ]


def claims(config: Config) -> list[Claim]:
    """Better than chance; and what the second stage rests on."""
    name = config.distance_name
    return [
        Claim(
            text=f"The evolved generator has a lower {name} than random architectures on average", metric="distance",
            winner="evolved", loser=_FREE, primary=True, relative=True, worth=0.1,
            paper="CIFAR-10 FID: 10.14 after stage 1; not compared with random architectures",
        ),
        Claim(
            text=f"Evolution finds a generator with a lower {name} than random search with an equal budget",
            metric="distance", winner="evolved", loser="random-search", primary=True, relative=True, worth=0.1,
            paper="not compared",
        ),
        Claim(
            text="With weight resetting the generators of stage 2 are better on average", metric="partners",
            winner="one-to-one", loser="no-reset", relative=True, worth=0.1,
            paper="figure 7: without resetting stage 2 is unstable and ends worse",
        ),
        Claim(
            text="The pair of both stages beats that of stage 1", metric="distance", winner="one-to-one",
            loser="evolved", relative=True, worth=0.02, paper="CIFAR-10 FID 10.14 → 9.91",
        ),
    ]  # fmt: skip


def metrics(config: Config) -> list[Metric]:
    """The distance from scratch, and what tells how far shared weights can be trusted."""
    name = config.distance_name
    return [
        Metric("distance", f"{name} from scratch", "lower", ".1f", help="Of networks trained from scratch."),
        Metric("score", "IS" if config.inception else "CS", "higher", ".2f", help="Of the same networks."),
        Metric(
            "shared", f"{name} with shared weights", "lower", ".1f", help="Of the winner, at the end of its search."
        ),
        Metric("parameters", "parameters", None, ",.0f", help="Of the stand-alone generator; in stage 2 of D."),
        Metric("median", "median of random ones", None, ".1f", help="A harder baseline than their mean."),
        Metric("luckiest", "best random one", None, ".1f", help="The lowest distance among them."),
        Metric("tau", "Kendall's tau", None, ".2f", help="Rank correlation of shared and from-scratch distances."),
        Metric("partners", f"mean {name}, stage 2", "lower", ".1f", help="Over the generators of the last round."),
        Metric(
            "worst_partner",
            f"worst {name}, stage 2",
            "lower",
            ".1f",
            help="Of the last round; of as many generators as the arm has.",
        ),
        Metric("best_partner", f"best {name}, stage 2", "lower", ".1f", help="Of the last round."),
    ]


CHARTS = (
    Chart(title="Population mean over rounds", x="round", y="mean", phase="rounds", y_label="mean distance"),
    Chart(
        title="Pareto fronts over rounds: size and distance", x="parameters", y="distance", kind="scatter",
        phase="front", y_label="distance",
    ),
    Chart(
        title="Distance with shared weights and from scratch", x="shared", y="distance", kind="scatter",
        phase="genotypes", x_label="with shared weights", y_label="from scratch",
    ),
)  # fmt: skip


def images_of(config: Config) -> tuple[Tensor, Tensor]:
    """Training images as bytes, ``(N, C, side, side)``, and their labels."""
    split: Any = shared_task(config).train
    if not hasattr(split, "read"):
        raise UsageError("the search needs a data set of images: give --data a name, a file or a folder")
    return fitted_to(split.read(split.rows, None), config.side), split.labels


def fitted_to(images: Tensor, side: int) -> Tensor:
    """Pad uint8 images with black to a square whose side is a multiple of ``side``, then average blocks."""
    height, width = images.shape[-2:]
    blocks = math.ceil(max(height, width) / side)
    down, right = blocks * side - height, blocks * side - width
    padded = F.pad(images, (right // 2, right - right // 2, down // 2, down - down // 2))
    return padded if blocks == 1 else F.avg_pool2d(padded.float(), blocks).to(torch.uint8)


def start(config: Config, seed: int, folder: Path) -> dict[str, Any]:
    """Stage 1, once per seed: every arm but two builds on it."""
    found, supernet = _first_stage(config, seed, folder / "stage-1", "nsga2")
    winner = found.best.genotype
    return {
        "genotype": [list(cell) for cell in winner],
        "shared": found.best.values["distance"],
        "supernet": supernet.state_dict(),
        "rows": _rows(found),
    }


def job(config: Config, job: Job) -> Mapping[str, Value]:
    """Measure one arm with one seed; not every arm has every metric."""
    return {metric.name: None for metric in metrics(config)} | dict(_measured(config, job))


def _measured(config: Config, job: Job) -> Mapping[str, Value]:
    for row in job.start["rows"] if job.arm == "evolved" else []:
        job.record(row)
    winner = gan.GENERATOR_SPACE.check(job.start["genotype"])
    if job.arm == "evolved":
        return {"shared": job.start["shared"], **_from_scratch(config, job, winner, config.discriminator)}
    if job.arm == "published":
        return _from_scratch(config, job, gan.GENERATORS["G*"], config.discriminator)
    if job.arm == "random-search":
        found, _ = _first_stage(config, job.seed, job.folder / "search", "random")
        for row in _rows(found):
            job.record(row)
        tried = [one for generation in found.generations for one in generation.scored if not one.failed]
        best = min(tried, key=lambda one: one.minimized)
        shared = {"shared": best.values["distance"]}
        return shared | _from_scratch(config, job, best.genotype, config.discriminator)
    if job.arm == _FREE:
        return _random(config, job)
    return _second_stage(config, job, winner)


def _first_stage(config: Config, seed: int, folder: Path, selector: Any) -> tuple[SearchResult, gan.Generator]:
    reference, images = _reference(config), images_of(config)[0]
    device = _device(config)
    torch.manual_seed(seed)
    supernet = gan.Generator(cell_gain=config.cell_gain, **config.generator_sizes(images)).to(device)
    discriminator = gan.Discriminator(config.discriminator, **config.discriminator_sizes(images)).to(device)
    found = evolve(
        gan.GENERATOR_SPACE, gan.ScoreGenerator(reference, config.samples), gan.OBJECTIVES, model=supernet,
        trainer=gan.StageOne(discriminator, images, config.stage(1)),
        options=EvolveOptions(config.population, config.rounds, selector=selector),
        resources=config.resources(), folder=folder, seed=seed,
    )  # fmt: skip
    return found, supernet


def _second_stage(config: Config, job: Job, winner: Any) -> Mapping[str, Value]:
    reference, images = _reference(config), images_of(config)[0]
    device = _device(config)
    torch.manual_seed(job.seed)
    supernet = gan.Generator(**config.generator_sizes(images))
    supernet.load_state_dict(job.start["supernet"])
    models = gan.partners(supernet.subnet(winner), 1 if job.arm == "many-to-one" else config.population2).to(device)
    discriminator = gan.Discriminator(**config.discriminator_sizes(images)).to(device)
    sizes = config.discriminator_sizes(images)
    found = evolve(
        _fitting_discriminators(config.side),
        gan.ScoreGenerator(reference, config.samples, size=_DiscriminatorSize(sizes)), gan.OBJECTIVES, model=models,
        trainer=gan.StageTwo(discriminator, images, config.stage(2), reset=job.arm != "no-reset"),
        options=EvolveOptions(config.population2, config.rounds2), resources=config.resources(),
        folder=job.folder / "stage-2", seed=job.seed,
    )  # fmt: skip
    for row in _rows(found):
        job.record(row)
    distances = [one.values["distance"] for one in found.generations[-1].scored]
    final = _from_scratch(config, job, winner, found.best.genotype)
    return {
        **final, "shared": found.best.values["distance"], "parameters": found.best.values["parameters"],
        "partners": float(np.mean(distances)), "worst_partner": max(distances), "best_partner": min(distances),
    }  # fmt: skip


def _random(config: Config, job: Job) -> Mapping[str, Value]:
    """Random genotypes from scratch, and how well shared weights would have ranked them."""
    reference, images = _reference(config), images_of(config)[0]
    rng = np.random.default_rng([job.seed, 1])
    supernet = gan.Generator(**config.generator_sizes(images))
    supernet.load_state_dict(job.start["supernet"])
    judge = gan.ScoreGenerator(reference, config.samples)
    scratch, scores, shared, sizes = [], [], [], []
    for number in range(config.random_architectures):
        genotype = gan.GENERATOR_SPACE.sample(rng)
        found = _from_scratch(config, job, genotype, config.discriminator, name=f"random-{number}")
        values = judge(supernet, Individual(genotype, number, 0, job.seed))
        scratch.append(float(found["distance"]))
        scores.append(float(found["score"]))
        shared.append(values["distance"])
        sizes.append(values["parameters"])
        job.record({"shared": shared[-1], "distance": scratch[-1], "parameters": sizes[-1]}, phase="genotypes")
    tau = float(kendalltau(shared, scratch).statistic)
    return {
        "distance": float(np.mean(scratch)), "score": float(np.mean(scores)), "shared": float(np.mean(shared)),
        "parameters": float(np.mean(sizes)), "median": float(np.median(scratch)), "luckiest": min(scratch),
        "tau": tau if math.isfinite(tau) else None,
    }  # fmt: skip


def _from_scratch(
    config: Config, job: Job, genotype: Any, discriminator: Any, *, name: str = "final"
) -> dict[str, float]:
    """Train a pair from scratch and judge the generator."""
    reference, images = _reference(config), images_of(config)[0]
    device = _device(config)
    torch.manual_seed(job.seed)
    generator = gan.Generator(genotype, cell_gain=config.cell_gain, **config.generator_sizes(images)).to(device)
    opponent = gan.Discriminator(discriminator, **config.discriminator_sizes(images)).to(device)
    options = gan.TrainOptions(
        steps=config.final_steps, dis_batch=config.batch_size, gen_batch=config.gen_batch, lr_g=config.lr_g,
        lr_d=config.lr_d, n_critic=config.final_critic, ema=config.ema,
    )  # fmt: skip
    trained = gan.train_gan(generator, opponent, images, options, seed=job.seed, folder=job.folder / name)
    smooth = gan.recalibrate_(trained.generator, config.latent, seed=job.seed)
    made = gan.generate(smooth, config.final_samples, config.latent, seed=job.seed, device=device)
    found = gan.score(made, reference)
    job.keep.mkdir(parents=True, exist_ok=True)
    (job.keep / f"{name}.png").write_bytes(picture(made[:64]))
    job.diverged = job.diverged or trained.skipped > 0
    size = float(gan.generator_parameters(genotype, **config.generator_sizes(images)))
    return {"distance": found.distance, "score": found.inception, "parameters": size}


def _rows(found: SearchResult) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    for generation in found.generations:
        distances = [one.values["distance"] for one in generation.scored]
        summary = {"mean": float(np.mean(distances)), "best": min(distances), "worst": max(distances)}
        rows.append({"phase": "rounds", "round": generation.number + 1, **summary})
        for one in generation.scored:
            if one.rank == 0:
                place = {"parameters": one.values["parameters"], "distance": one.values["distance"]}
                rows.append({"phase": "front", "round": generation.number + 1, **place})
    return rows


@dataclass(frozen=True, slots=True)
class _DiscriminatorSize:
    sizes: Mapping[str, int]

    def __call__(self, genotype: Any) -> int:
        return gan.discriminator_parameters(genotype, **self.sizes)


def _fitting_discriminators(side: int) -> Any:
    halvings = (side & -side).bit_length() - 1
    if halvings >= 4:
        return gan.DISCRIMINATOR_SPACE
    return replace(gan.DISCRIMINATOR_SPACE, genes=_without_down(gan.DISCRIMINATOR_SPACE.genes))


def _without_down(genes: Sequence[Any]) -> tuple[Any, ...]:
    return tuple(replace(gene, high=-1) if gene.low == -1 else gene for gene in genes)


_judges: dict[tuple[Any, ...], gan.Reference] = {}


def _reference(config: Config) -> gan.Reference:
    key = (shared_task(config).fingerprint, config.side, config.inception)
    if key not in _judges:
        images, labels = images_of(config)
        if config.inception:
            network: Any = gan.Inception(config.inception, device=_device(config))
        else:
            network = gan.train_stand_in(images, labels)
        _judges.clear()
        _judges[key] = gan.Reference.of(images, network)
    return _judges[key]


def _device(config: Config) -> str:
    return config.device or ("cuda" if torch.cuda.is_available() else "cpu")


def picture(images: Tensor, columns: int = 8) -> bytes:
    """A PNG file of images side by side; written by hand, since nothing else here needs an imaging library.

    Args:
        images: uint8 ``(N, 1 or 3, H, W)``.
        columns: Images per row.
    """
    rows = [torch.cat(list(row), dim=-1) for row in images[: len(images) // columns * columns].split(columns)]
    canvas = torch.cat(rows, dim=-2)
    channels, height, width = canvas.shape
    lines = canvas.permute(1, 2, 0).reshape(height, width * channels)
    raw = b"".join(b"\0" + bytes(line.tolist()) for line in lines)
    header = struct.pack(">IIBBBBB", width, height, 8, 0 if channels == 1 else 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(raw)), (b"IEND", b"")]
    body = [
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in chunks
    ]
    return b"\x89PNG\r\n\x1a\n" + b"".join(body)


def steps(config: Config, arm: str) -> int:
    """Discriminator steps of a job."""
    search = config.warm_up + config.rounds * (config.steps or 1)
    second = config.warm_up // 4 + config.rounds2 * config.bursts * config.n_critic2
    more = {_FREE: (config.random_architectures - 1) * config.final_steps, "random-search": search}
    stage = second if arm in ("one-to-one", "no-reset", "many-to-one") else 0
    return config.final_steps + more.get(arm, stage)


EXPERIMENT = Experiment(
    slug="eagan",
    title="Evolved GANs against chance",
    question=(
        "Candidates that share weights are cheap to judge, and evolution keeps the better half of them. Is the "
        "generator that it selects better than chance when trained from scratch, and does a second stage find it a "
        "better opponent?"
    ),
    presets={
        "smoke": Config(
            train_examples=400, channels=4, dis_channels=4, latent=6, population=4, rounds=2, warm_up=8, steps=4,
            batch_size=8, gen_batch=8, samples=80, population2=4, rounds2=2, bursts=2, n_critic2=2, final_steps=8,
            final_samples=80, random_architectures=2,
        ),
        "laptop": Config(data="mnist", side=16),
        "paper": Config(
            data="cifar10", validation_fraction=0.0, side=32, channels=256, dis_channels=128, latent=120, cell_gain=1.0,
            population=32, rounds=18, warm_up=62_500, steps=12_500, batch_size=40, gen_batch=80, lr_g=2e-4, lr_d=2e-4,
            samples=5000, population2=32, rounds2=18, bursts=2500, final_steps=750_000, final_critic=5,
            final_samples=50_000, ema=0.999,
        ),
    },
    arms=arms,
    claims=claims,
    metrics=metrics,
    charts=CHARTS,
    job=job,
    start=start,
    task=shared_task,
    steps=steps,
    check=Config.check,
    reading=(
        "All distances are to the training images, by features of a small classifier of the data unless a file with "
        "Inception's weights is given: they are comparable within one data set and one number of images only. The mean "
        "of random architectures is pulled up by those that fail; their median and the luckiest of them are harder "
        "baselines. Kendall's tau tells how far the order with shared weights agrees with that from scratch: near zero "
        "means that the search selects by something else than final quality. Beating the mean is then no proof of more "
        "than avoiding bad architectures."
    ),
)  # fmt: skip
