import pytest
import torch
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.prune import shrink_

pytest.importorskip("torch_pruning")


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.c1, self.b1 = nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8)
        self.c2, self.c3, self.fc = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 6, 1), nn.Linear(6, 4)

    def forward(self, x):
        h = self.b1(self.c1(x)).relu()
        h = h + self.c2(h).relu()
        return self.fc(self.c3(h).relu().mean((2, 3)))


def kill(layer, *rows):
    with torch.no_grad():
        for row in rows:
            layer.weight[row] = 0
            layer.bias[row] = 0


X = torch.randn(2, 3, 5, 5, generator=torch.Generator().manual_seed(0))


class TwoOutputs(nn.Module):
    def __init__(self, named):
        super().__init__()
        self.body, self.head, self.named = nn.Linear(4, 8), nn.Linear(8, 3), named

    def forward(self, x):
        h = self.body(x)
        return {"logits": self.head(h), "states": (h,)} if self.named else (self.head(h), h)


@pytest.mark.parametrize("named", [True, False])
def test_a_layer_whose_channels_come_out_beside_the_logits_stays(named):
    model = TwoOutputs(named)
    kill(model.body, 0, 1)
    found = shrink_(model, torch.randn(2, 4))
    assert found.removed == {}
    assert "they are outputs of the model" in found.left["body"]


def test_tied_weights_stay_tied():
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    model[2].weight = model[0].weight
    kill(model[0], 0, 1)
    kill(model[2], 0, 1)
    found = shrink_(model, torch.randn(3, 8))
    assert model[0].weight is model[2].weight
    assert set(found.left) == {"0", "2"}
    assert "tied would come apart" in found.left["0"]


def test_dead_channels_go_and_outputs_stay():
    model = Residual().train()
    kill(model.c3, 1, 2)
    kill(model.c1, 3)
    kill(model.c2, 3)
    kill(model.fc, 0)
    before = model.eval()(X)
    model.train()
    done = shrink_(model, X)
    assert done.model is model
    assert model.training
    assert done.removed == {"c1": 1, "c3": 2}
    assert "outputs of the model" in done.left["fc"]
    assert done.parameters_after < done.parameters_before
    assert model.c3.out_channels == model.fc.in_features == 4
    torch.testing.assert_close(model.eval()(X), before)


def test_channels_that_a_residual_branch_still_fills_stay():
    model = Residual().eval()
    kill(model.c1, 3)
    before = model(X)
    done = shrink_(model, X)
    assert done.removed == {}
    assert "outputs would change" in done.left["c1"]
    assert torch.equal(model(X), before)


def test_a_normalization_that_shifts_a_dead_channel_keeps_it():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)).eval()
    kill(model[0], 1)
    model[1].bias.data[1] = 0.7
    assert "outputs would change" in shrink_(model, X).left["0"]


def test_whole_layers_and_groups_stay():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Conv2d(4, 4, 3, groups=4), nn.Conv2d(4, 2, 1)).eval()
    kill(model[0], 0, 1, 2, 3)
    kill(model[1], 2)
    left = shrink_(model, X).left
    assert "nothing of the layer" in left["0"]
    assert "has groups" in left["1"]


def test_bad_use():
    with pytest.raises(UsageError, match="example must be"):
        shrink_(Residual(), "x")
    with pytest.raises(UsageError, match="tolerance must be"):
        shrink_(Residual(), X, tolerance=2)


class Heads(nn.Module):
    """Holds a size of its own, as the attention of transformers does."""

    def __init__(self):
        super().__init__()
        self.q, self.out = nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.out(self.q(x).reshape(len(x), 2, 4).flatten(1))


def test_layers_whose_sizes_the_model_holds_itself_stay():
    model = Heads()
    kill(model.q, 3)
    before, x = model.q.weight.detach().clone(), torch.randn(2, 8)
    found = shrink_(model, x)
    assert "would not run" in found.left["q"] or "cannot follow" in found.left["q"]
    assert torch.equal(model.q.weight, before)
    grouped = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=4))
    kill(grouped[0], 2)
    assert "0" in shrink_(grouped, X).left
    assert grouped(X).shape == (2, 8, 1, 1)
