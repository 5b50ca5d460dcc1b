"""First weights for interval bounds: the official code's numbers, and what is left alone."""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations

from weightsmith.core.errors import UsageError
from weightsmith.init import ibp_
from weightsmith.init.ibp import fan_in
from weightsmith.lab.models import build_model

RECORDED = json.loads((Path(__file__).parents[1] / "golden" / "fast-ibp-init.json").read_text())
MODELS = {
    "cnn_1x28": ("cnn7", 1, 28), "cnn_3x32": ("cnn7", 3, 32), "wide_resnet_8_3x32": ("wide_resnet8", 3, 32),
    "resnext_1x28": ("resnext_certified", 1, 28),
}  # fmt: skip


@pytest.mark.parametrize("name", RECORDED)
def test_weights_are_drawn_as_in_the_official_code(name):
    architecture, channels, size = MODELS[name]
    torch.manual_seed(0)
    model = build_model(architecture, channels=channels, size=size, classes=10)
    recorded = RECORDED[name]
    assert sum(p.numel() for p in model.parameters()) == recorded["n_params"]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ibp_(model)
    weights = [(key, p) for key, p in model.named_parameters() if p.dim() > 1]
    assert len(weights) == len(recorded["weights"])
    for (key, weight), expected in zip(weights, recorded["weights"].values(), strict=True):
        assert list(weight.shape) == expected["shape"]
        layer = model.get_submodule(key.rpartition(".")[0])
        assert fan_in(layer) == expected["fan_in"]
        if not expected["reinitialised"]:
            assert torch.equal(weight, before[key])
        elif weight.numel() > 2000:
            sigma = expected["sigma"] / (2 if expected["halved"] else 1)
            assert weight.std().item() == pytest.approx(sigma, rel=0.05)
    for key, value in model.named_parameters():
        if value.dim() == 1:
            assert torch.equal(value, before[key])


def test_widths_neither_explode_nor_vanish():
    torch.manual_seed(0)
    model = nn.Sequential(*(part for _ in range(6) for part in (nn.Linear(400, 400), nn.ReLU())), nn.Linear(400, 10))
    ibp_(model)
    delta = torch.full((400,), 1.0)
    for layer in list(model)[:-1:2]:
        delta = layer.weight.abs() @ delta / 2
    assert 0.7 < delta.mean() < 1.4


class Heads(nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk, self.one, self.two = nn.Conv2d(1, 8, 3), nn.Conv2d(8, 3, 1), nn.Linear(8, 2)

    def forward(self, x):
        x = torch.relu(self.trunk(x))
        return self.one(x), {"two": self.two(x.mean((2, 3))).log_softmax(-1)}


def test_every_layer_that_feeds_an_output_stays():
    model = Heads()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    ibp_(model)
    changed = {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])}
    assert changed == {"trunk.weight"}


def test_frozen_weights_stay_and_shared_ones_are_drawn_once():
    shared, frozen = nn.Linear(50, 50), nn.Linear(50, 50)
    frozen.weight.requires_grad_(False)
    kept = frozen.weight.clone()
    model = nn.Sequential(shared, nn.ReLU(), shared, nn.ReLU(), frozen, nn.ReLU(), nn.Linear(50, 2))
    generator, again = torch.Generator().manual_seed(3), torch.Generator().manual_seed(3)
    ibp_(model, generator=generator)
    expected = torch.empty(50, 50).normal_(0, math.sqrt(2 * math.pi) / 50, generator=again)
    assert torch.equal(shared.weight, expected)
    assert torch.equal(frozen.weight, kept)


def test_a_weight_shared_with_the_output_stays():
    shared = nn.Linear(50, 50)
    kept = shared.weight.clone()
    ibp_(nn.Sequential(shared, nn.ReLU(), shared))
    assert torch.equal(shared.weight, kept)


@pytest.mark.parametrize(
    ("layer", "n"),
    [
        (nn.Linear(7, 3), 7), (nn.Conv2d(8, 16, 3, groups=4), 18), (nn.Conv2d(8, 8, 5, groups=8), 25),
        (nn.Conv1d(4, 2, 3), 12), (nn.ConvTranspose2d(6, 4, 4, stride=2), 24),
    ],
)  # fmt: skip
def test_fan_in_counts_what_one_output_adds_up(layer, n):
    assert fan_in(layer) == n


def test_a_model_that_cannot_be_traced_keeps_its_last_weight():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(9, 9), nn.Linear(9, 2)

        def forward(self, x):
            return self.b(self.a(x) if x.sum() > 0 else x)

    model = Branch()
    kept, changed = model.b.weight.clone(), model.a.weight.clone()
    ibp_(model)
    assert torch.equal(model.b.weight, kept)
    assert not torch.equal(model.a.weight, changed)


def test_computed_weights_and_empty_choices_are_refused():
    with pytest.raises(UsageError, match="fold_"):
        ibp_(nn.Sequential(parametrizations.weight_norm(nn.Linear(2, 2)), nn.ReLU(), nn.Linear(2, 2)))
    with pytest.raises(UsageError, match="matches nothing"):
        ibp_(nn.Sequential(nn.Linear(2, 2)), where="conv*")
