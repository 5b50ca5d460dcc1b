"""Every row of STEER's pitfall table, the traps of its rivals, and properties of weights and losses."""

import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.reweight import (
    ClipCov,
    ClipHigher,
    EntropyAdvantage,
    EntropyBonus,
    ForkTokens,
    KLCov,
    Steer,
    Tokens,
    WReinforce,
    entropy_change,
    group_advantages,
    informative_groups,
    objective_advantages,
    policy_loss,
    token_weights,
)

VOCABULARY = 12


def batch(b=4, t=6, seed=0, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    new, old = (torch.randn(b, t, VOCABULARY, generator=g, dtype=torch.float64) for _ in range(2))
    log_p, old_log_p = new.log_softmax(-1), (new + 0.1 * old).log_softmax(-1)
    actions = torch.randint(VOCABULARY, (b, t, 1), generator=g)
    mask = torch.rand(b, t, generator=g) < 0.8
    mask[:, 0] = True
    entropy = -(log_p.exp() * log_p).sum(-1)
    return {
        "logp": log_p.gather(-1, actions)[..., 0].to(dtype),
        "old_logp": old_log_p.gather(-1, actions)[..., 0].to(dtype),
        "advantages": torch.randn(b, generator=g).to(dtype),
        "mask": mask,
        "entropy": entropy.to(dtype),
        "second_moment": (log_p.exp() ** 2 * (log_p + entropy[..., None])).sum(-1).to(dtype),
        "rewards": torch.randint(2, (b,), generator=g).to(dtype),
    }


def tokens(**changes):
    return Tokens.of(**(batch() | changes))


def weights(rule=None, **changes):
    return (rule or Steer())(tokens(**changes)).weights


RULES = [
    Steer(), Steer("theorem"), Steer("exact"), Steer(mapping="linear"), Steer(mode="asymmetric"), ClipHigher(),
    EntropyBonus(), ForkTokens(), ClipCov(0.1, low=0.0), KLCov(0.1), WReinforce(), EntropyAdvantage(),
]  # fmt: skip


def test_the_largest_change_of_the_batch_sets_the_scale():
    values = batch(8)
    whole = Steer()(Tokens.of(**values)).weights
    halves = [Steer()(Tokens.of(**{name: value[part] for name, value in values.items()})).weights
              for part in (slice(4), slice(4, 8))]  # fmt: skip
    assert not torch.allclose(torch.cat(halves), whole)
    assert (whole >= torch.cat(halves) - 1e-6).all()


def test_a_quantile_keeps_one_rare_token_from_switching_the_others_off():
    omega = torch.full((10, 10), 0.1)
    omega[0, 0] = 1000.0
    mask = torch.ones_like(omega)
    off, on = token_weights(omega, mask), token_weights(omega, mask, scale_quantile=0.98)
    assert off[1:].min() > 0.9999
    assert on[1:].max() < 0.71
    assert on[0, 0] == pytest.approx(0.7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype):
    values = batch()
    values["logp"][0, 0] = -0.001  # 1 - pi would be 0 in bfloat16
    values = {name: value.to(dtype) if value.is_floating_point() else value for name, value in values.items()}
    found = Tokens.of(**values)
    assert found.logp.dtype == torch.float32
    omega = entropy_change(values["logp"], values["entropy"], torch.ones_like(values["logp"]))
    assert omega.dtype == torch.float32
    assert omega[0, 0] != 0
    assert policy_loss(**values, rule=Steer()).loss.dtype == torch.float32


def test_double_precision_stays_double():
    found = policy_loss(**batch(dtype=torch.float64), rule=Steer("exact"))
    assert found.loss.dtype == found.weights.dtype == torch.float64


@pytest.mark.parametrize(
    ("rule", "expected"), [(Steer(), 1.0), (Steer(mapping="linear", lambda_min=0.8, lambda_max=1.0), 0.9)]
)
def test_without_advantages_weights_are_one_or_the_midpoint(rule, expected):
    found = weights(rule, advantages=torch.zeros(4))
    torch.testing.assert_close(found[batch()["mask"]], torch.full_like(found[batch()["mask"]], expected))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: type(rule).__name__)
