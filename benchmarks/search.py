"""Evaluations per hour at one and two workers, what sharing costs a forward pass, and what the engine adds.

    OMP_NUM_THREADS=1 python benchmarks/search.py [--only forward|overhead|workers] [--engine ray] [--individuals N]

Workers: generators of 16x16 images are recalibrated, sampled and judged; starting workers is not counted, since a
search does it once. A plain pool of two processes, which holds everything from the start, shows what
the machine allows. Overhead: evaluations that sleep, so that everything else is the engine's; weights of 7 M
parameters travel.
"""

import argparse
import multiprocessing
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor

import numpy as np
import torch
from torch import nn

from _timing import interleave, show
from weightsmith.search import EvolveOptions, Individual, Resources, SearchSpace, evolve, gan
from weightsmith.search.engines import workers_for

SIZES = {"channels": 16, "bottom": 2, "latent": 24, "image_channels": 1}


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=("forward", "overhead", "workers"))
    parser.add_argument("--engine", choices=("local", "ray"), default="local")
    parser.add_argument("--individuals", type=int, default=16)
    parser.add_argument("--samples", type=int, default=1000)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.only in (None, "forward"):
        forward()
    if arguments.only in (None, "overhead"):
        overhead(arguments.engine)
    if arguments.only in (None, "workers"):
        throughput(arguments.engine, arguments.individuals, arguments.samples)


def forward() -> None:
    """A sub-network inside its super-network beside a copy that holds nothing else."""
    supernet = gan.Generator(channels=32, latent=24).eval()
    genotype = gan.GENERATORS["G*"]
    alone, z = supernet.subnet(genotype), torch.randn(32, 24)

    def call(run: Callable[[], object]) -> Callable[[], object]:
        def timed() -> None:
            with torch.no_grad():
                run()

        return timed

    calls = {"un-shared copy": call(lambda: alone(z)), "sub-network": call(lambda: supernet(z, genotype))}
    show("G*, 32 channels, 32 images of 32x32", interleave(calls, rounds=20), baseline="un-shared copy")


class Sleeps:
    """An evaluation that costs the engine nothing."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __call__(self, _: object, individual: Individual) -> dict[str, float]:
        """Sleep."""
        time.sleep(self.seconds)
        return {"error": float(sum(individual.genotype[0]))}


def overhead(engine: str) -> None:
    """Seconds beside the evaluations themselves: training and first start of workers are not counted."""
    model, seconds, number = nn.Linear(2645, 2645), 0.5, 16  # 7.0 M parameters, as G* has
    individuals = [Individual(((slot,),), slot, 0, 0) for slot in range(number)]
    for workers in (1, 2):
        with workers_for(Sleeps(seconds), model, Resources(engine, workers)) as evaluate_all:
            list(evaluate_all(model.state_dict(), individuals[:workers]))
            begin = time.perf_counter()
            list(evaluate_all(model.state_dict(), individuals))
            spent = time.perf_counter() - begin
        extra = spent * workers / number - seconds
        print(f"{engine}, {workers} workers: {1e3 * extra:.1f} ms per evaluation, {extra / 10:.2%} of 10 s")
    space = SearchSpace.of(a=50, b=50)
    begin = time.perf_counter()
    evolve(space, Sleeps(0.0), {"error": "min"}, options=EvolveOptions(32, 18))
    print(f"asking, sorting and varying: {1e3 * (time.perf_counter() - begin) / 18:.1f} ms per generation of 32")


def throughput(engine: str, number: int, samples: int) -> None:
    """Evaluations per hour; both engines run in turn, twice."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 255, (2000, 1, 16, 16), dtype=torch.uint8, generator=generator)
    reference = gan.Reference.of(images, gan.train_stand_in(images, torch.arange(2000) % 10, epochs=1))
    judge, model = gan.ScoreGenerator(reference, samples), gan.Generator(**SIZES)
    rng = np.random.default_rng(0)
    individuals = [Individual(gan.GENERATOR_SPACE.sample(rng), slot, 0, 0) for slot in range(number)]
    seconds = {workers: best_of(judge, model, Resources(engine, workers), individuals) for workers in (1, 2)}
    for workers, spent in seconds.items():
        rate = 3600 * number / spent
        print(f"{engine}, {workers} workers: {rate:,.0f} evaluations per hour, {seconds[1] / spent:.2f}x")
    spent = plain_pool(judge, model, individuals)
    print(f"a plain pool, 2 processes: {3600 * number / spent:,.0f} evaluations per hour, {seconds[1] / spent:.2f}x")


_held: dict[str, object] = {}


def _hold(judge: object, model: nn.Module) -> None:
    torch.set_num_threads(1)
    _held.update(judge=judge, model=model)


def _evaluate(individual: Individual) -> object:
    return _held["judge"](_held["model"], individual)  # type: ignore[operator]


def plain_pool(judge: object, model: nn.Module, individuals: Sequence[Individual]) -> float:
    """The faster of two rounds in a pool of the standard library."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(2, context, _hold, (judge, model)) as pool:
        spent = []
        for _ in range(3):
            begin = time.perf_counter()
            list(pool.map(_evaluate, individuals))
            spent.append(time.perf_counter() - begin)
        return min(spent[1:])


def best_of(judge: object, model: nn.Module, resources: Resources, individuals: Sequence[Individual]) -> float:
    """The faster of two rounds, workers started and warm."""
    with workers_for(judge, model, resources) as evaluate_all:  # type: ignore[arg-type]
        spent = []
        for _ in range(3):
            begin = time.perf_counter()
            found = dict(evaluate_all(model.state_dict(), individuals))
            assert len(found) == len(individuals)
            spent.append(time.perf_counter() - begin)
        return min(spent[1:])


if __name__ == "__main__":
    main()
