"""Cases in which the rules once differed from the authors' code, or gave NaN."""

import pytest
import torch

from weightsmith.core.errors import UsageError
from weightsmith.reweight import (
    KLCov,
    Steer,
    Tokens,
    clarity,
    entropy_change,
    fused_linear_logprob,
    informative_groups,
    objective_advantages,
    policy_loss,
    token_weights,
)
from weightsmith.reweight.policy_loss import AGGREGATES, aggregate_tokens


def test_clarity_is_that_of_the_authors_at_blanks_and_bullets():
    assert clarity("First a, then b: \\boxed{ 7 }") == 1
    assert clarity("First a, then b: \\boxed{7") == 0
    assert clarity("- 1. only one \\boxed{7}") == 0


def test_kl_cov_clips_no_ratio_by_default():
    logp, old, mask = torch.zeros(1, 4), torch.full((1, 4), -3.0), torch.ones(1, 4)
    found = policy_loss(logp, -torch.ones(1), mask, old_logp=old, rule=KLCov(0.1, beta=0.0))
    torch.testing.assert_close(found.loss, torch.tensor(3.0).exp())


def test_an_entropy_bonus_with_impossible_tokens_has_no_nan():
    hidden, bias = torch.randn(2, 3, requires_grad=True), torch.tensor([0.0, 0.0, -torch.inf])
    _, entropy, _ = fused_linear_logprob(
        hidden, torch.randn(3, 3), torch.zeros(2, dtype=torch.long), bias=bias, entropy_grad=True
    )
    (100 * entropy.sum()).backward()
    assert hidden.grad is not None
    assert hidden.grad.isfinite().all()


def test_token_weights_of_half_precision_are_float32():
    omega, mask = torch.linspace(-1, 1, 8).view(2, 4), torch.ones(2, 4)
    for dtype in (torch.float16, torch.bfloat16):
        torch.testing.assert_close(token_weights(omega.to(dtype), mask), token_weights(omega.to(dtype).float(), mask))
    assert token_weights(omega.double(), mask).dtype == torch.float64


def test_token_weights_need_a_mask_of_their_shape():
    with pytest.raises(UsageError, match=r"mask must have the shape of omega, \(2, 3\), got \(1, 3\)"):
        token_weights(torch.ones(2, 3), torch.ones(1, 3))


def test_a_quantile_at_the_smallest_change_still_damps_the_larger_ones():
    omega = torch.zeros(1, 10)
    omega[0, 0] = 1.0
    options = {"mapping": "linear", "lambda_min": 0.8, "lambda_max": 1.2}
    found = token_weights(omega, torch.ones(1, 10), scale_quantile=0.5, **options)
    torch.testing.assert_close(found, torch.tensor([[0.8] + 9 * [1.2]]))
    mask = torch.ones(1, 10)
    mask[0, 0] = 0  # the others are all equal
    found = token_weights(omega, mask, scale_quantile=0.5, **options)
    torch.testing.assert_close(found, mask)


def test_advantages_of_sequences_are_not_those_of_positions_in_a_square_batch():
    logp, entropy, advantages = -torch.rand(3, 3), torch.rand(3, 3), torch.tensor([1.0, 0.0, -1.0])
    found = entropy_change(logp, entropy, advantages)
    assert torch.equal(found, entropy_change(logp, entropy, advantages[:, None].expand(3, 3)))
    with pytest.raises(UsageError, match="advantages must be"):
        entropy_change(logp[:2], entropy[:2], advantages)


def test_steer_works_from_the_old_entropy_alone():
    logp, entropy, advantages, mask = -torch.rand(2, 3), torch.rand(2, 3), torch.ones(2), torch.ones(2, 3)
    found = Steer()(Tokens.of(logp, advantages, mask, old_entropy=entropy)).weights
    assert torch.equal(
        found, Steer()(Tokens.of(logp, advantages, mask, entropy=0 * entropy, old_entropy=entropy)).weights
    )
    with pytest.raises(UsageError, match="Steer needs entropy"):
        Steer(entropy_source="current")(Tokens.of(logp, advantages, mask, old_entropy=entropy))


@pytest.mark.parametrize("dtype", [torch.long, torch.bool])
def test_groups_of_whole_number_rewards_can_be_informative(dtype):
    assert informative_groups(torch.tensor([1, 0, 1, 1]).to(dtype), torch.tensor([0, 0, 1, 1])).tolist() == [1, 1, 0, 0]


@pytest.mark.parametrize("aggregation", ["sum_then_normalize", "normalize_then_sum"])
def test_rewards_in_half_precision_are_summed_in_float32(aggregation):
    scores, weights = torch.tensor([[256.0, 1.0], [256.0, 0.0]]).bfloat16(), torch.tensor([1.0, 1.0])
    options = {"group": torch.zeros(2), "method": "dr_grpo", "aggregation": aggregation}
    found = objective_advantages(scores, weights, **options)
    torch.testing.assert_close(found, objective_advantages(scores.float(), weights, **options))


@pytest.mark.parametrize("shape", [(0, 3), (3, 0), (0, 0)])
@pytest.mark.parametrize("how", AGGREGATES)
def test_a_batch_without_tokens_has_loss_zero(how, shape):
    assert aggregate_tokens(torch.zeros(shape), torch.zeros(shape), how) == 0