@pytest.mark.parametrize("shape", ["masked", "no sequences", "no positions"])
def test_no_tokens_give_a_loss_of_zero(rule, shape):
    values = batch()
    if shape == "masked":
        values["mask"] = torch.zeros(4, 6)
    elif shape == "no sequences":
        values = {name: value[:0] for name, value in values.items()}
    else:
        values = {name: value[:, :0] if value.dim() == 2 else value for name, value in values.items()}
    for name in ("logp", "entropy"):
        values[name].requires_grad_()
    found = policy_loss(**values, rule=rule)
    found.loss.backward()
    assert found.loss == 0
    assert (values["logp"].grad == 0).all()


def test_a_change_that_is_not_finite_counts_as_zero_and_warns_once():
    rule, entropy = Steer(), batch()["entropy"].clone()
    entropy[0, 0] = math.nan
    with pytest.warns(WeightsmithWarning, match="1 tokens is not finite"):
        found = weights(rule, entropy=entropy)
    assert found[0, 0] == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        weights(rule, entropy=entropy)


@pytest.mark.filterwarnings("ignore:the predicted")
def test_a_log_probability_that_is_nan_is_not_hidden():
    values = batch()
    values["logp"][0, 0] = math.nan
    assert policy_loss(**values, rule=Steer()).loss.isnan()


def test_what_is_masked_may_be_anything():
    values, broken = batch(), batch()
    hidden = ~values["mask"]
    for name in ("logp", "old_logp", "entropy", "second_moment"):
        broken[name] = broken[name].masked_fill(hidden, math.nan if name != "old_logp" else -math.inf)
    for rule in RULES:
        one, two = (type(rule).__new__(type(rule)) for _ in range(2))
        for made in (one, two):
            made.__dict__.update(rule.__dict__)
        if isinstance(rule, ClipCov):
            one, two = ClipCov(0.1, low=0.0), ClipCov(0.1, low=0.0)
        logp, entropy = (broken[name].clone().requires_grad_() for name in ("logp", "entropy"))
        found = policy_loss(**(broken | {"logp": logp, "entropy": entropy}), rule=two).loss
        torch.testing.assert_close(found.detach(), policy_loss(**values, rule=one).loss)
        found.backward()
        assert logp.grad.isfinite().all()


@pytest.mark.parametrize("old", [-math.inf, -1e4])
def test_an_impossible_old_token_is_clamped(old):
    old_logp = batch()["old_logp"].clone()
    old_logp[0, 0] = old
    assert weights(old_logp=old_logp).isfinite().all()


