import pytest
import torch
from torch import nn

from weightsmith.continual import EWC
from weightsmith.core.errors import UsageError


def consolidated(model):
    ewc = EWC(model, strength=2.0)
    ewc.consolidate(model(torch.randn(4)).square().sum() for _ in range(3))
    return ewc


def test_the_penalty_is_equation_3_and_resumes():
    model = nn.Linear(4, 2)
    ewc = consolidated(model)
    assert ewc.penalty().item() == 0
    state = ewc.state_dict()
    with torch.no_grad():
        model.weight += 0.5
    expected = state["fisher"]["weight"].sum() * 0.25
    torch.testing.assert_close(ewc.penalty(), expected)
    again = EWC(model, strength=2.0)
    again.load_state_dict(state)
    torch.testing.assert_close(again.penalty(), expected)


def test_a_state_of_another_model_is_refused_and_changes_nothing():
    ewc = consolidated(nn.Linear(4, 2))
    before = ewc.penalty()
    for other in (nn.Linear(5, 2), nn.Sequential(nn.Linear(4, 2))):
        with pytest.raises(UsageError, match="the state is of other parameters"):
            ewc.load_state_dict(consolidated_state(other))
    assert torch.equal(ewc.penalty(), before)


def consolidated_state(model):
    ewc = EWC(model, strength=2.0)
    ewc.consolidate([sum(p.square().sum() for p in model.parameters())])
    return ewc.state_dict()
