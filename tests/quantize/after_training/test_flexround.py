import copy
import io
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

import weightsmith as ws
from weightsmith.core.errors import UsageError
from weightsmith.core.rounding import round_ste
from weightsmith.quantize import LRQ, FlexRound, Grid, LearningOptions, flexround_
from weightsmith.quantize.after_training.rtn import RoundToNearest

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "flexround.safetensors")
LAST = LearningOptions(keep_best=False)
GRIDS = {
    "asym4_pc": Grid(4, search="minmax"),
    "asym4_pc_clip": Grid(4),
    "asym3_pt_clip": Grid(3, granularity="tensor"),
    "sym4_pc": Grid(4, symmetric=True, search="minmax"),
    "asym8_pt": Grid(8, granularity="tensor"),
    "asym4_pc_pos": Grid(4),
    "conv4_pc": Grid(4, search="minmax"),
    "conv3_pt": Grid(3, granularity="tensor", search="minmax"),
}
NAMES = ("s1", "S2", "s3", "s4")


def close(left, right):
    return torch.allclose(left.flatten(), right.flatten(), rtol=1e-9, atol=1e-12)


def golden(tag):
    return {key.removeprefix(f"{tag}."): value for key, value in GOLDEN.items() if key.startswith(f"{tag}.")}


def noisy(grid, shape=(6, 8), seed=0, **options):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=generator, dtype=torch.float64)
    rounding = FlexRound(w, grid, **options)
    with torch.no_grad():
        for parameter in rounding.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return w, rounding


@pytest.mark.parametrize("parametrization", ["log", "direct"])
@pytest.mark.parametrize("tag", GRIDS)
def test_values_codes_and_gradients_are_those_of_the_authors(tag, parametrization):
    truth, direct = golden(tag), parametrization == "direct"
    if direct and "grad_S2" not in truth:
        return
    rounding = FlexRound(truth["W"], GRIDS[tag], parametrization=parametrization)
    rounding.scale.copy_(truth["scale0"].view_as(rounding.scale))
    rounding.zero_point.copy_(truth["zero_point"].view_as(rounding.scale))
    present = [name for name in NAMES if f"log_{name}" in truth]
    for name in present:
        parameter = getattr(rounding, name if direct else f"log_{name}")
        log = truth[f"log_{name}"].view_as(parameter) - (rounding.scale.log() if name == "s1" else 0)
        parameter.data.copy_(log.exp() if direct else log)
    w_hat = rounding(truth["W"])
    (w_hat * truth["G"]).sum().backward()
    assert close(w_hat, truth["w_hat"])
    assert torch.equal(rounding.hard(rounding.units(truth["W"])).flatten().short(), truth["q_int"].flatten())
    for name in present:
        grad = getattr(rounding, name if direct else f"log_{name}").grad.flatten()
        wanted = truth[f"grad_{name}" if direct else f"grad_log_{name}"].flatten()
        # the step is learned relative to its initial value
        assert close(grad, wanted * rounding.scale.flatten() if direct and name == "s1" else wanted)


def test_a_run_follows_the_authors_code_step_by_step():
    truth = golden("trace3_pc")
    rounding = FlexRound(truth["W"], Grid(3, search="minmax"))
    optimizer = torch.optim.Adam(rounding.parameters(), lr=3e-3)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 60)
    x, bias = truth["X"], truth["bias"]
    losses = []
    for _ in range(61):
        loss = ((x @ rounding(truth["W"]).T + bias) - (x @ truth["W"].T + bias)).square().sum(1).mean()
        losses.append(loss.detach())
        optimizer.zero_grad()
        loss.backward()
        if len(losses) <= 60:
            optimizer.step()
            scheduler.step()
    assert torch.allclose(torch.stack(losses[:10]), truth["loss_trace"][:10], rtol=1e-9)
    assert torch.allclose(torch.stack(losses), truth["loss_trace"], rtol=1e-6)
    assert torch.allclose((rounding.scale.log() + rounding.log_s1).flatten(), truth["log_s1"], rtol=1e-6)
    assert torch.allclose(rounding.log_S2.view(12, 16), truth["log_S2"], rtol=1e-6, atol=1e-9)
    assert torch.allclose(rounding(truth["W"]), truth["w_hat"], rtol=1e-6)


