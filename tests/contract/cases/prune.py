"""Which weights stay."""

import torch
from torch import nn

from weightsmith.prune import MagnitudePruner
from weightsmith.testing import Change, State


def _prune(model, x, where=None, **options):
    report = MagnitudePruner(model, where=where, **options).prune_(0.5)
    return report


def _pruner():
    torch.manual_seed(0)
    pruner = MagnitudePruner(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 4)))
    pruner.snapshot()
    return pruner


def _round(pruner):
    for parameter in pruner.model.parameters():  # a training that depends on nothing that is not saved
        nn.init.normal_(parameter)
    pruner.prune_(0.2)
    pruner.rewind_()
    return [mask.clone() for mask in pruner.masks.values()]


CHANGES = {
    "weightsmith.prune.MagnitudePruner": [
        Change(_prune),
        Change(lambda *args, **options: _prune(*args, scope="layerwise", score="magnitude_normalized", **options)),
    ],
}

STATES = {"weightsmith.prune.MagnitudePruner": [State(_pruner, _round)]}

ELSEWHERE = {
    # files and reports, and a whole course of training: tests/prune
    "weightsmith.prune.PruneReport",
    "weightsmith.prune.TensorDensity",
    "weightsmith.prune.iterate",
    "weightsmith.prune.Round",
    "weightsmith.prune.save_sparse",
    "weightsmith.prune.load_sparse",
    # changes the model's layers on purpose, and only where a channel is dead: tests/prune/test_shrink.py
    "weightsmith.prune.shrink_",
    "weightsmith.prune.Shrunk",
}
