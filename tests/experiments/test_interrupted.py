"""Every arm of every experiment, stopped again and again just after a checkpoint, ends as one that was not stopped.

Kills at random moments seldom come between two steps of a small training; these always do.
"""

import random

import pytest
import torch
from test_experiments import CONFIGS, small

from weightsmith.lab.job import Job
from weightsmith.lab.progress import Progress
from weightsmith.lab.record import Recorder, plain_metrics

MOST = 12  # interruptions of one job
TIMED = ("seconds", "step_ms", "setup_ms")


class Stopped(BaseException):
    pass


class Interruptions:
    """Stops a training after some of its steps, with a checkpoint written, a few times."""

    def __init__(self, chance):
        self.chance, self.count = chance, 0
        self.again()

    def again(self):
        self.left = self.chance.choice([1, 2, 3, 5]) if self.count < MOST else None

    def __call__(self, progress):
        if self.left is None:
            return
        self.left -= 1
        if not self.left:
            progress.save()
            self.count += 1
            self.again()
            raise Stopped


def until_done(call):
    while True:
        try:
            return call()
        except Stopped:
            continue


def untimed(numbers):
    return {name: repr(value) for name, value in numbers.items() if not name.startswith(TIMED)}  # repr: nan equals nan


def do(experiment, config, arm, folder, start):
    folder.mkdir(parents=True, exist_ok=True)
    job = Job(arm, 0, Recorder(), folder, torch.device("cpu"), start=start)
    metrics, scores = plain_metrics(experiment.job(config, job))
    return {
        "metrics": untimed(metrics),
        "rows": [untimed(row) for row in job.record.rows],
        "scores": {name: values.tolist() for name, values in scores.items() if not name.startswith(TIMED)},
        "diverged": job.diverged,
    }


def equal(first, second):
    if isinstance(first, dict):
        return first.keys() == second.keys() and all(equal(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return len(first) == len(second) and all(map(equal, first, second))
    return torch.equal(first, second) if isinstance(first, torch.Tensor) else first == second


@pytest.mark.slow
@pytest.mark.parametrize("slug", CONFIGS)
def test_every_arm_that_is_interrupted_ends_bit_identical(tmp_path, monkeypatch, slug):
    experiment, config = small(slug)
    start = None
    if experiment.start is not None:
        start = experiment.start(config, 0, tmp_path / "start")
    arms = [arm.name for arm in experiment.arms(config)]
    expected = {arm: do(experiment, config, arm, tmp_path / arm, start) for arm in arms}

    interrupt = Interruptions(random.Random(slug))
    monkeypatch.setattr(Progress, "save_if_due", lambda progress: interrupt(progress))
    if experiment.start is not None:
        again = until_done(lambda: experiment.start(config, 0, tmp_path / "start-again"))
        assert equal(again, start)
    for arm in arms:
        interrupt = Interruptions(random.Random(arm))
        folder = tmp_path / f"{arm}-again"
        found = until_done(lambda arm=arm, folder=folder: do(experiment, config, arm, folder, start))
        assert found == expected[arm], arm
