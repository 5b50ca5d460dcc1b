"""What theory says, on random tensors."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightsmith.optim import SGDP, AdamP, projection
from weightsmith.optim.projection import View, cosine, invariant_view, look, move_, project

shapes = st.lists(st.integers(1, 6), min_size=2, max_size=4).map(tuple)
seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=40, deadline=None)


def randn(seed, *shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def orthogonal(g, w):
    rows, weights = g.flatten(1), w.flatten(1)
    return (rows - (rows * weights).sum(1, keepdim=True) / weights.square().sum(1, keepdim=True) * weights).view_as(g)


def steps(optimizer, params, grads):
    for grad in grads:
        for p in params:
            p.grad = grad.clone()
        optimizer.step()
    return params[0].detach()


@few
@given(shapes, seeds)
def test_the_two_ways_to_look_agree(shape, seed):
    w, g = randn(seed, *shape), randn(seed + 1, *shape)
    for grad in (g, orthogonal(g, w), g - (g * w).sum() / (w * w).sum() * w, torch.zeros_like(g)):
        if 0 < grad.norm() < 1e-6:
            continue  # the gradient was parallel to the weight: what is left is rounding
        view = int(invariant_view(w, grad, delta=0.1, eps=1e-8))
        assert look(w.flatten(1), grad.flatten(1), delta=0.1, eps=1e-8)[0] == view


@few
@given(shapes, seeds, st.sampled_from([View.CHANNEL, View.LAYER]))
def test_a_projected_update_is_orthogonal_and_adds_its_square_to_the_norm(shape, seed, view):
    w, u = randn(seed, *shape), randn(seed + 1, *shape)
    projected = project(u, w, torch.tensor(int(view)), eps=0.0)
    inner = (projected * w).flatten(1 if view == View.CHANNEL else 0).sum(-1)
    assert inner.abs().max() < 1e-10
    torch.testing.assert_close((w + projected).square().sum(), w.square().sum() + projected.square().sum())


@few
@given(shapes, seeds)
def test_moving_block_by_block_equals_moving_at_once(shape, seed):
    w, d = randn(seed, *shape).flatten(1), randn(seed + 1, *shape).flatten(1)
    want = 0.9 * w + project(d, w, torch.tensor(int(View.CHANNEL)), eps=1e-8)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(projection, "BLOCK", 2 * w.shape[1])  # two rows at a time
        move_(w, w.norm(dim=1), lambda rows: rows, (d,), keep=0.9, eps=1e-8)
    torch.testing.assert_close(w, want)


@few
@given(shapes, seeds)
def test_cosine_is_between_zero_and_one_and_does_not_see_scale(shape, seed):
    x, y = randn(seed, *shape).flatten(), randn(seed + 1, *shape).flatten()
    value = cosine(x @ y, x.norm(), y.norm(), 1e-8)
    assert 0 <= value <= 1 + 1e-12
    torch.testing.assert_close(cosine(3 * x @ y, 3 * x.norm(), y.norm(), 1e-8), value)


@few
@given(shapes, seeds)
def test_delta_zero_is_adamw(shape, seed):
    init, grads = randn(seed, *shape), randn(seed + 1, 3, *shape)
    ours, theirs = nn.Parameter(init.clone()), nn.Parameter(init.clone())
    steps(AdamP([ours], delta=0.0, weight_decay=0.1), [ours], grads)
    steps(torch.optim.AdamW([theirs], weight_decay=0.1), [theirs], grads)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@few
@given(shapes, seeds, st.booleans())
def test_delta_zero_is_sgd(shape, seed, nesterov):
    init, grads = randn(seed, *shape), randn(seed + 1, 3, *shape)
    ours, theirs = nn.Parameter(init.clone()), nn.Parameter(init.clone())
    steps(SGDP([ours], lr=0.1, momentum=0.9, nesterov=nesterov, delta=0.0), [ours], grads)
    steps(torch.optim.SGD([theirs], lr=0.1, momentum=0.9, nesterov=nesterov), [theirs], grads)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer_class", [AdamP, SGDP])
def test_a_large_delta_always_projects_by_channel(optimizer_class):
    p = nn.Parameter(randn(0, 4, 5))
    optimizer = optimizer_class([p], delta=1e6)
    steps(optimizer, [p], randn(1, 1, 4, 5))
    assert optimizer.projection_stats()[0].channel == 1


@pytest.mark.parametrize(("ratio", "keep"), [(0.0, 1.0), (0.5, 1 - 0.1 * 0.4 * 0.5), (1.0, 1 - 0.1 * 0.4)])
def test_wd_ratio_is_the_share_of_decay_that_a_projected_weight_gets(ratio, keep):
    p = nn.Parameter(randn(0, 4, 5))
    want = p.detach() * keep
    steps(AdamP([p], lr=0.1, weight_decay=0.4, wd_ratio=ratio), [p], torch.zeros(1, 4, 5, dtype=torch.float64))
    torch.testing.assert_close(p.detach(), want)


def scale_invariant_run(make, n_steps=60):
    p = nn.Parameter(torch.tensor([[-0.857, 0.5155]], dtype=torch.float64))
    optimizer = make([p])
    for _ in range(n_steps):
        optimizer.zero_grad()
        (-p[0, 0] / p.norm()).backward()
        optimizer.step()
    return p.detach().norm().item()


def test_projection_suppresses_the_norm_growth_of_momentum_on_a_scale_invariant_loss():
    plain = scale_invariant_run(lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9))
    projected = scale_invariant_run(lambda params: SGDP(params, lr=0.1, momentum=0.9))
    assert projected - 1 < 0.5 * (plain - 1)


def test_heavy_ball_norm_growth_follows_the_momentum_identity():
    # ||w_T||^2 = ||w_0||^2 + lr^2 sum ||p_t||^2 + 2 lr^2 sum of the past momenta, decayed: delta=0 is plain heavy ball
    lr, beta = 0.1, 0.9
    p = nn.Parameter(torch.tensor([[-0.857, 0.5155]], dtype=torch.float64))
    optimizer = SGDP([p], lr=lr, momentum=beta, delta=0.0)
    past = 0.0
    for _ in range(20):
        before = p.detach().square().sum()
        optimizer.zero_grad()
        (-p[0, 0] / p.norm()).backward()
        optimizer.step()
        momentum = optimizer.state[p]["momentum"].square().sum()
        # <w_t, p_{t+1}> = -lr sum_k beta^(t+1-k) ||p_k||^2, since <w, g> = 0
        torch.testing.assert_close(p.detach().square().sum(), before + lr**2 * momentum + 2 * lr**2 * past)
        past = beta * (past + momentum)


def test_with_projection_the_norm_grows_only_by_the_square_of_the_step():
    p = nn.Parameter(randn(0, 3, 7))
    before = p.detach().clone()
    optimizer = AdamP([p], lr=0.1, eps=0.0)
    steps(optimizer, [p], orthogonal(randn(1, 3, 7), before)[None])
    moved = p.detach() - before
    torch.testing.assert_close(p.detach().square().sum(), before.square().sum() + moved.square().sum())
