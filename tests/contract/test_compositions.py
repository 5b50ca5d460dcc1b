"""The page says of every pair of verbs what comes of it, and that is what comes of it."""

import pytest
import torch
from torch import nn

pytest.importorskip("peft")

import verbs
from compositions import FOREIGN, REFUSED, Broken, outcome, read
from verbs import VERBS, build, outputs

from weightsmith.core.errors import UsageError

PAGE = read()


def _pairs():
    """All that are refused; of the others every second one, so that each verb comes first, and second, with half."""
    for i, first in enumerate(VERBS):
        for j, then in enumerate(VERBS):
            slow = (i + j) % 2 == 1 and PAGE[first, then] != REFUSED
            yield pytest.param(first, then, marks=[pytest.mark.slow] if slow else [])


@pytest.mark.parametrize(("first", "then"), list(_pairs()))
def test_a_pair_does_what_the_page_says(first, then):
    assert outcome(first, then) == PAGE[first, then]


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.second, self.head = nn.Linear(8, 8), nn.Linear(8, 4)

    def forward(self, x):
        return self.head(torch.tanh(self.second(self.norm(self.first(x)).relu().mean((2, 3)))))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.first, self.second = nn.Embedding(9, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 9, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(self.embedding(x)))))).mean(1)


OTHERS = {
    Convolutional: torch.randn(12, 3, 6, 6, generator=torch.Generator().manual_seed(1)),
    Tied: torch.randint(9, (12, 5), generator=torch.Generator().manual_seed(1)),
}
# PEFT does not know a convolution that carries an adapter of ours
DIFFERENT = {(Convolutional, "apply_bone_", "PEFT LoRA"): FOREIGN}


@pytest.mark.slow
@pytest.mark.parametrize("first", VERBS)
@pytest.mark.parametrize("then", VERBS)
@pytest.mark.parametrize("network", OTHERS)
def test_other_networks_do_what_the_page_says(network, first, then, monkeypatch):
    monkeypatch.setattr(verbs, "Net", network)
    monkeypatch.setattr(verbs, "data", lambda: OTHERS[network])
    assert outcome(first, then) == DIFFERENT.get((network, first, then), PAGE[first, then])


REFUSED_PAIRS = [pair for pair, cell in PAGE.items() if cell == REFUSED]


@pytest.mark.filterwarnings("ignore::weightsmith.core.errors.WeightsmithWarning")
@pytest.mark.parametrize(("first", "then"), REFUSED_PAIRS)
def test_what_is_refused_goes_through_once_the_first_is_finished(first, then):
    verb = VERBS[then]
    model = VERBS[first].finish(VERBS[first].apply(build()))
    if (first, then) in STILL_REFUSED:
        with pytest.raises(UsageError, match=STILL_REFUSED[first, then]):
            verb.apply(model)
        return
    before = outputs(model)
    assert torch.allclose(outputs(verb.apply(model)), before, atol=verb.moves)


# what is finished leaves input quantizers, which stay
STILL_REFUSED = {("prepare_ofq_", "quantize_activations_"): "is quantized by prepare_ofq_ already"}


def test_a_verb_that_loses_something_is_found():
    lossy = VERBS["fold_"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VERBS, "fold_", type(lossy)(lambda model: model.requires_grad_(False) and _zero(model)))
        with pytest.raises(Broken, match="outputs moved"):
            outcome("compand_", "fold_")


def _zero(model):
    for parameter in model.parameters():
        parameter.data.zero_()
    return model
