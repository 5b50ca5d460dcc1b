"""Gradients written by hand against those that autograd finds for the same operations."""

import pytest
import torch
from torch.autograd import gradcheck
from torch.nn import functional as F

from weightsmith.certify.fused import linear_of_ball, normalized, relu_of_ball


def draw(*shape, seed=0, low=-1.0):
    generator = torch.Generator().manual_seed(seed)
    return (low + (1 - low) * torch.rand(*shape, generator=generator, dtype=torch.float64)).requires_grad_()


def plain_norm(x, weight, bias, eps):
    axes = [axis for axis in range(x.dim()) if axis != 1]
    var, mean = torch.var_mean(x, axes, correction=0)
    return F.batch_norm(x, None, None, weight, bias, True, 0.0, eps), mean, (var + eps).rsqrt()


@pytest.mark.parametrize("shape", [(6, 3), (4, 3, 5), (3, 2, 4, 5), (2, 2, 3, 2, 3)])
@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("used", [(0,), (1, 2), (0, 1, 2), (2,)])
def test_statistics_of_batch_norm_have_gradients(shape, affine, used):
    x = draw(*shape)
    weight, bias = (draw(shape[1], seed=1), draw(shape[1], seed=2)) if affine else (None, None)
    wanted = [t for t in (x, weight, bias) if t is not None]
    results = []
    for norm in (normalized, plain_norm):
        found = norm(x, weight, bias, 1e-5)
        loss = sum((found[i] * draw(*found[i].shape, seed=7 + i).detach()).sum() for i in used)
        results.append((found, torch.autograd.grad(loss, wanted, allow_unused=True, materialize_grads=True)))
    for one, other in zip(*results, strict=True):
        for ours, expected in zip(one, other, strict=True):
            torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_relu_and_linear_layers_of_balls_pass_gradcheck():
    center, radius = draw(5, 6), draw(5, 6, seed=1, low=0.0)
    assert gradcheck(relu_of_ball, (center, radius))
    weight, bias = draw(4, 6, seed=2), draw(4, seed=3)
    assert gradcheck(linear_of_ball, (center, radius, weight, bias))
    assert gradcheck(lambda c, r, w: linear_of_ball(c, r, w, None), (draw(2, 3, 6), draw(2, 3, 6, low=0.0), weight))


def test_a_weight_of_zero_gets_the_gradient_that_abs_has_there():
    center, radius = draw(5, 6), draw(5, 6, seed=1, low=0.0)
    weight = torch.zeros(4, 6, dtype=torch.float64, requires_grad=True)
    low, size = linear_of_ball(center, radius, weight, None)
    (ours,) = torch.autograd.grad(low.sum() + size.sum(), weight)
    torch.testing.assert_close(ours, center.sum(0).expand(4, 6).detach())


def test_a_backward_pass_can_be_repeated():
    center, radius, weight = draw(5, 6), draw(5, 6, seed=1, low=0.0), draw(4, 6, seed=2)
    loss = sum(part.square().sum() for part in linear_of_ball(*relu_of_ball(center, radius), weight, None))
    first = torch.autograd.grad(loss, (center, radius, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (center, radius, weight))
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_dead_and_always_active_neurons_pass_exact_gradients():
    center = torch.tensor([-3.0, 3.0], dtype=torch.float64, requires_grad=True)
    radius = torch.tensor([1.0, 1.0], dtype=torch.float64, requires_grad=True)
    middle, width = relu_of_ball(center, radius)
    assert middle.tolist() == [0.0, 3.0]
    assert width.tolist() == [0.0, 1.0]
    of_center, of_radius = torch.autograd.grad((middle + 2 * width).sum(), (center, radius))
    assert of_center.tolist() == [0.0, 1.0]
    assert of_radius.tolist() == [0.0, 2.0]
