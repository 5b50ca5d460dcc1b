"""The searches of both stages over shared weights, what is told of them meanwhile, and what charts draw of them."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weightsmith.core.device import default_device
from weightsmith.experiments.gan_pairs import Config, data_of
from weightsmith.lab.job import Job
from weightsmith.lab.record import Recorder
from weightsmith.search import EvolveOptions, Resources, SearchResult, SearchSpace, evolve, gan
from weightsmith.search.progress import Progress, Watch


def first_stage(
    config: Config, seed: int, folder: Path, selector: Any, watch: Watch
) -> tuple[SearchResult, gan.Generator]:
    """Search generators over weights that they share; returns these weights too."""
    data, device = data_of(config), default_device()
    torch.manual_seed(seed)
    supernet = gan.Generator(cell_gain=config.cell_gain, **config.generator_sizes(data.images)).to(device)
    discriminator = gan.Discriminator(config.discriminator, **config.discriminator_sizes(data.images)).to(device)
    found = evolve(
        gan.GENERATOR_SPACE, gan.ScoreGenerator(data.reference, config.samples), gan.OBJECTIVES, model=supernet,
        trainer=gan.StageOne(discriminator, data.images, config.stage(1)),
        options=EvolveOptions(config.population, config.rounds, selector=selector),
        resources=_resources(config), folder=folder, seed=seed, watch=watch,
    )  # fmt: skip
    return found, supernet


def second_stage(config: Config, job: Job, winner: Any) -> SearchResult:
    """Search discriminators for the winner of stage 1, beginning with its shared weights."""
    data, device = data_of(config), default_device()
    torch.manual_seed(job.seed)
    supernet, sizes = stored_supernet(config, job), config.discriminator_sizes(data.images)
    models = gan.partners(supernet.subnet(winner), 1 if job.arm == "many-to-one" else config.population2).to(device)
    judge = gan.ScoreGenerator(data.reference, config.samples, size=_DiscriminatorSize(tuple(sizes.items())))
    return evolve(
        _fitting_discriminators(config.side), judge, gan.OBJECTIVES, model=models,
        trainer=gan.StageTwo(
            gan.Discriminator(**sizes).to(device), data.images, config.stage(2), reset=job.arm != "no-reset"
        ),
        options=EvolveOptions(config.population2, config.rounds2), resources=_resources(config),
        folder=job.folder / "stage-2", seed=job.seed, watch=shown_by(job.record),
    )  # fmt: skip


def stored_supernet(config: Config, job: Job) -> gan.Generator:
    """The shared weights of the seed's stage 1."""
    supernet = gan.Generator(**config.generator_sizes(data_of(config).images))
    supernet.load_state_dict(job.start["supernet"])
    return supernet


def rows_of(found: SearchResult) -> list[dict[str, float | str]]:
    """What charts are drawn from; failed individuals are counted and in none of the numbers."""
    rows: list[dict[str, float | str]] = []
    last = len(found.generations) - 1
    for generation in found.generations:
        good = [one for one in generation.scored if not one.failed]
        distances = [one.values["distance"] for one in good]
        row: dict[str, float | str] = {"phase": "rounds", "round": generation.number + 1}
        row["failed"] = len(generation.scored) - len(good)
        if good:
            row |= {"mean": float(np.mean(distances)), "best": min(distances), "worst": max(distances)}
        rows.append(row)
        places = {"front-first": 0, "front-middle": last // 2, "front-last": last}
        for phase in (phase for phase, number in places.items() if number == generation.number):
            rows += [
                {"phase": phase, "parameters": one.values["parameters"], "distance": one.values["distance"]}
                for one in good
                if one.rank == 0
            ]
    return rows


def shown_by(record: Recorder) -> Watch:
    """Tell those who watch where a search is."""

    def show(at: Progress) -> None:
        row: dict[str, float | str] = {"generation": f"{at.generation} of {at.generations}"}
        row["individual"] = f"{at.individual} of {at.population}" if at.individual else f"after {at.phase}"
        if at.best is not None:
            row["best"] = at.best
        if at.seconds_left is not None:
            row["left"] = f"{at.seconds_left / 60:.1f} min"
        record.show(row)

    return show


def _resources(config: Config) -> Resources:
    # jobs on a cluster fill it already: workers of their own would wait for room that other jobs hold
    return Resources("local" if config.search_engine == "auto" else config.search_engine, config.search_workers)


@dataclass(frozen=True, slots=True)
class _DiscriminatorSize:
    sizes: tuple[tuple[str, int], ...]

    def __call__(self, genotype: Any) -> int:
        return gan.discriminator_parameters(genotype, **dict(self.sizes))


def _fitting_discriminators(side: int) -> SearchSpace:
    if side % 16 == 0:  # the stem and three cells may halve it
        return gan.DISCRIMINATOR_SPACE
    genes = tuple(replace(gene, high=-1) if gene.low == -1 else gene for gene in gan.DISCRIMINATOR_SPACE.genes)
    return replace(gan.DISCRIMINATOR_SPACE, genes=genes)