def test_the_verb_makes_the_same_run():
    truth = golden("trace3_pc")
    layer = nn.Linear(16, 12).double()
    layer.load_state_dict({"weight": truth["W"], "bias": truth["bias"]})
    grid = Grid(3, search="minmax")
    report = flexround_(
        layer,
        truth["X"],
        grid,
        blocks="whole",
        batch_size=4,
        iterations=60,
        lr=3e-3,
        options=LAST,
    )
    assert torch.allclose(layer.weight, truth["w_hat"], rtol=1e-6)
    assert report.blocks[0].kept == "iteration 60"


def test_low_rank_values_and_gradients_are_those_of_the_authors():
    truth = golden("lrq4")
    rounding = LRQ(truth["W"], Grid(4), rank=3)
    rounding.scale.copy_(truth["log_s1"].exp().view_as(rounding.scale))
    rounding.zero_point.copy_(truth["zero_point"].view_as(rounding.scale))
    names = {"L": "log_left", "U": "log_right", "r2": "log_s3", "c2": "log_column"}
    for key, name in names.items():
        getattr(rounding, name).data.copy_(truth[key].view_as(getattr(rounding, name)))
    w_hat = rounding(truth["W"])
    (w_hat * truth["G"]).sum().backward()
    assert close(w_hat, truth["w_hat"])
    for key, name in {**names, "log_s1": "log_s1"}.items():
        assert close(getattr(rounding, name).grad, truth[f"grad_{key}"])


@pytest.mark.parametrize("granularity", ["tensor", "channel", 4])
@pytest.mark.parametrize("shape", [(6, 8), (6, 4, 3, 3)])
@pytest.mark.parametrize("symmetric", [False, True])
def test_the_fused_gradient_is_that_of_plain_operations(shape, granularity, symmetric):
    if len(shape) > 2 and granularity == 4:
        return
    w, rounding = noisy(Grid(3, symmetric=symmetric, granularity=granularity), shape)
    upstream = torch.randn(shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    fused = torch.autograd.grad((rounding(w) * upstream).sum(), list(rounding.parameters()))
    logs = [part for part in (rounding.log_s1, *rounding.log_factors()) if part is not None]
    codes = round_ste(rounding.units(w) / sum(logs).exp()).clamp(*rounding.limits)
    plain = rounding.join(rounding.step * codes, w)
    assert torch.allclose(plain, rounding(w), rtol=1e-12)
    for left, right in zip(
        fused, torch.autograd.grad((plain * upstream).sum(), list(rounding.parameters())), strict=True
    ):
        assert torch.allclose(left, right, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "grid", [Grid(4), Grid(3, granularity="tensor"), Grid(2, symmetric=True), Grid(4, granularity=4)]
)
def test_it_begins_as_exactly_round_to_nearest(grid, dtype):
    w = torch.randn(16, 32, generator=torch.Generator().manual_seed(2)).to(dtype)
    nearest = RoundToNearest(w, grid)(w)
    for rounding in (FlexRound(w, grid), FlexRound(w, grid, parametrization="direct"), LRQ(w, grid, rank=2)):
        assert torch.equal(rounding(w), nearest)
        assert torch.equal(rounding.quantized(w).dequantize(dtype), nearest)


@pytest.mark.parametrize("shape", [(6, 8), (6, 4, 3, 3)])
def test_what_it_decides_on_is_what_it_was_optimized_with(shape):
    w, rounding = noisy(Grid(3), shape)
    assert torch.equal(rounding.quantized(w).dequantize(), rounding(w))


def test_zero_weights_and_zero_rows_have_no_gradient():
    w = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    w[1] = 0
    w[0, 2] = 0
    rounding = FlexRound(w, Grid(4))
    rounding(w).square().sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in rounding.parameters())
    grad = rounding.log_S2.grad.view(3, 5)
    assert not grad[1].any()
    assert grad[0, 2] == 0
    assert rounding.log_s3.grad[1] == 0