@pytest.mark.parametrize("shape", [(4,), (4, 1), (4, 6)])
def test_advantages_may_have_three_shapes(shape):
    given = batch()["advantages"]
    spread = given if len(shape) == 1 else given[:, None].expand(shape)
    assert torch.equal(weights(advantages=spread), weights())


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda: Steer(lambda_min=0.0), "lambda_min"),
        (lambda: Steer(lambda_min=1.1), "lambda_min"),
        (lambda: Steer(lambda_min=math.nan), "lambda_min"),
        (lambda: Steer(lambda_min=0.9, lambda_max=0.8), "lambda_max"),
        (lambda: Steer(floor=0.0), "floor"),
        (lambda: Steer(scale_quantile=0.0), "scale_quantile"),
        (lambda: Steer("relaesed"), "did you mean 'released'"),
        (lambda: Steer(mapping="log"), "mapping"),
        (lambda: Steer(mode="odd"), "mode"),
        (lambda: Steer(entropy_source="new"), "entropy_source"),
        (lambda: ClipHigher(-0.1), "clip"),
        (lambda: EntropyBonus(-1), "coef"),
        (lambda: EntropyBonus(target=-1), "target"),
        (lambda: ForkTokens(0), "fraction"),
        (lambda: ClipCov(0), "ratio"),
        (lambda: ClipCov(low=5, high=1), "high"),
        (lambda: KLCov(beta=-1), "beta"),
        (lambda: WReinforce(-1), "positive"),
        (lambda: EntropyAdvantage(kappa=1), "kappa"),
        (lambda: policy_loss(**batch(), dual_clip=1.0), "dual_clip"),
        (lambda: policy_loss(**batch(), clip=(-0.2, 0.2)), "clip"),
        (lambda: policy_loss(**batch(), aggregate="sum"), "aggregate"),
        (lambda: policy_loss(**batch(), normalizer=0), "normalizer"),
        (lambda: tokens(advantages=torch.ones(3)), "advantages must be"),
        (lambda: tokens(mask=torch.ones(4, 5)), "mask must have the shape"),
        (lambda: tokens(rewards=torch.ones(3)), "rewards must be"),
        (lambda: weights(entropy=None), "Steer needs entropy"),
        (lambda: weights(Steer("exact"), second_moment=None), "needs second_moment"),
        (lambda: WReinforce()(tokens(rewards=None)), "WReinforce needs rewards"),
        (lambda: group_advantages(torch.ones(2), torch.zeros(2), method="ppo"), "method"),
        (lambda: group_advantages(torch.ones(2), torch.zeros(3)), "rewards and group"),
        (lambda: group_advantages(torch.ones(2), torch.zeros(2), method="opo"), "needs mask"),
        (lambda: objective_advantages(torch.ones(2, 2), torch.ones(3), torch.zeros(2)), "scores must be"),
    ],
)
def test_bad_input_is_an_error_that_names_it(make, named):
    with pytest.raises(UsageError, match=named):
        make()


def test_nothing_of_this_carries_a_gradient():
    values = batch()
    for name in ("logp", "entropy", "second_moment"):
        values[name].requires_grad_()
    found = policy_loss(**values, rule=Steer("exact"))
    found.loss.backward()
    assert not found.weights.requires_grad
    assert values["entropy"].grad is None


def test_scaling_the_advantage_is_scaling_the_loss():
    values = batch()
    found = policy_loss(**values, rule=Steer())
    scaled = values["advantages"][:, None] * found.weights
    torch.testing.assert_close(policy_loss(**(values | {"advantages": scaled})).loss, found.loss)


def test_one_ratio_per_sequence_is_allowed():
    values = batch()
    drift = (values["logp"] - values["old_logp"]).mean(1, keepdim=True)
    found = policy_loss(**(values | {"old_logp": values["logp"] - drift}), rule=Steer())
    assert found.loss.isfinite()


def test_old_entropy_is_used_where_it_is_given():
    values = batch()
    other = values["entropy"] * 0.5
    assert torch.equal(Steer()(Tokens.of(**values, old_entropy=other)).weights, weights(entropy=other))
    current = Steer(entropy_source="current")(Tokens.of(**values, old_entropy=other)).weights
    assert torch.equal(current, weights())


def test_asymmetric_weights_damp_falling_entropy_alone():
    omega = torch.tensor([[-1.0, -0.1, 0.0, 0.1, 1.0]])
    found = token_weights(omega, torch.ones(1, 5), mode="asymmetric", lambda_min=0.5, lambda_max=1.2)[0]
    assert found[0] == 0.5
    assert (found.diff() >= 0).all()
    assert found[2] == 1
    assert found[-1] == pytest.approx(1.2)


