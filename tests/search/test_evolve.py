import importlib
import json
import math
import os
import subprocess
import sys
import time
from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from searches import OBJECTIVES, SPACE, Adds, Budgeted, Shared, Stops, dies_always, dies_once, evaluate, raises

from weightsmith.core.errors import UsageError
from weightsmith.search import EvaluationFailed, EvolveOptions, SearchSpace, Trainer, evolve
from weightsmith.search.code import code_of

OPTIONS = EvolveOptions(population=8, generations=4)


def search(function=evaluate, **more):
    return evolve(SPACE, function, OBJECTIVES, **{"model": Shared(), "trainer": Adds(), "options": OPTIONS} | more)


def history(found):
    return [[(one.genotype, one.values, one.rank) for one in generation.scored] for generation in found.generations]


def test_a_search_without_weights_finds_the_minimum():
    def distance(_, individual):
        a, b, c = individual.genotype[0]
        return {"error": (a - 3) ** 2 + (b - 1) ** 2 + (c - 2) ** 2}

    found = evolve(SPACE, distance, {"error": "min"}, options=EvolveOptions(population=12, generations=8))
    assert found.best.genotype == ((3, 1, 2),)
    assert found.evaluations == 96
    worst = evolve(SPACE, distance, {"error": "max"}, options=EvolveOptions(population=12, generations=8))
    assert worst.best.values["error"] > 10


def test_survivors_are_evaluated_again_with_the_weights_as_they_are():
    found = search()
    before, after = ({one.genotype: one.values["error"] for one in g.scored} for g in found.generations[:2])
    both = before.keys() & after.keys()
    assert len(both) == OPTIONS.population // 2
    assert all(before[genotype] != after[genotype] for genotype in both)


def test_children_are_new_and_one_gene_away_from_a_parent():
    found = search()
    seen = {one.genotype for one in found.generations[0].scored}
    for generation in found.generations[1:]:
        population = [one.genotype for one in generation.scored]
        parents, children = population[:4], population[4:]
        assert set(parents) <= seen
        assert not set(children) & seen
        for child in children:
            assert any(sum(x != y for x, y in zip(child[0], p[0], strict=True)) == 1 for p in parents)
        seen |= set(children)


@pytest.mark.slow
def test_two_worker_processes_find_what_one_process_finds():
    assert history(search(workers=2)) == history(search())


def test_an_evaluation_leaves_the_shared_weights_and_generators_alone():
    model = Shared()
    before = torch.get_rng_state()
    search(model=model)
    assert model.calls == 0
    assert torch.equal(torch.get_rng_state(), before)


def test_a_worker_that_dies_is_replaced_and_its_individual_evaluated_again(tmp_path, monkeypatch):
    monkeypatch.setenv("WEIGHTSMITH_TEST_MARK", str(tmp_path / "mark"))
    found = search(dies_once, workers=2)
    assert (tmp_path / "mark").exists()
    assert history(found) == history(search())


@pytest.mark.slow
def test_an_individual_that_kills_every_worker_ends_the_search():
    with pytest.raises(EvaluationFailed, match=r"3 workers died while evaluating \(\("):
        search(dies_always, workers=2, options=EvolveOptions(population=4, generations=1))


