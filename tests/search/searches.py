"""A small search with shared weights that workers can import."""

import os
import signal
import time
from pathlib import Path

import torch
from torch import nn

from weightsmith.search import SearchSpace, Trainer

SPACE = SearchSpace.of(a=5, b=5, c=4)
OBJECTIVES = {"error": "min", "size": "min"}


class Shared(nn.Module):
    """A table of weights, one per gene and value."""

    def __init__(self):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(3, 5))
        self.register_buffer("calls", torch.zeros(()))


class Adds(Trainer):
    """Moves the entries of the population by noise, with momentum as a state of its own."""

    def __init__(self):
        self.momentum = torch.zeros(3, 5)
        self.best = []

    def warm_up(self, model, space, seed):
        model.table.data += torch.rand(3, 5)

    def train(self, model, population, seed):
        for (cell,) in population:
            for gene, value in enumerate(cell):
                self.momentum[gene, value] = 0.9 * self.momentum[gene, value] + torch.randn(())
        model.table.data += self.momentum

    def selected(self, model, best):
        self.best.append(best)

    def state_dict(self):
        return {"momentum": self.momentum, "best": self.best}

    def load_state_dict(self, state):
        self.momentum, self.best = state["momentum"], list(state["best"])


def evaluate(model, individual):
    model.calls += 1  # an evaluation may change its copy
    (cell,) = individual.genotype
    score = sum(model.table[gene, value].item() for gene, value in enumerate(cell))
    return {"error": score + torch.randn(()).item() + float(model.calls), "size": float(sum(cell))}


def evaluate_slowly(model, individual):
    time.sleep(0.05)
    return evaluate(model, individual)


class Stops(Exception):
    pass


class Budgeted:
    """Evaluates until its budget is spent; the budget is no setting, since it changes by itself."""

    def __init__(self, left=10**9):
        self.left = left

    def __call__(self, model, individual):
        if not self.left:
            raise Stops
        self.left -= 1
        return evaluate(model, individual)


def dies_once(model, individual):
    """Kill the worker in the middle of a generation, the first time only."""
    mark = Path(os.environ["WEIGHTSMITH_TEST_MARK"])
    if individual.slot == 2 and individual.generation == 1 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return evaluate(model, individual)


def dies_always(model, individual):
    os.kill(os.getpid(), signal.SIGKILL)


def raises(model, individual):
    raise ArithmeticError("no luck")