def test_renormalized_weights_have_mean_one():
    found = weights(Steer(renormalize=True))
    assert found[batch()["mask"]].mean() == pytest.approx(1, abs=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.sampled_from(["exp", "linear"]), st.sampled_from(["symmetric", "asymmetric"]),
    st.floats(0.05, 1.0), st.floats(0, 1.0), st.sampled_from([None, 0.5, 0.99]), st.floats(1e-6, 1e4),
)  # fmt: skip
def test_weights_are_in_range_and_follow_the_order_of_the_changes(seed, mapping, mode, low, more, quantile, size):
    g = torch.Generator().manual_seed(seed)
    omega, mask = size * torch.randn(3, 7, generator=g, dtype=torch.float64), torch.rand(3, 7, generator=g) < 0.7
    found = token_weights(
        omega, mask, mapping=mapping, mode=mode, lambda_min=low, lambda_max=low + more, scale_quantile=quantile
    )
    top = 1.0 if (mapping, mode) == ("exp", "symmetric") else low + more
    assert (found[~mask] == 0).all()
    if mask.any():
        assert low - 1e-12 <= found[mask].min() <= found[mask].max() <= top + 1e-12
        key = -omega[mask].abs() if mode == "symmetric" else omega[mask]
        assert (found[mask][key.argsort()].diff() >= -1e-12).all()


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10**6), st.sampled_from(["token-mean", "seq-mean-token-mean", "seq-mean-token-sum"]))
def test_a_loss_over_micro_batches_is_the_loss_of_the_batch(seed, how):
    values = batch(6, seed=seed)
    whole = policy_loss(**values, aggregate=how).loss
    total = int(values["mask"].sum())
    parts = [{name: value[part] for name, value in values.items()} for part in (slice(2), slice(2, 6))]
    if how == "token-mean":
        found = sum(policy_loss(**part, normalizer=total).loss for part in parts)
    else:
        found = sum(len(part["logp"]) / 6 * policy_loss(**part, aggregate=how).loss for part in parts)
    torch.testing.assert_close(found, whole, rtol=1e-4, atol=1e-6)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 10**6), st.floats(0.1, 100), st.sampled_from(["grpo", "dr_grpo", "rloo", "reinforce_pp", "opo"]))
def test_advantages_ignore_a_shift_and_follow_a_scale(seed, scale, method):
    g = torch.Generator().manual_seed(seed)
    rewards = torch.randn(12, generator=g, dtype=torch.float64)
    group, mask = torch.arange(12) // 4, torch.rand(12, 5, generator=g) < 0.8
    mask[:, 0] = True
    found = group_advantages(rewards, group, method=method, mask=mask, eps=0)
    moved = group_advantages(scale * rewards + 3, group, method=method, mask=mask, eps=0)
    factor = 1 if method in ("grpo", "reinforce_pp") else scale
    torch.testing.assert_close(moved, factor * found, rtol=1e-5, atol=1e-6)
    shuffled = torch.randperm(12, generator=g)
    again = group_advantages(rewards[shuffled], group[shuffled], method=method, mask=mask[shuffled], eps=0)
    torch.testing.assert_close(again, found[shuffled], rtol=1e-9, atol=1e-12)


def test_rewards_that_do_not_apply_have_no_advantage_and_move_no_mean():
    rewards, group = torch.tensor([1.0, math.nan, 3.0, 2.0]), torch.zeros(4, dtype=torch.long)
    for method in ("grpo", "dr_grpo", "rloo"):
        found = group_advantages(rewards, group, method=method)
        kept = group_advantages(rewards[[0, 2, 3]], group[:3], method=method)
        assert found[1] == 0
        torch.testing.assert_close(found[[0, 2, 3]], kept)


# traps


def test_a_filter_on_variance_reads_rewards_as_they_are():
    scores = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.5, 0.5], [0.5, 0.5]])
    group = torch.tensor([0, 0, 1, 1])
    assert scores[:2].mean(1).std() == 0  # a filter on the weighted sum would drop the first group
    assert informative_groups(scores, group).tolist() == [True, True, False, False]
    assert informative_groups(1e-9 * scores, group).tolist() == [True, True, False, False]
    normalized = group_advantages(scores[:, 0], group)
    assert informative_groups(normalized, group).tolist() == [True, True, False, False]
    assert informative_groups(torch.tensor([math.nan, 1.0, 2.0, 2.0]), group).tolist() == [False] * 4


def test_a_threshold_reads_raw_rewards():
    right = torch.ones(4)  # all right: normalized rewards would be 0, and nobody above the threshold
    found = WReinforce(0.1)(tokens(rewards=right, advantages=torch.zeros(4))).advantages
    assert (found == 0.1).all()
    found = WReinforce(0.1)(tokens(rewards=torch.tensor([1.0, 0.0, math.nan, 0.0]))).advantages
    torch.testing.assert_close(found[:, 0], torch.tensor([0.1, -1.0, 0.0, -1.0]))


