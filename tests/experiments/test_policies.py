"""What the two experiments on policy optimization share, and the rivals that come from another package."""

import logging

import pytest
import torch
from torch import nn

from weightsmith.core.errors import MissingExtra
from weightsmith.experiments import aggregation, dynamic_reward_weighting, steer
from weightsmith.experiments.aggregation import Aggregation
from weightsmith.experiments.policies import BEFORE, PolicyRun
from weightsmith.lab.job import Job
from weightsmith.lab.record import Recorder


@pytest.mark.parametrize("module", [steer, dynamic_reward_weighting])
def test_the_arm_before_optimizes_nothing(module, tmp_path):
    config = module.EXPERIMENT.preset("smoke")
    state = config.network(module.TASK).state_dict()
    job = Job(BEFORE.name, 0, Recorder(), tmp_path, torch.device("cpu"), start=state)
    run = PolicyRun(config, module.TASK, job)
    run.optimize(advantages=lambda r: r.scores[:, 0], loss=lambda *_: 1 / 0, measure=lambda _: {}, states={})
    assert all(torch.equal(value, state[name]) for name, value in run.model.state_dict().items())


@pytest.mark.parametrize("module", [steer, dynamic_reward_weighting])
@pytest.mark.parametrize("preset", ["smoke", "laptop", "paper"])
def test_every_preset_judges_claims_behind_one_gate(module, preset):
    experiment = module.EXPERIMENT
    claims = experiment.describe(experiment.preset(preset))["claims"]
    (gate,) = [claim for claim in claims if claim["gate"]]
    assert gate["loser"] == BEFORE.name


def quadratics():
    weight = nn.Parameter(torch.tensor([1.0, 0.0]))
    conflict = torch.tensor([[1.0, 0.2], [-0.8, 1.0]])
    return weight, [(row * weight).sum() for row in conflict], conflict


@pytest.mark.parametrize("rule", ["UPGrad", "MGDA"])
def test_a_rule_combines_gradients_as_its_aggregator_does(rule):
    pytest.importorskip("quadprog")
    torchjd = pytest.importorskip("torchjd.aggregation")
    weight, losses, jacobian = quadratics()
    weighting = Aggregation(rule, 2)
    weighting.loss(losses, [weight]).backward()
    expected = getattr(torchjd, rule)()(jacobian)
    torch.testing.assert_close(weight.grad, expected, rtol=1e-4, atol=1e-5)
    assert ((jacobian @ weight.grad) >= -1e-3).all()  # worsens neither
    assert weighting.weights.sum() == pytest.approx(1)
    other = Aggregation(rule, 2)
    other.load_state_dict(weighting.state_dict())
    assert torch.equal(other.weights, weighting.weights)


def test_without_the_package_its_arms_are_left_out_in_one_line(monkeypatch, caplog):
    monkeypatch.setattr(aggregation, "find_spec", lambda _: None)
    with caplog.at_level(logging.WARNING):
        dynamic_reward_weighting.check(dynamic_reward_weighting.Config())
    assert [record.getMessage() for record in caplog.records] == [
        'left out, because TorchJD or its solver is not installed: UPGrad, MGDA; pip install "weightsmith[rl]"'
    ]
    described = dynamic_reward_weighting.EXPERIMENT.describe(dynamic_reward_weighting.Config())
    assert not {"upgrad", "mgda"} & {arm["name"] for arm in described["arms"]}


def test_a_rule_without_its_package_says_what_to_install(monkeypatch):
    def gone(_):
        raise ModuleNotFoundError("No module", name="torchjd")

    monkeypatch.setattr("importlib.import_module", gone)
    with pytest.raises(MissingExtra, match=r"weightsmith\[rl\]"):
        Aggregation("MGDA", 2)
