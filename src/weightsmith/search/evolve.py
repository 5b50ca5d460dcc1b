"""Evolutionary search with shared weights: train all, evaluate each, keep half, vary the survivors.

Per generation the trainer trains the shared weights on the whole population; every individual is evaluated with the
weights as they then are, survivors included, since their weights have moved; half survive
(`weightsmith.search.selection`) and as many children join them. Sorting is pymoo's; its ``minimize`` is not used,
because it never evaluates survivors again.

Example:
    >>> space = SearchSpace.of(kernel=3, width=8)
    >>> def evaluate(model, individual):
    ...     kernel, width = individual.genotype[0]
    ...     return {"error": (kernel - 1) ** 2 + 1 / (1 + width), "size": kernel * width}
    >>> options = EvolveOptions(population=4, generations=3)
    >>> found = evolve(space, evaluate, {"error": "min", "size": "min"}, options=options)
    >>> len(found.generations)
    3
"""

import hashlib
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Literal

import numpy as np
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.search.code import code_of
from weightsmith.search.engines import workers_for
from weightsmith.search.evaluation import Evaluate, Individual, Values, check_values, drawing_from
from weightsmith.search.options import Direction, EvolveOptions, Trainer
from weightsmith.search.outcomes import EvaluateAll
from weightsmith.search.progress import Clock, Progress, Watch
from weightsmith.search.records import Generation, Scored, SearchResult
from weightsmith.search.resources import Resources
from weightsmith.search.selection import WORST, nsga2, ranks
from weightsmith.search.space import SearchSpace
from weightsmith.search.state import State, load, save
from weightsmith.search.variation import first_population, offspring


def evolve(
    space: SearchSpace,
    evaluate: Evaluate,
    objectives: Mapping[str, Direction],
    *,
    model: nn.Module | None = None,
    trainer: Trainer | None = None,
    options: EvolveOptions | None = None,
    engine: Literal["local", "ray"] = "local",
    workers: int | None = None,
    address: str | None = None,
    resources: Resources | None = None,
    folder: Path | str | None = None,
    seed: int = 0,
    progress: Callable[[Generation], None] = lambda generation: None,
    watch: Watch = lambda progress: None,
) -> SearchResult:
    """Search a space for its Pareto front.

    Args:
        space: The genotypes.
        evaluate: ``(model, individual) -> values``: a copy of ``model`` with the generation's weights in evaluation
            mode, and what to evaluate; it returns numbers by name. It runs in any process, with seeded global
            generators. An individual counts as the worst where an objective is not finite or a value named ``failed``
            is not 0.
        objectives: Which of the values decide and in which direction, the most important first.
        model: Module with the shared weights; ``None`` when nothing is shared.
        trainer: Trains it, see `Trainer`.
        options: How the search runs.
        engine: ``"local"`` (this process, or ``workers`` processes) or ``"ray"``.
        workers: Parallel evaluations. The result does not depend on it.
        address: A running Ray cluster, for example ``"auto"``.
        resources: More about workers: threads, GPUs; replaces ``engine``, ``workers`` and ``address``.
        folder: Where the state is kept, after every phase of a generation; a search that was killed goes on from there,
            unless an argument or the code of ``evaluate`` or ``trainer`` has changed.
        seed: Everything random follows from it.
        progress: Called with each generation that is finished.
        watch: Called after every phase and evaluation with a `weightsmith.search.progress.Progress`.

    Returns:
        All generations, the front and the best individual.

    Raises:
        UsageError: An argument is out of range, or ``folder`` holds another search; before anything is trained.
        EvaluationFailed: ``evaluate`` raised.

    Source:
        arXiv 2111.15097, algorithm 1.
    """
    options, trainer = options or EvolveOptions(), trainer or Trainer()
    resources = resources or Resources(engine, workers, address)
    _check(space, objectives, options, resources, seed)
    where = None if folder is None else Path(folder)
    asked = _asked(space, objectives, options, resources, seed, model)
    asked |= {"code of evaluate": code_of(evaluate), "code of trainer": code_of(trainer)}
    state = load(where, asked) or State(asked)
    state.restore(model, trainer)
    for generation in state.generations:
        progress(generation)
    if state.finished(options.generations):
        return SearchResult(tuple(state.generations), tuple(objectives), state.stopped)
    told = _told(state, objectives, options, watch)
    with workers_for(evaluate, model, resources) as evaluate_all:
        while not state.finished(options.generations):
            _advance(state, space, objectives, options, trainer, model, evaluate_all, seed, told)
            if where is not None:
                save(where, state, model, trainer)
            if state.phase == "select":
                progress(state.generations[-1])
    return SearchResult(tuple(state.generations), tuple(objectives), state.stopped)