def test_ablations_leave_their_factors_out():
    w = torch.randn(6, 4, 3, 3)
    kept = dict(FlexRound(w, learn_s1=False, use_s3=False, use_s4=False).named_parameters())
    assert list(kept) == ["log_S2"]
    depthwise = dict(FlexRound(torch.randn(6, 1, 3, 3)).named_parameters())
    assert "log_s4" not in depthwise
    assert FlexRound(torch.randn(4, 6, 2, 2), axis=1).log_s4.numel() == 4
    assert FlexRound(torch.randn(4, 6, 2, 2), axis=1).log_s3.numel() == 6


def test_direct_factors_stay_positive_and_safe_ones_stay_small():
    direct = FlexRound(torch.randn(3, 4), parametrization="direct")
    direct.S2.data.fill_(-1)
    direct.project_()
    assert (direct.S2 > 0).all()
    safe = FlexRound(torch.randn(3, 4), safe=True)
    safe.log_S2.data.fill_(5)
    safe.log_s3.data.fill_(1)
    safe.project_()
    assert safe.strain() == pytest.approx(4)
    both = FlexRound(torch.randn(3, 4), safe=True, parametrization="direct")
    both.S2.data.fill_(1e3)
    both.s3.data.fill_(2)
    both.project_()
    assert both.strain() == pytest.approx(4, abs=1e-5)


@pytest.mark.parametrize(
    "options", [{"parametrization": "direct"}, {"learn_s1": False}, {"use_s3": False}, {"safe": True}], ids=str
)
def test_options_that_low_rank_factors_do_not_have_are_refused_not_ignored(options):
    model = nn.Sequential(nn.Linear(8, 8))
    before = model[0].weight.clone()
    with pytest.raises(UsageError, match="lrq=2"):
        flexround_(model, torch.randn(8, 8), blocks="layers", iterations=1, lrq=2, **options)
    assert torch.equal(model[0].weight, before)


def test_it_is_a_parametrization_that_folds_saves_and_compiles():
    layer = nn.Linear(8, 4)
    w = layer.weight.detach().clone()
    parametrize.register_parametrization(layer, "weight", FlexRound(w, Grid(3)))
    rounding = layer.parametrizations.weight[0]
    rounding.log_S2.data.normal_(std=0.1)
    x = torch.randn(2, 8)
    expected = layer(x)
    assert torch.allclose(torch.compile(layer, backend="aot_eager", fullgraph=True)(x), expected)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer.weight.dtype == torch.float32
    buffer = io.BytesIO()
    torch.save(rounding.state_dict(), buffer)
    other = FlexRound(torch.randn(4, 8), Grid(3))
    other.load_state_dict(torch.load(io.BytesIO(buffer.getvalue())))
    assert torch.equal(other(w), layer.weight)
    assert torch.equal(copy.deepcopy(rounding)(w), layer.weight)
    assert torch.equal(ws.fold_(layer)(x), expected)


def test_an_unknown_parametrization_and_a_useless_rank_are_refused():
    with pytest.raises(UsageError, match="parametrization 'exp'"):
        FlexRound(torch.randn(3, 4), parametrization="exp")
    with pytest.raises(UsageError, match="rank=2 saves nothing"):
        LRQ(torch.randn(3, 4), rank=2)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(6, 8), (6, 4, 3, 3)])
def test_compiled_passes_give_the_same_weight_and_gradients(shape):
    w, rounding = noisy(Grid(3), shape)
    found = []
    for rounding.compiled in (False, True):
        w_hat = rounding(w)
        found.append([w_hat, *torch.autograd.grad(w_hat.square().sum(), list(rounding.parameters()))])
    assert all(torch.allclose(left, right, rtol=1e-9, atol=1e-12) for left, right in zip(*found, strict=True))
