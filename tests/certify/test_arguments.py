"""Arguments of common operations under which a rule would not hold, or must say something else."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightsmith.certify import UnsupportedOperation, bounds, input_box

METHODS = ("ibp", "crown-ibp", "crown")


class Calls(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


W = torch.randn(4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: torch.mul(x, other=-2.0) + torch.sub(input=x, other=x.flip(1), alpha=2),
        lambda x: torch.matmul(x, other=W),
        lambda x: x * torch.tensor([True, False, True, False]),
        lambda x: F.rms_norm(x * 1e-4, (4,)),
        lambda x: torch.einsum("bi,bj->bij", [x, x]).flatten(1),
        lambda x: F.pad(x, (0, 1)).view(x.shape[0], x.shape[1] + 1),
        lambda x: x.float().double() - x.half().to(torch.float64),
        lambda x: F.interpolate(x.view(-1, 1, 2, 2), scale_factor=1.6, mode="bilinear").flatten(1),
        lambda x: nn.Upsample(scale_factor=1.6, mode="bilinear", recompute_scale_factor=True)(x[:, None, None]).flatten(
            1
        ),
    ],
)
def test_bounds_hold_for_unusual_arguments(function, method):
    model, x = Calls(function), torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for eps in (0.0, 0.1):
        found, box = bounds(model, x, eps, method=method), input_box(x, eps)
        for seed in range(20):
            share = torch.rand(x.shape, generator=torch.Generator().manual_seed(seed), dtype=x.dtype)
            values = model(box.lower + share * (box.upper - box.lower))
            assert (values >= found.lower - 1e-9).all()
            assert (values <= found.upper + 1e-9).all()
        assert (found.upper - found.lower).max() < (1e-2 if eps == 0 else 10)


def test_upsampling_as_a_module_computes_its_scale_anew_where_asked():
    net = nn.Sequential(nn.Upsample(scale_factor=1.6, mode="bilinear", recompute_scale_factor=True), nn.Flatten())
    x = torch.randn(2, 1, 4, 4)
    torch.testing.assert_close(bounds(net, x, 0.0).lower, net(x))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "function",
    [
        lambda x: F.celu(x, -0.7),
        lambda x: F.softplus(x, -1.0),
        lambda x: x.to(torch.int64) * 1.0,
        lambda x: F.avg_pool2d(x.view(-1, 1, 2, 2), 2, divisor_override=-4).flatten(1),
    ],
)
def test_arguments_under_which_a_rule_does_not_hold_are_refused(function, method):
    with pytest.raises(UnsupportedOperation, match="node"):
        bounds(Calls(function), torch.randn(3, 4), 0.1, method=method)


@pytest.mark.parametrize("method", METHODS[1:])
def test_linear_bounds_refuse_a_bilinear_form_with_a_negative_factor(method):
    model = Calls(lambda x: torch.einsum("bi,ij,bj->b", x, W, x)[:, None])
    with pytest.raises(UnsupportedOperation, match=r"einsum.*ibp"):
        bounds(model, torch.randn(3, 4, dtype=torch.float64), 0.1, method=method)


@pytest.mark.parametrize("norm", [nn.LayerNorm(4), nn.RMSNorm(4), nn.GroupNorm(2, 4)])
def test_squares_that_overflow_leave_the_bounds_of_a_norm(norm):
    found = bounds(norm, torch.randn(3, 4), 1e25)
    assert (found.upper > 1.0).all()
    assert (found.lower < -1.0).all()


@pytest.mark.parametrize("method", METHODS)
def test_outputs_that_are_masked_are_infinite(method):
    mask = torch.tensor([True, False, False, True])
    found = bounds(Calls(lambda x: x.masked_fill(mask, float("-inf"))), torch.zeros(2, 4), 0.1, method=method)
    assert found.lower[:, mask].eq(-torch.inf).all()
    assert found.lower[:, ~mask].eq(-0.1).all()
