"""Every row of the pitfall table of dynamic reward weighting, and properties of influence and hypervolume."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.reweight import (
    Conciseness,
    FixedWeights,
    GradientWeights,
    HypervolumeWeights,
    boxed_accuracy,
    group_advantages,
    hypervolume,
    hypervolume_contribution,
    influence_of,
    objective_advantages,
    objective_gradients,
    objective_influence,
    pareto_front,
)


class Policy(nn.Module):
    def __init__(self, dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.body, self.head, self.unused = nn.Linear(3, 8), nn.Linear(8, 5), nn.Linear(2, 2)
        self.to(dtype)

    def forward(self, x, actions):
        log_p = self.head(torch.tanh(self.body(x))).log_softmax(-1)
        return log_p.gather(-1, actions[..., None])[..., 0]


def rollouts(k=3, b=8, t=4, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(b, t, 3, generator=g, dtype=torch.float64)
    actions = torch.randint(5, (b, t), generator=g)
    mask = torch.rand(b, t, generator=g) < 0.8
    scores = torch.randn(b, k, generator=g, dtype=torch.float64)
    group = torch.arange(b) // 4
    return x, actions, mask, torch.stack([group_advantages(c, group, mask=mask) for c in scores.T])


def influence(policy, method, **options):
    x, actions, mask, advantages = rollouts()
    params = list(policy.parameters())
    names = [name for name, _ in policy.named_parameters()]

    def logp(values):
        return torch.func.functional_call(policy, dict(zip(names, values, strict=True)), (x, actions))

    return objective_influence(logp, advantages, mask, params, method=method, **options)


def test_an_objective_that_never_differs_has_no_influence():
    x, actions, mask, advantages = rollouts()
    policy = Policy()
    advantages[1] = group_advantages(torch.ones(8, dtype=torch.float64), torch.arange(8) // 4, mask=mask)
    found = objective_influence(policy(x, actions), advantages, mask, list(policy.parameters()))
    assert found[1] == 0
    weights = GradientWeights(3).update(found)
    assert weights.isfinite().all()


def test_an_objective_without_advantages_takes_no_backward_pass(monkeypatch):
    x, actions, mask, advantages = rollouts()
    policy, passes, grad = Policy(), [], torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", lambda *args, **options: passes.append(1) or grad(*args, **options))
    advantages[2] = 0
    gradients = objective_gradients(policy(x, actions), advantages, mask, list(policy.parameters()))
    assert len(passes) == 2
    assert not any(part.any() for part in gradients[2])


@pytest.mark.parametrize("last", [1.0, 0.0])
def test_the_graph_is_kept_for_the_loss_of_the_same_step_where_asked(last):
    x, actions, mask, advantages = rollouts()
    advantages[2] *= last
    for keep in (True, False):
        policy = Policy()
        logp = policy(x, actions)
        objective_influence(logp, advantages, mask, list(policy.parameters()), retain_graph=keep)
        if keep:
            logp.sum().backward()
            assert policy.head.weight.grad is not None
        else:
            with pytest.raises(RuntimeError, match="second time"):
                logp.sum().backward()


def test_forward_mode_gives_the_same_number_as_backward():
    policy = Policy()
    backward, forward = influence(policy, "backward", max_norm=None), influence(policy, "jvp", max_norm=None)
    torch.testing.assert_close(forward, backward, rtol=1e-11, atol=1e-14)
    assert all(p.grad is None for p in policy.parameters())


def test_the_influence_is_the_row_sum_of_the_gram_matrix():
    x, actions, mask, advantages = rollouts()
    policy = Policy()
    params = list(policy.parameters())[:4]
    rows = []
    for row in advantages:
        loss = -(mask * row * policy(x, actions)).sum() / mask.sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, params)]))
    gram = torch.stack(rows) @ torch.stack(rows).T
    found = objective_influence(policy(x, actions), advantages, mask, params, max_norm=None)
    torch.testing.assert_close(found, gram.sum(1))


def test_the_norm_may_be_over_more_than_the_targets():
    x, actions, mask, advantages = rollouts()
    policy = Policy()
    params = list(policy.parameters())
    found = objective_influence(policy(x, actions), advantages, mask, params[2:4], max_norm=1e-3, norm_params=params)
    gradients = objective_gradients(policy(x, actions), advantages, mask, params)
    norms = torch.stack([torch.stack([g.norm() for g in parts]).norm() for parts in gradients])
    scaled = [[g * 1e-3 / (norm + 1e-6) for g in parts[2:4]] for parts, norm in zip(gradients, norms, strict=True)]
    torch.testing.assert_close(found, influence_of(scaled, max_norm=None))


def test_frozen_and_unused_parameters_count_as_zero():
    policy = Policy()
    policy.unused.requires_grad_(True)
    x, actions, mask, advantages = rollouts()
    everything = objective_influence(policy(x, actions), advantages, mask, list(policy.parameters()))
    used = objective_influence(
        policy(x, actions), advantages, mask, [*policy.body.parameters(), *policy.head.parameters()]
    )
    torch.testing.assert_close(everything, used)


def test_half_precision_gradients_are_multiplied_in_float32():
    policy = Policy(torch.bfloat16)
    x, actions, mask, advantages = rollouts()
    found = objective_influence(policy(x.bfloat16(), actions), advantages, mask, list(policy.parameters()))
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), influence(Policy(), "backward"), rtol=0.2, atol=1e-3)


def test_conflicting_gradients_have_negative_influence_and_lose_weight():
    g = torch.tensor([1.0, 0.0])
    found = influence_of([[3 * g], [-g]], max_norm=None)
    assert found.tolist() == [6.0, -2.0]
    assert GradientWeights(2).update(found)[1] < 0.5


def test_micro_batches_add_up_to_the_batch():
    x, actions, mask, advantages = rollouts()
    policy = Policy()
    params = list(policy.parameters())
    whole = objective_gradients(policy(x, actions), advantages, mask, params)
    total = float(mask.sum())
    parts = [
        objective_gradients(policy(x[i], actions[i]), advantages[:, i], mask[i], params, normalizer=total)
        for i in (slice(3), slice(3, 8))
    ]
    for k in range(3):
        for one, two, both in zip(parts[0][k], parts[1][k], whole[k], strict=True):
            torch.testing.assert_close(one + two, both)


@pytest.mark.parametrize(
    ("weights", "message"),
    [([0.5, 0.6], "sum to 1"), ([1.5, -0.5], "at least 0"), ([], "one number"), ([math.nan, 1.0], "at least 0")],
)
def test_weights_are_checked(weights, message):
    for make in (FixedWeights, lambda w: HypervolumeWeights(w, [True, True])):
        with pytest.raises(UsageError, match=message):
            make(weights)


def test_a_weight_of_zero_stays_zero_and_must_be_asked_for():
    with pytest.raises(UsageError, match="allow_zero"):
        GradientWeights(2, weights=[1.0, 0.0])
    rule = GradientWeights(2, weights=[1.0, 0.0], allow_zero=True)
    assert rule.update([0.1, 5.0]).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_influence_that_is_not_finite_is_left_out_and_counted(bad):
    rule = GradientWeights(2)
    with pytest.warns(WeightsmithWarning, match="not finite"):
        found = rule.update([bad, 1.0])
    assert found.tolist() == [0.5, 0.5]
    assert rule.skipped == 1


def test_huge_influence_does_not_overflow():
    assert GradientWeights(3, step_size=1e6).update([1e300, 1.0, -1e300]).tolist() == [1.0, 0.0, 0.0]


@pytest.mark.parametrize(("options", "lr"), [({"mu": 1e30}, 1e-3), ({}, 0.0), ({"step_size": 0.0}, 1.0)])
def test_a_step_of_nothing_changes_nothing(options, lr):
    rule = GradientWeights(2, weights=[0.3, 0.7], **options)
    torch.testing.assert_close(rule.update([3.0, -1.0], lr), torch.tensor([0.3, 0.7], dtype=torch.float64))


def test_steps_shrink_with_the_learning_rate():
    rule = GradientWeights(2, step_size=0.5)
    rule.update([1.0, 0.0], 1e-3)
    first = rule.weights.log().diff()
    rule.update([1.0, 0.0], 5e-4)
    torch.testing.assert_close(rule.weights.log().diff() - first, first / 2)


def test_one_objective_keeps_all_the_weight():
    assert GradientWeights(1).update([7.0]).tolist() == [1.0]
    rule = HypervolumeWeights([1.0], [True], reference=[0.0])
    assert rule.update([0.3]) == pytest.approx(0.5 + 1.5 * math.tanh(0.3))
    assert rule.update([0.2]) == 0.5


def test_a_point_below_the_reference_in_any_coordinate_adds_nothing():
    rule = HypervolumeWeights([0.5, 0.5], [True, True], reference=[0, 0])
    assert rule.update([0.2, 0.3]) > 0.5
    assert rule.update([0.5, -0.1]) == 0.5
    assert len(rule.front) == 1
    assert hypervolume([[2, 2]], [3, 3]) == 0


def test_a_point_that_is_no_number_is_refused_and_not_kept():
    rule = HypervolumeWeights([0.5, 0.5], [True, True], reference=[0, 0])
    for bad in ([math.nan, 1.0], [math.inf, 1.0], [1.0]):
        with pytest.raises(UsageError, match="2 finite numbers"):
            rule.update(bad)
    assert rule.front == []


def test_a_duplicate_adds_nothing_and_is_not_kept():
    rule = HypervolumeWeights([0.5, 0.5], [True, False], reference=[0, 10])
    assert rule.update([1.0, 5.0]) > 0.5
    assert rule.update([1.0, 5.0]) == 0.5
    assert len(rule.front) == 1


def test_the_first_point_becomes_the_reference():
    rule = HypervolumeWeights([0.5, 0.5], [True, True])
    assert rule.update([0.1, 0.2]) == 1.0
    assert rule.reference == [0.1, 0.2]


def test_scale_divides_each_axis():
    plain, scaled = (
        HypervolumeWeights([0.5, 0.5], [True, False], reference=[0, 100], scale=s) for s in (None, [1, 100])
    )
    assert plain.update([0.5, 50]) == pytest.approx(2.0)  # saturated
    assert scaled.update([0.5, 50]) == pytest.approx(0.5 + 1.5 * math.tanh(0.25))


def test_the_factor_acts_on_rewards_or_on_advantages():
    for apply_to, on_rewards, on_advantages in (("reward", 0.25, 1.0), ("advantage", 0.5, 0.5)):
        rule = HypervolumeWeights([0.5, 0.5], [True, True], reference=[1, 1], apply_to=apply_to)
        rule.update([0, 0])
        assert rule.reward_weights.tolist() == [on_rewards] * 2
        assert rule.advantage_factor == on_advantages


def test_the_released_weighting_does_nothing_under_grpo_and_says_so_once():
    rule = HypervolumeWeights([0.5, 0.5], [True, True], reference=[1, 1], apply_to="reward")
    g = torch.Generator().manual_seed(0)
    scores, group = torch.rand(12, 2, generator=g), torch.arange(12) // 4
    before = objective_advantages(scores, rule.reward_weights, group)
    rule.update([0, 0])
    assert rule.meta == 0.5
    torch.testing.assert_close(objective_advantages(scores, rule.reward_weights, group), before, rtol=1e-4, atol=1e-4)
    with pytest.warns(WeightsmithWarning, match="does nothing"):
        rule.check_estimator("grpo")
    rule.check_estimator("grpo")
    HypervolumeWeights([0.5, 0.5], [True, True], apply_to="reward").check_estimator("rloo")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: HypervolumeWeights([1.0], [True], base=-1), "base and gain"),
        (lambda: HypervolumeWeights([1.0], []), "maximize"),
        (lambda: HypervolumeWeights([1.0], [True], apply_to="loss"), "apply_to"),
        (lambda: HypervolumeWeights([1.0], [True], scale=[0]), "scale"),
        (lambda: GradientWeights(0), "n_objectives"),
        (lambda: GradientWeights(2, weights=[1.0]), "weights must hold 2"),
        (lambda: GradientWeights(2, mu=0), "mu"),
        (lambda: GradientWeights(2, step_size=-1), "step_size"),
        (lambda: GradientWeights(2, accumulation_steps=0), "accumulation_steps"),
        (lambda: GradientWeights(2).update([1.0]), "influence must be"),
        (lambda: GradientWeights(2).update([1.0, 1.0], -1), "lr must be"),
        (lambda: hypervolume([[1, 2, 3]], [0, 0]), "2 coordinates"),
        (lambda: hypervolume([[1, 2]], [0, 0], [True]), "maximize"),
        (lambda: hypervolume([[1, math.nan]], [0, 0]), "finite"),
        (lambda: influence(Policy(), "jvp"), "max_norm=None"),
        (lambda: influence(Policy(), "forward"), "method"),
        (lambda: Conciseness()([1, 2], [1]), "one number per rollout"),
    ],
)
def test_bad_input_is_an_error_that_names_it(make, message):
    with pytest.raises(UsageError, match=message):
        make()


def test_forward_mode_needs_a_function():
    x, actions, mask, advantages = rollouts()
    policy = Policy()
    with pytest.raises(UsageError, match="as a function"):
        objective_influence(
            policy(x, actions), advantages, mask, list(policy.parameters()), method="jvp", max_norm=None
        )


@pytest.mark.parametrize(
    "make",
    [
        lambda: HypervolumeWeights([0.5, 0.5], [True, True]),
        lambda: GradientWeights(2, accumulation_steps=3),
        lambda: Conciseness(),
    ],
)
def test_state_goes_on_where_it_stopped(make):
    def drive(rule, steps):
        for step in steps:
            rule([step, 2]) if isinstance(rule, Conciseness) else rule.update([0.1 * step, 0.2])

    whole, cut, resumed = make(), make(), make()
    drive(whole, range(7))
    drive(cut, range(4))
    resumed.load_state_dict(cut.state_dict())
    drive(resumed, range(4, 7))
    assert resumed.state_dict() == whole.state_dict()


def test_state_of_another_number_of_objectives_is_refused():
    with pytest.raises(UsageError, match="3 objectives"):
        GradientWeights(2).load_state_dict(GradientWeights(3).state_dict())


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 10**6), st.integers(1, 4), st.integers(0, 7))
def test_hypervolume_agrees_with_counting(seed, k, n):
    rng = np.random.default_rng(seed)
    points, maximize = rng.integers(0, 5, (n, k)), rng.integers(0, 2, k).astype(bool)
    reference = np.where(maximize, 1, 3)
    cells = np.stack(np.meshgrid(*[np.arange(-5, 10)] * k), -1).reshape(-1, k) + 0.5
    sign = np.where(maximize, 1, -1)
    inside = np.zeros(len(cells), dtype=bool)
    for point in points:
        inside |= ((cells * sign < point * sign) & (cells * sign > reference * sign)).all(1)
    assert hypervolume(points, reference, maximize.tolist()) == pytest.approx(inside.sum())
    if n:
        rest = hypervolume(points[1:], reference, maximize.tolist())
        gain = hypervolume_contribution(points[0], points[1:], reference, maximize.tolist())
        assert gain == pytest.approx(inside.sum() - rest)
        front = pareto_front(points, maximize.tolist())
        assert hypervolume(points[front], reference, maximize.tolist()) == pytest.approx(inside.sum())
        kept = points[front] * sign
        assert not any((kept[i] >= kept[j]).all() for i in range(len(kept)) for j in range(len(kept)) if i != j)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-1e3, 1e3), min_size=3, max_size=3), st.floats(0, 10))
def test_weights_stay_on_the_simplex(values, lr):
    rule = GradientWeights(3)
    rule.update([0.0] * 3, 1.0)
    found = rule.update(values, lr)
    assert float(found.sum()) == pytest.approx(1)
    assert (found >= 0).all()


@pytest.mark.parametrize(
    ("solution", "answer", "expected"),
    [
        ("\\fbox{7}", "7", 1.0), ("\\boxed{\\dfrac{3}{4}}", "3/4", 1.0), ("\\boxed{\\sqrt2}", "\\sqrt{2}", 1.0),
        ("\\boxed{7", "7", 0.0), ("\\boxed{5\\text{ cm}}", "5", 1.0), ("\\boxed{90^\\circ}", "90", 1.0),
        ("\\boxed{.5}", "0.5", 1.0), ("", "", 0.0),
    ],
)  # fmt: skip
def test_answers_are_compared_up_to_notation(solution, answer, expected):
    assert boxed_accuracy(solution, answer) == expected


def test_a_warm_up_does_not_enlarge_the_steps_of_gradient_weights():
    warm, plain = GradientWeights(2), GradientWeights(2)
    for lr in (1e-8, 1e-6):
        before = warm.weights
        warm.update([1.0, 0.0], lr, base_lr=1e-6)
    moved = (warm.weights / before).log().diff()
    torch.testing.assert_close(moved, plain.update([1.0, 0.0], 1e-6).log().diff())
    with pytest.raises(UsageError, match="base_lr must be a number above 0, got 0"):
        warm.update([1.0, 0.0], 1e-6, base_lr=0)


@pytest.mark.parametrize(
    ("solution", "answer", "expected"),
    [
        ("\\boxed{5%}", "5", 0), ("\\boxed{5\\%}", "5", 1), ("\\boxed{xy = 5}", "5", 0), ("\\boxed{x = 5}", "5", 1),
        ("\\boxed{\\sqrt 3}", "\\sqrt{3}", 0), ("\\boxed{\\sqrt3}", "\\sqrt{3}", 1),
        ("\\boxed{01/2}", "\\frac{01}{2}", 0),
        ("\\boxed{1\\text{ m}\\text{ s}%}", "1", 0), ("\\boxed{\\frac1\\frac23}", "\\frac1\\frac{2}{3}", 0),
        ("\\boxed 5$ or \\boxed{7}", "7", 1), ("\\boxed{7} or \\boxed 5$.", "5", 1), ("\\fbox{7}", "7", 1),
        ("\\boxed7 and {8}", "8", 0), ("\\boxed{\\sqrt}", "\\sqrt", 1), ("\\boxed{\\frac3{4}}", "3/4", 1),
    ],
)  # fmt: skip
def test_answers_are_compared_by_the_rules_of_the_math_data_set(solution, answer, expected):
    assert boxed_accuracy(solution, answer) == expected
