from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from weightsmith.quantize import Grid, LearningOptions, adaround_
from weightsmith.quantize.after_training.adaquant import AdaQuant
from weightsmith.quantize.after_training.adaround import AdaRound, temperature
from weightsmith.quantize.after_training.rtn import RoundToNearest

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "flexround.safetensors")
LAST = LearningOptions(keep_best=False)
GRIDS = {"ada4_pc": Grid(4, search="minmax"), "ada3_pt_mse": Grid(3, granularity="tensor", search="shrink")}


def close(left, right):
    return torch.allclose(left.flatten(), right.flatten(), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("tag", GRIDS)
def test_values_gradients_and_regularizer_are_those_of_brecq(tag):
    truth = {key.removeprefix(f"{tag}."): value for key, value in GOLDEN.items() if key.startswith(f"{tag}.")}
    rounding = AdaRound(truth["W"], GRIDS[tag], penalty=1.0)
    assert close(rounding.alpha, truth["alpha0"])
    units, (low, high) = rounding.units(truth["W"]), rounding.limits
    inside = rounding.join((units >= low) & (units <= high), torch.empty(truth["W"].shape, dtype=torch.bool))
    assert close(rounding(truth["W"])[inside], truth["W"][inside])
    rounding.alpha.data.copy_(truth["alpha"].view_as(rounding.alpha))
    soft = rounding(truth["W"])
    (soft * truth["G"]).sum().backward()
    assert close(soft, truth["w_soft"])
    assert close(rounding.alpha.grad, truth["grad_alpha"])
    assert close(rounding.quantized(truth["W"]).dequantize(), truth["w_hard"])
    for beta in (20, 8, 2):
        progress = max(0.2, 1 - 0.8 * (beta - 2) / 18)
        penalty = rounding.regularizer(progress)
        assert temperature(progress) == pytest.approx(beta)
        assert close(penalty, truth[f"reg_b{beta}"])
        assert close(torch.autograd.grad(penalty, rounding.alpha)[0], truth[f"reg_grad_b{beta}"])


def test_the_temperature_stays_and_then_falls_linearly():
    for step, beta in GOLDEN["ada_temp"].tolist():
        assert temperature(step / 20_000) == pytest.approx(beta, rel=1e-12)
    assert AdaRound(torch.randn(3, 4)).regularizer(0.1) is None


def test_a_run_follows_brecq():
    x, w = GOLDEN["ada_trace3.X"], GOLDEN["ada_trace3.W"]
    layer = nn.Linear(12, 10, bias=False).double()
    layer.weight.data.copy_(w)
    adaround_(
        layer,
        x,
        Grid(3, search="minmax"),
        blocks="whole",
        batch_size=48,
        iterations=120,
        lr=1e-3,
        options=LAST,
    )
    assert close(layer.weight, GOLDEN["ada_trace3.w_hard"])

    rounding = AdaRound(w, Grid(3, search="minmax"))
    optimizer = torch.optim.Adam(rounding.parameters(), lr=1e-3)
    losses = []
    for step in range(1, 121):
        loss = (x @ rounding(w).T - x @ w.T).square().sum(1).mean() + (rounding.regularizer(step / 120) or 0)
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    truth = GOLDEN["ada_trace3.loss_trace"]
    assert torch.allclose(torch.stack(losses[:10]), truth[:10], rtol=1e-9)
    assert torch.allclose(torch.stack(losses), truth, rtol=1e-6)
    assert torch.allclose(rounding.alpha.view(10, 12), GOLDEN["ada_trace3.alpha"], rtol=1e-6)


def test_adaquant_begins_as_round_to_nearest_and_learns_corrections_in_steps():
    w = torch.randn(4, 6, generator=torch.Generator().manual_seed(0))
    rounding = AdaQuant(w, Grid(4))
    assert torch.equal(rounding(w), RoundToNearest(w, Grid(4))(w))
    rounding(w).sum().backward()
    assert rounding.correction.grad.any()
    assert rounding.log_s1.grad.any()
    rounding.correction.data.fill_(1.0)
    units, (low, high) = rounding.units(w), rounding.limits
    inside = (units.round() >= low) & (units.round() < high)
    assert (rounding.hard(units) - rounding.nearest(units))[inside].unique().tolist() == [1]
    assert torch.equal(rounding.quantized(w).dequantize(), rounding(w))
