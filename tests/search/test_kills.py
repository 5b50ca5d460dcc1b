"""Searches that are killed, and clusters that lose workers; they start processes and take their time."""

import json
import multiprocessing
import os
import random
import signal
import time

import pytest
import torch
from searches import OBJECTIVES, SPACE, Adds, Shared, dies_once, evaluate, evaluate_slowly

from weightsmith.search import EvolveOptions, evolve

OPTIONS = EvolveOptions(population=8, generations=20)
KILLS = 20


def search(function=evaluate, **more):
    return evolve(SPACE, function, OBJECTIVES, model=Shared(), trainer=Adds(), options=OPTIONS, **more)


def history(found):
    return [[(one.genotype, one.values, one.rank) for one in generation.scored] for generation in found.generations]


@pytest.mark.slow
def test_a_search_killed_twenty_times_ends_as_an_unbroken_one(tmp_path):
    ended, folder = tmp_path / "ended", tmp_path / "search"
    unbroken = history(search())  # also imports what the children need

    def child():
        search(evaluate_slowly, folder=folder)
        ended.touch()

    rng, kills, finished = random.Random(0), 0, 0
    while kills < KILLS and not ended.exists():
        process = multiprocessing.get_context("fork").Process(target=child)
        process.start()
        time.sleep(rng.uniform(0.05, 0.7))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        kills += 1
        readable = folder / "generations.json"
        now = len(json.loads(readable.read_text())) if readable.exists() else 0
        assert now >= finished, "a finished generation was lost"
        finished = now
    assert kills == KILLS, "the search ended before it was killed often enough"
    assert finished > 1, "the kills came too early to show anything"
    assert history(search(evaluate_slowly, folder=folder)) == unbroken


@pytest.mark.slow
def test_a_ray_cluster_that_loses_a_worker_finds_the_same(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    monkeypatch.setenv("WEIGHTSMITH_TEST_MARK", str(tmp_path / "mark"))
    found = search(dies_once, engine="ray", workers=2)
    assert (tmp_path / "mark").exists(), "no worker was killed"
    assert history(found) == history(search())
    assert torch.initial_seed() == 0