@pytest.mark.parametrize("workers", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_error_of_the_evaluation_names_the_genotype(workers):
    with pytest.raises(EvaluationFailed, match=r"evaluating \(\(.*no luck"):
        search(raises, workers=workers)


@pytest.mark.parametrize("calls", [1, 7, 8, 9, 20, 31])
def test_a_search_that_was_stopped_anywhere_goes_on_to_the_same_end(tmp_path, calls):
    with pytest.raises(EvaluationFailed):
        search(Budgeted(calls), folder=tmp_path)
    finished = len(json.loads((tmp_path / "generations.json").read_text()))
    assert finished == calls // 8
    shown, trainer = [], Adds()
    found = search(Budgeted(), folder=tmp_path, progress=shown.append, trainer=trainer)
    unbroken = Adds()
    assert history(found) == history(search(trainer=unbroken))
    assert [generation.number for generation in shown] == [0, 1, 2, 3]
    assert trainer.best == unbroken.best
    assert history(search(Budgeted(0), folder=tmp_path)) == history(found)  # nothing is left to do


@pytest.mark.parametrize("phase", ["warm_up", "train"])
def test_a_search_that_was_stopped_in_training_goes_on_to_the_same_end(tmp_path, phase):
    class Breaks(Adds):
        broken = 0

        def __getattribute__(self, name):
            if name == phase:
                Breaks.broken += 1
                if Breaks.broken == (1 if phase == "warm_up" else 3):
                    raise Stops
            return super().__getattribute__(name)

    with pytest.raises(Stops):
        search(folder=tmp_path, trainer=Breaks())
    assert history(search(folder=tmp_path, trainer=Breaks())) == history(search())


def test_more_generations_can_be_added_to_a_finished_search(tmp_path):
    search(folder=tmp_path, options=replace(OPTIONS, generations=2))
    longer = search(folder=tmp_path, options=replace(OPTIONS, generations=4))
    whole = search(folder=tmp_path / "whole", options=replace(OPTIONS, generations=4))
    assert longer.generations == whole.generations
    with pytest.raises(UsageError, match=r"other settings \(seed\)"):
        search(folder=tmp_path, seed=1)
    with pytest.raises(UsageError, match=r"other settings \(options\)"):
        search(folder=tmp_path, options=EvolveOptions(population=6))


def test_a_search_is_not_resumed_with_other_code(tmp_path, monkeypatch):
    code = "def evaluate(model, individual):\n    return {'error': float(individual.genotype[0][0]), 'size': %s}\n"
    file = tmp_path / "my_search.py"
    file.write_text(code % "1.0")
    monkeypatch.syspath_prepend(tmp_path)
    mine = importlib.import_module("my_search")
    folder = tmp_path / "search"
    search(mine.evaluate, folder=folder)
    search(mine.evaluate, folder=folder)
    with pytest.raises(UsageError, match=r"other settings \(code of evaluate\): name another folder"):
        search(folder=folder)
    with pytest.raises(UsageError, match=r"code of trainer"):
        search(mine.evaluate, folder=folder, trainer=Trainer())
    file.write_text(code % "2.0")
    with pytest.raises(UsageError, match=r"edited after module 'my_search' was imported"):
        search(mine.evaluate, folder=folder)
    monkeypatch.delitem(sys.modules, "my_search")
    os.utime(file, (time.time() + 9,) * 2)  # bytecode is told apart by size and time
    with pytest.raises(UsageError, match=r"code of evaluate"):
        search(importlib.import_module("my_search").evaluate, folder=folder)


def test_code_changes_with_settings_and_without_a_file():
    @dataclass(frozen=True)
    class Setting:
        value: object

    @dataclass
    class Counter:
        value: int

    assert code_of(Setting(1)) == code_of(Setting(1)) != code_of(Setting(2))
    assert code_of(Setting(torch.ones(2))) != code_of(Setting(torch.zeros(2)))
    assert code_of(Counter(1)) == code_of(Counter(2))
    assert code_of(partial(evaluate, individual=1)) != code_of(partial(evaluate, individual=2))
    assert code_of(evaluate) != code_of(raises)
    cells = [{"__name__": "no_such_module"} for _ in range(3)]
    for space, number in zip(cells, (1, 1, 2), strict=True):
        exec(f"def f(model, individual):\n    return [lambda: {number}]", space)
    assert code_of(cells[0]["f"]) == code_of(cells[1]["f"]) != code_of(cells[2]["f"])


def test_code_without_a_file_is_the_same_in_every_process():
    program = (
        "from weightsmith.search.code import code_of\n"
        "def evaluate(model, individual): return individual in {'one', 'two', 'three', 'four'}\n"
        "print(code_of(evaluate))"
    )
    found = {
        subprocess.run(
            [sys.executable, "-c", program], env=os.environ | {"PYTHONHASHSEED": seed}, check=True, text=True,
            capture_output=True,
        ).stdout
        for seed in "123"
    }  # fmt: skip
    assert len(found) == 1


def test_a_state_of_another_model_is_one_clear_error(tmp_path):
    search(folder=tmp_path)
    held = torch.load(tmp_path / "search.pt", weights_only=True)
    held["weights"]["table"] = torch.zeros(2, 2)
    torch.save(held, tmp_path / "search.pt")
    with pytest.raises(UsageError, match="does not fit this model and trainer"):
        search(folder=tmp_path)


def test_those_who_watch_are_told_where_the_search_is():
    told = []
    found = search(watch=told.append)
    assert [at.phase for at in told[:3]] == ["warm up", "train", "evaluate"]
    assert told[0].seconds_left is None
    assert told[0].best is None
    last = told[-1]
    assert (last.generation, last.generations, last.individual, last.population) == (4, 4, 8, 8)
    assert last.seconds_left == 0.0
    assert last.best == min(one.values["error"] for generation in found.generations for one in generation.scored)
    assert all(at.seconds_left > 0 for at in told[2:-1])


def test_a_damaged_state_is_one_clear_error(tmp_path):
    search(folder=tmp_path)
    file = tmp_path / "search.pt"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(UsageError, match="cannot be read as a search"):
        search(folder=tmp_path)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_individual_without_a_finite_value_is_the_worst(bad):
    def sometimes(_, individual):
        (cell,) = individual.genotype
        return {"error": bad if cell[0] == 0 else float(cell[1]), "size": float(cell[0])}

    found = evolve(SPACE, sometimes, OBJECTIVES, options=OPTIONS)
    for generation in found.generations:
        failed = [one for one in generation.scored if one.failed]
        assert all(one.genotype[0][0] == 0 for one in failed)
        good = max(one.rank for one in generation.scored if not one.failed)
        assert all(one.rank == good + 1 for one in failed)
    assert any(one.failed for one in found.generations[0].scored)


def test_a_slot_whose_training_failed_is_the_worst():
    class Fails(Adds):
        def train(self, model, population, seed):
            super().train(model, population, seed)
            self.failed = frozenset({3})

    found = search(trainer=Fails())
    assert all([one.failed for one in g.scored] == [slot == 3 for slot in range(8)] for g in found.generations)


def test_when_all_fail_there_is_no_best_one():
    found = evolve(SPACE, lambda *_: {"error": math.nan}, {"error": "min"}, options=OPTIONS)
    with pytest.raises(UsageError, match="all individuals of the last generation failed"):
        _ = found.best


def test_a_space_that_is_used_up_ends_the_search_early():
    tiny = SearchSpace.of(a=3, b=2)
    found = evolve(tiny, lambda _, i: {"x": i.genotype[0][0]}, {"x": "min"}, options=EvolveOptions(4, 10))
    assert 1 < len(found.generations) < 10
    assert "every genotype" in found.stopped
    with pytest.raises(UsageError, match="holds 6 genotypes, fewer than population=8"):
        evolve(tiny, lambda _, i: {"x": 0.0}, {"x": "min"}, options=EvolveOptions(8, 10))


def test_random_search_draws_every_population_anew():
    found = search(options=EvolveOptions(population=8, generations=4, selector="random"))
    drawn = [one.genotype for generation in found.generations for one in generation.scored]
    assert len(set(drawn)) == 32


def test_ties_of_the_best_are_decided_by_the_next_objective():
    values = {0: (1.0, 3.0, 9.0), 1: (1.0, 2.0, 9.5), 2: (2.0, 1.0, 0.0), 3: (9.0, 9.0, 9.0)}

    def listed(_, individual):
        return dict(zip("xyz", values[individual.slot], strict=True))

    found = evolve(SPACE, listed, {"x": "min", "y": "min", "z": "min"}, options=EvolveOptions(4, 1))
    assert found.best.values["y"] == 2.0
    assert found.best_slot == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"options": EvolveOptions(population=5)}, "population must be an even number of at least 4, got 5"),
        ({"options": EvolveOptions(population=2)}, "population must be an even number of at least 4, got 2"),
        ({"options": EvolveOptions(generations=0)}, "generations must be a whole number of at least 1, got 0"),
        ({"options": EvolveOptions(crossover=1.5)}, "crossover must be between 0 and 1"),
        ({"options": EvolveOptions(selector="best")}, "selector must be"),
        ({"engine": "dask"}, "engine must be 'local' or 'ray', got 'dask'"),
        ({"workers": 0}, "workers must be a whole number of at least 1, got 0"),
        ({"address": "auto"}, "address is for engine='ray'"),
        ({"seed": -1}, "seed must be"),
    ],
)
def test_arguments_out_of_range_are_refused(arguments, words, tmp_path):
    with pytest.raises(UsageError, match=words):
        search(raises, folder=tmp_path / "new", **arguments)
    assert not (tmp_path / "new").exists()


def test_objectives_and_values_must_fit():
    for objectives in ({}, {"error": "lower"}):
        with pytest.raises(UsageError, match="objectives must"):
            evolve(SPACE, evaluate, objectives)
    with pytest.raises(UsageError, match="evaluate returned no 'error'"):
        evolve(SPACE, lambda *_: {"other": 1}, {"error": "min"}, options=OPTIONS)
    with pytest.raises(UsageError, match="must return numbers by name"):
        evolve(SPACE, lambda *_: 3.0, {"error": "min"}, options=OPTIONS)
    with pytest.raises(UsageError, match="must return numbers by name"):
        evolve(SPACE, lambda *_: {"error": "low"}, {"error": "min"}, options=OPTIONS)
    with pytest.raises(TypeError, match="space must be a SearchSpace"):
        evolve([3, 3], evaluate, OBJECTIVES)


def test_what_cannot_be_sent_to_workers_says_so():
    from weightsmith.search.gan import Discriminator

    with pytest.raises(UsageError, match="must be picklable"):
        search(workers=2, model=Discriminator("D_C", channels=2), trainer=Trainer())