def _advance(
    state: State,
    space: SearchSpace,
    objectives: Mapping[str, Direction],
    options: EvolveOptions,
    trainer: Trainer,
    model: nn.Module | None,
    evaluate_all: EvaluateAll,
    seed: int,
    told: Callable[[str, int, Values | None], None],
) -> None:
    """Do the next phase: warm up, select, train, or evaluate."""
    number = state.generation
    if state.phase == "warm up":
        drawn = derived(seed, 0, "warm up")
        with drawing_from(drawn):
            trainer.warm_up(model, space, drawn)
        told("warm up", 0, None)
        rng = np.random.default_rng(derived(seed, 0, "population"))
        state.population = first_population(space, options.population, state.seen, rng)
        if len(state.population) < options.population:
            raise UsageError(
                f"the search space holds {len(state.population)} genotypes, fewer than population={options.population}"
                ": lower population or widen the space"
            )
        state.phase = "train"
    elif state.phase == "train":
        drawn = derived(seed, number, "train")
        trainer.failed = frozenset()
        with drawing_from(drawn):
            trainer.train(model, state.population, drawn)
        state.failed = trainer.failed
        told("train", 0, None)
        state.phase = "evaluate"
    elif state.phase == "select":
        last = state.generations[-1]
        trainer.selected(model, SearchResult((last,), tuple(objectives)).best_slot)
        rng = np.random.default_rng(derived(seed, number - 1, "vary"))
        _next_population(state, space, last.scored, options, rng)
        state.phase = "train"
    else:
        shared = derived(seed, number, "evaluate")
        asked = [Individual(genotype, slot, number, shared) for slot, genotype in enumerate(state.population)]
        found: dict[int, Values] = {}
        for slot, values in evaluate_all({} if model is None else model.state_dict(), asked):
            found[slot] = values
            told("evaluate", len(found), None if slot in state.failed or values.get("failed") else values)
        scored = _scored(state, [found[slot] for slot in range(len(asked))], objectives)
        state.generations.append(Generation(number, scored))
        # selection waits for the next generation: a finished search can be given more of them
        state.generation, state.phase = number + 1, "select"


def _told(
    state: State, objectives: Mapping[str, Direction], options: EvolveOptions, watch: Watch
) -> Callable[[str, int, Values | None], None]:
    (name, direction), clock = next(iter(objectives.items())), Clock(options.generations * options.population)
    better = min if direction == "min" else max
    known = [one.values[name] for generation in state.generations for one in generation.scored if not one.failed]
    best = better(known) if known else None

    def tell(phase: str, evaluated: int, values: Values | None) -> None:
        nonlocal best
        value = None if values is None else values.get(name)
        if value is not None and math.isfinite(value):
            best = value if best is None else better(best, value)
        left = clock.left(state.generation * options.population + evaluated, now=phase == "evaluate")
        watch(Progress(phase, state.generation + 1, options.generations, evaluated, options.population, best, left))

    return tell


def _scored(state: State, found: Sequence[Values], objectives: Mapping[str, Direction]) -> tuple[Scored, ...]:
    failed = [
        slot in state.failed
        or bool(values.get("failed"))
        or not check_values(values, objectives, state.population[slot])
        for slot, values in enumerate(found)
    ]
    signs = [1.0 if direction == "min" else -1.0 for direction in objectives.values()]
    rows = [
        [sign * values[name] for sign, name in zip(signs, objectives, strict=True)] if not bad else [WORST] * len(signs)
        for values, bad in zip(found, failed, strict=True)
    ]
    ranked = ranks(rows)
    return tuple(
        Scored(genotype, values, tuple(row), int(rank), bad)
        for genotype, values, row, rank, bad in zip(state.population, found, rows, ranked, failed, strict=True)
    )


def _next_population(
    state: State, space: SearchSpace, scored: Sequence[Scored], options: EvolveOptions, rng: np.random.Generator
) -> None:
    keep = options.population // 2
    if options.selector == "random":
        fresh = first_population(space, options.population, state.seen, rng)
        if len(fresh) < options.population:
            state.stopped = "every genotype of the space has been evaluated"
            return
        state.population = fresh
        return
    if options.selector == "nsga2":
        survivors: Sequence[int] = nsga2([one.minimized for one in scored], keep, rng)
    else:
        assert callable(options.selector)
        survivors = options.selector(scored, keep, rng)
    parents = [scored[index].genotype for index in survivors]
    if len(set(survivors)) != keep:
        raise UsageError(f"selector must return {keep} different indices, got {list(survivors)}")
    children = offspring(space, parents, keep, state.seen, rng, crossover=options.crossover)
    if not children:
        state.stopped = "every genotype of the space has been evaluated"
    state.population = [*parents, *children]


def derived(seed: int, generation: int, purpose: str) -> int:
    """A seed for one purpose in one generation; independent of how the search came there."""
    entropy = [seed, generation, *purpose.encode()]
    return int(np.random.SeedSequence(entropy).generate_state(1, np.uint64)[0] >> np.uint64(1))


def _check(
    space: SearchSpace, objectives: Mapping[str, Direction], options: EvolveOptions, resources: Resources, seed: int
) -> None:
    if not isinstance(space, SearchSpace):
        raise TypeError(f"space must be a SearchSpace, got {type(space).__name__}")
    if not objectives:
        raise UsageError('objectives must name at least one value, for example {"accuracy": "max"}, got none')
    for name, direction in objectives.items():
        if direction not in ("min", "max"):
            raise UsageError(f"objectives must be 'min' or 'max', got {direction!r} for {name!r}")
    if not isinstance(seed, int) or seed < 0:
        raise UsageError(f"seed must be a whole number of at least 0, got {seed!r}")
    options.check()
    resources.check()


def _asked(
    space: SearchSpace,
    objectives: Mapping[str, Direction],
    options: EvolveOptions,
    resources: Resources,
    seed: int,
    model: nn.Module | None,
) -> dict[str, str]:
    """What a resumed search must have in common with the one that was killed; the engine is not among it."""
    selector = options.selector
    plain = asdict(options) | {"selector": selector if isinstance(selector, str) else selector.__qualname__}
    weights = [] if model is None else [(name, tuple(value.shape)) for name, value in model.state_dict().items()]
    return {
        "space": repr((space.genes, space.cells)),
        "objectives": repr(dict(objectives)),
        "options": repr({name: value for name, value in plain.items() if name != "generations"})
        + ("" if isinstance(selector, str) else code_of(selector)),
        "threads": str(resources.threads),
        "seed": str(seed),
        "model": str(hash_of(repr(weights))),
    }


def hash_of(text: str) -> str:
    """First digits of a SHA-256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]
