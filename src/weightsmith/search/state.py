"""The state of a search on disk: written whole after every phase, so that a kill costs at most one phase."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from weightsmith.core.errors import UsageError, reason
from weightsmith.core.files import file_atomically, write_atomically
from weightsmith.search.records import Generation, Scored
from weightsmith.search.space import Genotype
from weightsmith.search.stored import reading

if TYPE_CHECKING:
    from weightsmith.search.options import Trainer

_FILE, _READABLE = "search.pt", "generations.json"
_PHASES = ("warm up", "select", "train", "evaluate")


@dataclass(slots=True)
class State:
    """Where a search is.

    Attributes:
        asked: What it was asked for, in words.
        generation: The one in progress.
        phase: What comes next in it: ``"warm up"``, ``"select"``, ``"train"`` or ``"evaluate"``.
        population: Its individuals.
        seen: All genotypes that were ever in a population.
        generations: What is finished.
        failed: Slots whose training was not finite.
        stopped: Why there will be no further generation.
    """

    asked: Mapping[str, str]
    generation: int = 0
    phase: str = "warm up"
    population: list[Genotype] = field(default_factory=list)
    seen: set[Genotype] = field(default_factory=set)
    generations: list[Generation] = field(default_factory=list)
    failed: frozenset[int] = frozenset()
    stopped: str = ""
    weights: Mapping[str, Any] | None = None
    trainer: Mapping[str, Any] | None = None

    def finished(self, generations: int) -> bool:
        """Whether nothing is left to do."""
        return bool(self.stopped) or self.generation >= generations

    def restore(self, model: nn.Module | None, trainer: "Trainer") -> None:
        """Hand the weights that were read to their owners."""
        try:
            if self.weights is not None and model is not None:
                model.load_state_dict(self.weights)
            if self.trainer is not None:
                trainer.load_state_dict(self.trainer)
        except Exception as error:  # a trainer of the user's may raise anything
            raise UsageError(
                f"the stored search does not fit this model and trainer: {reason(error)}; name another folder"
            ) from error
        self.weights = self.trainer = None


def load(folder: Path | None, asked: Mapping[str, str]) -> State | None:
    """Read the state of a search; ``None`` where there is none yet.

    Raises:
        UsageError: It is damaged, or of a search that was asked for something else.
    """
    file = None if folder is None else folder / _FILE
    if file is None or not file.is_file():
        return None
    with reading(file, "a search") as held:
        generations = [
            Generation(
                int(number), tuple(Scored(_tuples(g), _numbers(v), tuple(m), int(r), f) for g, v, m, r, f in scored)
            )
            for number, scored in held["generations"]
        ]
        state = State(
            dict(held["asked"]), int(held["generation"]), held["phase"], [_tuples(one) for one in held["population"]],
            {_tuples(one) for one in held["seen"]}, generations, frozenset(held["failed"]), str(held["stopped"]),
            held["weights"], held["trainer"],
        )  # fmt: skip
        if state.phase not in _PHASES or state.generation != len(generations):
            raise ValueError(f"phase {state.phase!r} of generation {state.generation} after {len(generations)}")
    if state.asked != asked:
        names = ", ".join(sorted(name for name in asked if state.asked.get(name) != asked[name]))
        raise UsageError(
            f"folder {folder} holds a search with other settings ({names}): name another folder, or make them as "
            "they were"
        )
    return state


def save(folder: Path, state: State, model: nn.Module | None, trainer: "Trainer") -> None:
    """Write the state, and what is finished as readable JSON."""
    held = {
        "asked": dict(state.asked),
        "generation": state.generation,
        "phase": state.phase,
        "population": [_lists(one) for one in state.population],
        "seen": sorted(_lists(one) for one in state.seen),
        "generations": [
            (
                generation.number,
                [(_lists(s.genotype), s.values, s.minimized, s.rank, s.failed) for s in generation.scored],
            )
            for generation in state.generations
        ],
        "failed": sorted(state.failed),
        "stopped": state.stopped,
        "weights": None if model is None else model.state_dict(),
        "trainer": trainer.state_dict(),
    }
    with file_atomically(folder / _FILE) as fresh:
        torch.save(held, fresh)
    write_atomically(folder / _READABLE, json.dumps([asdict(generation) for generation in state.generations]))


def _lists(genotype: Genotype) -> list[list[int]]:
    return [list(cell) for cell in genotype]


def _tuples(genotype: Any) -> Genotype:
    return tuple(tuple(int(gene) for gene in cell) for cell in genotype)


def _numbers(values: Any) -> dict[str, float]:
    return {str(name): float(value) for name, value in values.items()}