def test_kl_cov_does_nothing_on_policy_and_says_so():
    values = batch()
    values["logp"].requires_grad_()
    values["old_logp"] = values["logp"].detach()
    rule = KLCov(0.5)
    found, plain = policy_loss(**values, rule=rule), policy_loss(**values, dual_clip=None)
    torch.testing.assert_close(found.loss, plain.loss)
    for _ in range(62):
        rule(Tokens.of(**values))
    with pytest.warns(WeightsmithWarning, match="KLCov has done nothing in 64 calls"):
        rule(Tokens.of(**values))
    again = KLCov(0.5)
    again.load_state_dict({"idle": 63})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again(tokens())
    assert again.state_dict() == {"idle": -1}


def test_kl_cov_acts_on_the_tokens_of_largest_covariance():
    rule = KLCov(0.2)
    found = rule(tokens())
    assert int((found.drift > 0).sum()) == max(1, int(0.2 * int(batch()["mask"].sum())))
    assert (found.drift[~batch()["mask"]] == 0).all()


def test_clip_cov_resumes_its_draws():
    one, two = (ClipCov(0.1, low=-1e9, high=1e9, seed=4) for _ in range(2))
    one(tokens())
    two.load_state_dict(one.state_dict())
    assert torch.equal(one(tokens()).weights, two(tokens()).weights)


def test_an_entropy_bonus_holds_its_target():
    rule = EntropyBonus(0.0, target=1.0, step=0.1)
    low, high = (tokens(entropy=torch.full((4, 6), value)) for value in (0.5, 2.0))
    assert [rule(low).entropy_coef, rule(low).entropy_coef, rule(high).entropy_coef] == pytest.approx([0, 0.1, 0])
    again = EntropyBonus()
    again.load_state_dict(rule.state_dict())
    assert again.coef == pytest.approx(0.1)


def test_the_entropy_bonus_has_a_gradient_and_raises_entropy():
    logits = torch.randn(2, 3, 5, generator=torch.Generator().manual_seed(0)).requires_grad_()
    log_p = logits.log_softmax(-1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    found = policy_loss(log_p[..., 0], torch.zeros(2), torch.ones(2, 3), rule=EntropyBonus(0.5), entropy=entropy)
    (gradient,) = torch.autograd.grad(found.loss, logits)
    stepped = (logits - 0.1 * gradient).log_softmax(-1)
    assert -(stepped.exp() * stepped).sum(-1).mean() > entropy.mean()


def test_fork_tokens_keep_the_share_of_highest_entropy():
    found = ForkTokens(0.25)(tokens(mask=torch.ones(4, 6))).weights
    entropy = batch()["entropy"]
    assert found.sum() == 6
    assert entropy[found > 0].min() >= entropy[found == 0].max()


def test_weights_compile():
    values = tokens()
    step = torch.compile(token_weights, backend="eager", fullgraph=True)
    omega = entropy_change(values.logp, values.entropy, values.advantages)
    torch.testing.assert_close(step(omega, values.mask), token_weights(omega, values.mask))


@pytest.mark.parametrize("method", ["grpo", "dr_grpo", "rloo", "reinforce_pp", "opo"])
@pytest.mark.parametrize("size", [3, 6, 7])
def test_equal_rewards_have_no_advantage_from_rounding(method, size):
    group, mask = torch.zeros(size, dtype=torch.int64), torch.ones(size, 2)
    for reward in (0.1, 0.7, 123.4):
        found = group_advantages(torch.full((size,), reward), group, method=method, mask=mask)
        assert torch.equal(found, torch.zeros_like(found))


def test_an_entropy_bonus_without_gradient_is_refused():
    logp, entropy = torch.full((2, 3), -1.0, requires_grad=True), torch.ones(2, 3)
    with pytest.raises(UsageError, match="entropy has no gradient"):
        policy_loss(logp, torch.ones(2), torch.ones(2, 3), rule=EntropyBonus(), entropy=entropy)
    with torch.no_grad():
        policy_loss(logp, torch.ones(2), torch.ones(2, 3), rule=EntropyBonus(), entropy=entropy)
