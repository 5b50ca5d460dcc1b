"""What counts, and how much."""

import torch
from torch import nn

from weightsmith.reweight import MetaRescaler, RandomBatches
from weightsmith.testing import State

_X, _Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
_ROWS = list(zip(_X, _Y, strict=True))


def _meta(**options):
    def make():
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        sampler = RandomBatches(_ROWS, 8) if options.get("meta_every") else None
        return model, optimizer, MetaRescaler(model, optimizer, 3, val_sampler=sampler, **options)

    return make


def _step(model, optimizer, meta):
    result = meta.step((_X, _Y), ids=torch.arange(24))
    return [result.loss, result.weights, *model.state_dict().values(), *meta.rescaler.state_dict().values()]


STATES = {
    "weightsmith.reweight.MetaRescaler": [
        State(_meta(), _step),
        State(_meta(meta_grad="head", meta_every=2), _step),
        State(_meta(meta_grad="none", normalize="mean", window=3), _step),
    ],
    "weightsmith.reweight.RandomBatches": [State(lambda: RandomBatches(_ROWS, 5), lambda draw: draw())],
}

ELSEWHERE = {
    # parts of the above, which tests/reweight compares with the authors' code and with definitions in loops
    "weightsmith.reweight.RescalingSettings",
    "weightsmith.reweight.LossRescaler",
    "weightsmith.reweight.rescaler_features",
    "weightsmith.reweight.SampleStatsMemory",
    "weightsmith.reweight.directional_derivatives",
    # a table
    "weightsmith.reweight.AuditTable",
}
