"""Techniques on a training of a stranger's: alone, and every pair that is said to combine."""

import pytest
import torch
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.experiments.recipes import COMPOSES, RECIPES, recipes
from weightsmith.experiments.suggest import RULES, suggest
from weightsmith.lab.trial import Trial
from weightsmith.techniques import TECHNIQUES


@pytest.fixture(autouse=True)
def _few_rounding_steps(monkeypatch):
    monkeypatch.setattr(RECIPES["flexround"], "iterations", 5)


def data():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(96, 12, generator=generator)
    return x, (x[:, :4].sum(1) > 0).long()


class Net(nn.Module):
    """Tokens of width 12 with attention that OFQ knows, so that every technique has something to do."""

    def __init__(self):
        super().__init__()
        from weightsmith.lab.models.vit import Block

        self.embed = nn.Linear(3, 16)
        self.block = Block(16, 2)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        return self.head(self.norm(self.block(self.embed(x.unflatten(1, (4, 3)))).mean(1)))


def train(trial, make=torch.optim.AdamW, epochs=4):
    torch.manual_seed(trial.seed)
    x, y = data()
    model = trial.model(Net(), example=x[:16])
    optimizer = trial.optimizer(make, model, lr=trial.lr(0.02), weight_decay=0.01)
    for epoch in range(epochs):
        for rows in torch.randperm(len(x)).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
        with torch.no_grad():
            trial.record(epoch=epoch, train_loss=nn.functional.cross_entropy(model(x), y).item())
    model = trial.finish(model, calibration=x[:32]).eval()
    train.model = model
    with torch.no_grad():
        return {"accuracy": (model(x).argmax(1) == y).float().mean().item(), "logits": model(x)}


def without_us(seed, make=torch.optim.AdamW):
    torch.manual_seed(seed)
    x, y = data()
    model = Net()
    optimizer = make(model.parameters(), lr=0.02, weight_decay=0.01)
    for _ in range(4):
        for rows in torch.randperm(len(x)).split(16):
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x[rows]), y[rows]).backward()
            optimizer.step()
    with torch.no_grad():
        return model.eval()(x)


@pytest.mark.parametrize("make", [torch.optim.AdamW, torch.optim.SGD])
def test_the_training_without_techniques_is_the_training_without_us_to_the_last_bit(make):
    assert torch.equal(train(Trial(3), make)["logits"], without_us(3, make))


def optimizer_for(names):
    return torch.optim.SGD if "sgdp" in names else torch.optim.AdamW


@pytest.mark.parametrize("name", RECIPES)
def test_every_technique_changes_the_training_and_leaves_a_model_that_works(name):
    trial = Trial(0, recipes=recipes(name))
    found = train(trial, optimizer_for([name]))
    trial.check()
    assert found["logits"].isfinite().all()
    assert not torch.equal(found["logits"], train(Trial(0), optimizer_for([name]))["logits"])
    if name not in ("ofq", "flexround"):
        plain = Net()
        plain.load_state_dict(train_state(name))  # the keys of the network that the user brought
        x, _ = data()
        torch.testing.assert_close(plain.eval()(x), found["logits"], rtol=1e-4, atol=1e-5)


def train_state(name):
    train(Trial(0, recipes=recipes(name)), optimizer_for([name]))
    return train.model.state_dict()


def pairs():
    """Every second pair unmarked: each technique is in several of them."""
    for index, pair in enumerate(sorted(tuple(sorted(pair)) for pair in COMPOSES)):
        yield pytest.param(pair, id="+".join(pair), marks=[pytest.mark.slow] if index % 2 else [])


@pytest.mark.parametrize("pair", list(pairs()))
def test_pairs_that_are_said_to_combine_do(pair):
    trial = Trial(0, recipes=recipes("+".join(pair)))
    both = train(trial, optimizer_for(pair))
    trial.check()
    assert both["logits"].isfinite().all()
    for name in pair:
        alone = train(Trial(0, recipes=recipes(name)), optimizer_for(pair if name != "sgdp" else [name]))
        assert not torch.equal(both["logits"], alone["logits"]), f"{pair} is {name} alone"
    again = train(Trial(0, recipes=recipes("+".join(reversed(pair)))), optimizer_for(pair))
    assert torch.equal(both["logits"], again["logits"])


def test_a_pair_that_is_not_known_to_combine_is_refused():
    with pytest.raises(UsageError, match="ofq and weight-compander are not known to combine"):
        recipes("ofq+weight-compander")
    with pytest.raises(UsageError, match="technique 'adamq' is not known"):
        recipes("adamq")
    with pytest.raises(UsageError, match="is named twice"):
        recipes("adamp+adamp")


def test_a_recipe_refuses_an_optimizer_that_it_does_not_replace():
    with pytest.raises(UsageError, match=r"adamp takes the place of torch\.optim\.AdamW.*uses SGD: try sgdp"):
        train(Trial(0, recipes=recipes("adamp")), torch.optim.SGD)
    with pytest.raises(UsageError, match="AdamW"):
        train(Trial(0, recipes=recipes("adamp")), torch.optim.Adam)


def test_a_training_that_never_asks_is_an_error():
    trial = Trial(0, recipes=recipes("adamp"))
    trial.model(Net())
    with pytest.raises(UsageError, match=r"adamp needs trial\.optimizer"):
        trial.check()
    swept = Trial(0, values={"lr": "0.1"})
    with pytest.raises(UsageError, match=r"never called trial\.lr"):
        swept.check()
    with pytest.raises(UsageError, match=r"trial\.model\(model\) before"):
        Trial(0, recipes=recipes("adamp")).optimizer(torch.optim.AdamW, Net())


@pytest.mark.parametrize(
    ("name", "message"),
    [("ofq", "example=batch"), ("flexround", "calibration=inputs"), ("mwa", "no loss was recorded")],
)
def test_what_a_technique_needs_is_said(name, message):
    trial = Trial(0, recipes=recipes(name))
    with pytest.raises(UsageError, match=message):
        trial.finish(trial.model(Net()))


def test_values_are_swept_as_numbers_or_multiples():
    trial = Trial(0, values={"lr": "2x", "depth": "3"})
    assert (trial.lr(0.1), trial.value("depth", 2), trial.value("width", 8)) == (0.2, 3.0, 8)
    trial.check()


def test_every_available_technique_has_a_rule_and_says_why_not():
    assert set(RULES) == {card.slug for card in TECHNIQUES if card.available}
    found = {item.slug: item for item in suggest(nn.Sequential(nn.Linear(4, 4)))}
    assert not found["adamp"].applies
    assert "no normalization layer" in found["adamp"].text
    assert not found["bone"].applies
    assert found["flexround"].applies
    assert {item.slug: item.applies for item in suggest(Net())}["ofq"]
    assert not any(item.applies for item in suggest(nn.ReLU()))


def test_adamp_decays_groups_that_say_nothing_as_adamw_does():
    layer = nn.Linear(3, 3)
    groups = [{"params": [layer.weight]}, {"params": [layer.bias], "weight_decay": 0.0}]
    trial = Trial(0, recipes=recipes("adamp"))
    trial.model(layer)
    optimizer = trial.optimizer(torch.optim.AdamW, groups, lr=0.1)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 0.0]


def test_adamp_refuses_the_coupled_decay_of_a_group_of_adam():
    trial = Trial(0, recipes=recipes("adamp"))
    layer = trial.model(nn.Linear(3, 3))
    groups = [{"params": layer.parameters(), "weight_decay": 0.1}]
    with pytest.raises(UsageError, match="adamp decays as AdamW does"):
        trial.optimizer(torch.optim.Adam, groups, lr=0.1)
