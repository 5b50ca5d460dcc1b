"""STEER, its rivals and the fused head against values from the authors' code."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from weightsmith.reweight import (
    ClipCov,
    ClipHigher,
    EntropyAdvantage,
    KLCov,
    Steer,
    Tokens,
    WReinforce,
    entropy_change,
    fused_linear_logprob,
    group_advantages,
    policy_loss,
)

G = load_file(Path(__file__).parents[1] / "golden/steer.safetensors")
CLOSE = {"rtol": 1e-5, "atol": 1e-6}
RULES = {
    "vanilla": None,
    "exp0.8": Steer(lambda_min=0.8),
    "exp0.7": Steer(lambda_min=0.7),
    "lin0.8_1.2": Steer(mapping="linear", lambda_min=0.8, lambda_max=1.2),
}


def loss_of(case, rule, **options):
    logits = G[f"{case}.logits_new"].clone().requires_grad_()
    log_p = logits.log_softmax(-1)
    logp = log_p.gather(-1, G[f"{case}.actions"][..., None])[..., 0]
    old_log_p = G[f"{case}.logits_old"].log_softmax(-1)
    found = policy_loss(
        logp, G[f"{case}.advantages"], G[f"{case}.mask"] if f"{case}.mask" in G else torch.ones_like(logp),
        old_logp=old_log_p.gather(-1, G[f"{case}.actions"][..., None])[..., 0], rule=rule,
        entropy=-(log_p.exp() * log_p).sum(-1), old_entropy=-(old_log_p.exp() * old_log_p).sum(-1),
        clip=(0.2, 0.28), dual_clip=10.0, **options,
    )  # fmt: skip
    found.loss.backward()
    return found, logits.grad


@pytest.mark.parametrize(
    ("case", "rule"), [(case, rule) for case in "ae" for rule in RULES if f"{case}.{rule}.loss" in G]
)
def test_loss_gradient_weights_and_clipped_shares_are_the_authors(case, rule):
    name = f"{case}.{rule}"
    found, gradient = loss_of(case, RULES[rule])
    torch.testing.assert_close(found.loss[None].detach(), G[f"{name}.loss"], **CLOSE)
    torch.testing.assert_close(gradient, G[f"{name}.grad_logits_new"], rtol=1e-5, atol=1e-7)
    if rule != "vanilla":
        torch.testing.assert_close(found.weights, G[f"{name}.weights"], **CLOSE)
    for kind in ("high", "low", "dual"):
        torch.testing.assert_close(found.metrics[f"clip/{kind}"][None], G[f"{name}.clipfrac_{kind}"], **CLOSE)


@pytest.mark.parametrize("how", [name.removeprefix("a.agg.") for name in G if name.startswith("a.agg.")])
def test_every_aggregation_is_the_authors(how):
    found, _ = loss_of("a", RULES["exp0.8"], aggregate=how)
    torch.testing.assert_close(found.loss[None].detach(), G[f"a.agg.{how}"], **CLOSE)


@pytest.mark.parametrize("estimator", ["released", "theorem", "exact"])
@pytest.mark.parametrize("case", ["a", "e"])
def test_predicted_entropy_changes_match_in_double_precision(case, estimator):
    log_p, old = (G[f"{case}.logits_{which}"].double().log_softmax(-1) for which in ("new", "old"))
    index = G[f"{case}.actions"][..., None]
    entropy = -((old if estimator == "released" else log_p).exp() * (old if estimator == "released" else log_p)).sum(-1)
    moment = (log_p.exp() ** 2 * (log_p + entropy[..., None])).sum(-1)
    found = entropy_change(
        log_p.gather(-1, index)[..., 0], entropy, G[f"{case}.advantages"].double(),
        old_logp=old.gather(-1, index)[..., 0], second_moment=moment, estimator=estimator, clip=(0.2, 0.28),
    )  # fmt: skip
    chosen = G[f"{case}.mask"] > 0 if f"{case}.mask" in G else torch.ones_like(found, dtype=torch.bool)
    expected = G[f"{case}.omega.{estimator}"]
    torch.testing.assert_close(found[chosen], expected[chosen], rtol=1e-5, atol=1e-7)


def test_the_exact_estimator_is_the_true_change_of_entropy():
    log_p = G["d.logits"].log_softmax(-1)
    logp = log_p.gather(-1, G["d.actions"][:, None])[:, 0]
    moment = (log_p.exp() ** 2 * (log_p + G["d.entropy"][:, None])).sum(-1)
    for estimator in ("released", "theorem", "exact"):
        found = entropy_change(logp, G["d.entropy"], G["d.advantages"], second_moment=moment, estimator=estimator)
        torch.testing.assert_close(found, G[f"d.{estimator}"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(found, G["d.dH_true_full"], rtol=1e-4, atol=1e-9)


@pytest.mark.parametrize(
    ("name", "method"),
    [("grpo", "grpo"), ("grpo_no_std", "dr_grpo"), ("rloo", "rloo"), ("reinforce_pp", "reinforce_pp"), ("opo", "opo")],
)
def test_advantages_are_those_of_the_authors_framework(name, method):
    found = group_advantages(G["b.reward"], G["b.group"], method=method, mask=G["b.mask"])
    torch.testing.assert_close(found, G[f"b.adv.{name}"] * G["b.mask"], **CLOSE)


def tokens(advantages, **options):
    return Tokens.of(G["b.logp_new"], advantages, G["b.mask"], old_logp=G["b.logp_old"], **options)


def test_entropy_advantage_and_w_reinforce_match():
    mask = G["b.mask"]
    found = EntropyAdvantage(0.4, 2.0)(tokens(G["b.adv.grpo"], entropy=G["b.entropy"])).advantages
    expected = G["b.adv.entropy_adv_0.4_2"].float()
    torch.testing.assert_close(found * mask, expected * mask, **CLOSE)
    found = WReinforce(0.1)(tokens(G["b.adv.grpo"], rewards=G["b.reward"])).advantages
    torch.testing.assert_close(found * mask, G["b.adv.w_reinforce_0.1"] * mask, **CLOSE)


@pytest.mark.parametrize(
    ("name", "rule", "clip", "dual"),
    [
        ("clip", None, (0.2, 0.2), 10.0),
        ("clip_higher", ClipHigher(), (0.2, 0.2), 10.0),
        ("clip_cov", ClipCov(0.5, low=0.3), (0.2, 0.28), None),
        ("kl_cov", KLCov(0.05, beta=1.0), (0.2, 0.2), None),
    ],
)
def test_the_rivals_losses_and_gradients_match(name, rule, clip, dual):
    logp = G["b.logp_new"].clone().requires_grad_()
    found = policy_loss(
        logp, G["b.adv.grpo"], G["b.mask"], old_logp=G["b.logp_old"], rule=rule, entropy=G["b.entropy"], clip=clip,
        dual_clip=dual,
    )  # fmt: skip
    found.loss.backward()
    torch.testing.assert_close(found.loss[None].detach(), G[f"b.{name}.loss"], **CLOSE)
    torch.testing.assert_close(logp.grad, G[f"b.{name}.grad_logp"], rtol=1e-5, atol=1e-7)
    if name == "clip_cov":
        assert found.metrics["clip_cov/dropped"] == G["b.clip_cov.n_detached"]


@pytest.mark.parametrize("chunk_rows", [1, 5, 256])
def test_the_fused_head_gives_the_reference_and_its_gradients(chunk_rows):
    hidden, weight = (G[f"c.{name}"].clone().requires_grad_() for name in ("hidden", "weight"))
    logp, entropy, second = fused_linear_logprob(
        hidden, weight, G["c.targets"], temperature=G["c.temperature"].item(), chunk_rows=chunk_rows,
        return_second_moment=True, entropy_grad=True,
    )  # fmt: skip
    (G["c.a"] * logp + G["c.b"] * entropy).sum().backward()
    for name, found in (("logp", logp), ("entropy", entropy), ("second_moment", second)):
        torch.testing.assert_close(found.detach(), G[f"c.{name}"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(hidden.grad, G["c.grad_hidden"], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(weight.grad, G["c.grad_weight"], rtol=1e-10, atol=1e-12)
