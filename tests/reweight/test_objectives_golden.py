"""Dynamic reward weighting against values from the authors' code."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from weightsmith.reweight import (
    Conciseness,
    GradientWeights,
    HypervolumeWeights,
    boxed_accuracy,
    clarity,
    group_advantages,
    hypervolume,
    influence_of,
    objective_advantages,
    objective_gradients,
    objective_influence,
)

GOLDEN = Path(__file__).parents[1] / "golden"
G = load_file(GOLDEN / "dynamic-reward-weighting.safetensors")
TEXT = json.loads((GOLDEN / "dynamic-reward-weighting_text.json").read_text())
METHODS = {"grpo": "grpo", "grpo_no_std": "dr_grpo", "rloo": "rloo", "reinforce_pp": "reinforce_pp"}


@pytest.mark.parametrize("case", range(5))
def test_hypervolumes_match(case):
    found = hypervolume(G[f"hv{case}.points"], G[f"hv{case}.reference"], G[f"hv{case}.maximize"].bool().tolist())
    assert found == pytest.approx(G[f"hv{case}.hypervolume"].item(), rel=1e-9)


def test_the_factor_follows_the_authors_trajectory():
    maximize = G["traj.maximize"].bool().tolist()
    rule = HypervolumeWeights([1 / 3] * 3, maximize, reference=G["traj.reference"].tolist())
    for step, point in enumerate(G["traj.points"].tolist()):
        assert rule.meta == pytest.approx(G["traj.meta_reward_used_at_step"][step].item(), rel=1e-8)
        assert rule.update(point) == pytest.approx(G["traj.meta_reward_after_step"][step].item(), rel=1e-8)
        assert len(rule.front) == G["traj.buffer_size_after_step"][step]


@pytest.mark.parametrize("name", METHODS)
def test_a_common_factor_of_all_rewards_cancels_where_it_does_in_the_authors_code(name):
    for index, meta in enumerate(G["cancel.meta"]):
        found = objective_advantages(
            G["cancel.scores"], meta * G["cancel.weights"], G["cancel.group"], method=METHODS[name],
            mask=G["cancel.mask"],
        )  # fmt: skip
        torch.testing.assert_close(found, G[f"cancel.adv.{name}"][index] * G["cancel.mask"], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", ["inf", "inf_acc"])
def test_gradient_weights_follow_the_reference(case):
    every = int(G[f"{case}.accumulation_steps"])
    w0 = G[f"{case}.w0"]
    rule = GradientWeights(len(w0), weights=w0, mu=G[f"{case}.mu"].item(), accumulation_steps=every)
    influences = []
    for step, grads in enumerate(G[f"{case}.grads"].double()):
        influences.append(influence_of([[g] for g in grads], max_norm=None))
        found = rule.update(influences[-1], G[f"{case}.lr"][step].item())
        torch.testing.assert_close(found, G[f"{case}.weights_after_step"][step], rtol=1e-6, atol=0)
    summed = torch.stack(influences).view(-1, every, len(w0)).mean(1)
    torch.testing.assert_close(summed, G[f"{case}.influence"], rtol=1e-6, atol=1e-12)


class Policy(nn.Sequential):
    def __init__(self, flat):
        super().__init__(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 6))
        nn.utils.vector_to_parameters(flat, self.double().parameters())

    def logp(self, inputs, actions):
        return self(inputs).log_softmax(-1).gather(-1, actions[..., None])[..., 0]


def logp_from(policy, inputs, actions, values):
    names = [name for name, _ in policy.named_parameters()]
    logits = torch.func.functional_call(policy, dict(zip(names, values, strict=True)), (inputs,))
    return logits.log_softmax(-1).gather(-1, actions[..., None])[..., 0]


@pytest.mark.parametrize("name", ["grpo", "rloo", "reinforce_pp"])
def test_three_whole_steps_of_gradient_weighting_match(name):
    case = {key.removeprefix(f"e2e_{name}."): value for key, value in G.items() if key.startswith(f"e2e_{name}.")}
    policy = Policy(case["init.flat"].clone())
    params = list(policy.parameters())
    lr, norm = case["lr"].item(), case["max_grad_norm"].item()
    rule = GradientWeights(3, weights=case["w0"], mu=case["mu"].item())
    optimizer = torch.optim.SGD(params, lr=lr)
    close = {"rtol": 0, "atol": 1e-7}
    for step in range(3):
        mask, scores, group = case["mask"][step], case["scores"][step], case["group"]
        each = torch.stack([group_advantages(column, group, method=name, mask=mask) for column in scores.T])
        logp = policy.logp(case["inputs"][step], case["actions"][step])
        gradients = objective_gradients(logp, each, mask, params)
        norms = torch.stack([torch.stack([part.norm() for part in parts]).norm() for parts in gradients])
        torch.testing.assert_close(norms, case["grad_norm_before_clip"][step], **close)
        logp = policy.logp(case["inputs"][step], case["actions"][step])
        found = objective_influence(logp, each, mask, params, max_norm=norm)
        torch.testing.assert_close(found, case["influence"][step], **close)
        logp_of = partial(logp_from, policy, case["inputs"][step], case["actions"][step])
        fast = objective_influence(logp_of, each, mask, params, method="sequence", max_norm=norm)
        torch.testing.assert_close(fast, case["influence"][step], **close)
        weights = rule.update(found, lr)
        torch.testing.assert_close(weights, case["weights"][step], **close)
        advantages = objective_advantages(scores, weights, group, method=name, mask=mask)
        logp = policy.logp(case["inputs"][step], case["actions"][step])
        loss = -(mask * advantages * (logp - logp.detach()).exp()).sum() / mask.sum()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(params, norm)
        optimizer.step()
        torch.testing.assert_close(nn.utils.parameters_to_vector(params).detach(), case["params_after"][step], **close)


@pytest.mark.parametrize("row", TEXT["clarity"], ids=lambda row: row["text"][:20])
def test_clarity_matches(row):
    assert clarity(row["text"]) == row["score"]


@pytest.mark.parametrize("row", TEXT["accuracy"], ids=lambda row: row["solution"][:20])
def test_accuracy_matches(row):
    assert boxed_accuracy(row["solution"], row["answer"]) == row["score"]


@pytest.mark.parametrize("row", TEXT["running_mean_length"])
def test_the_running_mean_length_matches(row):
    rule = Conciseness()
    for lengths in row["lengths_so_far"]:
        rule(lengths)
    assert rule.mean == row["mean"]
