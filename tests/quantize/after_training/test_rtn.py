import json
from itertools import product
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.quantize import Grid, quantized_weights, round_to_nearest_
from weightsmith.quantize.after_training.rtn import RoundToNearest

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "flexround.safetensors")
GRIDS = {
    "asym4_pc": Grid(4, search="minmax"),
    "asym4_pc_clip": Grid(4),
    "asym3_pt_clip": Grid(3, granularity="tensor"),
    "sym4_pc": Grid(4, symmetric=True, search="minmax"),
    "asym8_pt": Grid(8, granularity="tensor"),
    "asym4_pc_pos": Grid(4),
}


@pytest.mark.parametrize("tag", GRIDS)
def test_step_zero_point_and_rounding_are_those_of_the_authors(tag):
    w = GOLDEN[f"{tag}.W"]
    rounding = RoundToNearest(w, GRIDS[tag])
    assert torch.allclose(rounding.scale.flatten(), GOLDEN[f"{tag}.scale0"].flatten(), rtol=1e-9, atol=1e-12)
    assert torch.equal(rounding.zero_point.flatten(), GOLDEN[f"{tag}.zero_point"].flatten())
    assert torch.allclose(rounding(w), GOLDEN[f"{tag}.w_hat_init"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("tag", "grid"),
    [("ada4_pc", Grid(4, search="minmax")), ("ada3_pt_mse", Grid(3, granularity="tensor", search="shrink"))],
)
def test_the_shrinking_search_is_that_of_brecq(tag, grid):
    w = GOLDEN[f"{tag}.W"]
    rounding = RoundToNearest(w, grid)
    assert torch.allclose(rounding.scale.flatten(), GOLDEN[f"{tag}.scale"], rtol=1e-9, atol=1e-12)
    assert torch.allclose(rounding(w), GOLDEN[f"{tag}.rtn"], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("bits", "seed"), list(product([2, 3, 4], range(3))))
def test_the_pruned_search_finds_what_trying_everything_finds(bits, seed):
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(3, 20, generator=generator, dtype=torch.float64).exp() - 0.8  # skewed, and of both signs
    found = RoundToNearest(w, Grid(bits))
    levels, full = 2**bits - 1, w.amax(1).clamp_min(0) - w.amin(1).clamp_max(0)
    for row in range(3):
        best = min(
            (step * ((w[row] / step).round().clamp(-zero, levels - zero)) - w[row]).abs().pow(2.4).mean().item()
            for step in (full[row] * i / 100 / levels for i in range(1, 101))
            for zero in range(levels + 1)
        )
        error = (found(w)[row] - w[row]).abs().pow(2.4).mean().item()
        assert error == pytest.approx(best, rel=1e-9)


def test_the_symmetric_search_lowers_the_error():
    w = torch.randn(4, 500, generator=torch.Generator().manual_seed(0))
    errors = [
        (RoundToNearest(w, Grid(3, symmetric=True, search=search))(w) - w).abs().pow(2.4).mean().item()
        for search in ("search", "shrink", "minmax")
    ]
    assert errors[0] <= errors[1] * 1.01
    assert errors[0] < errors[2]


def test_a_narrow_symmetric_grid_reaches_the_largest_weight():
    w = torch.tensor([[0.3, -0.7, 1.0]])
    assert RoundToNearest(w, Grid(3, symmetric=True, narrow=True, search="minmax"))(w).max() == 1.0
    assert RoundToNearest(w, Grid(3, symmetric=True, search="minmax"))(w).max() < 0.9


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("search", ["minmax", "shrink", "search"])
def test_rows_of_zeros_stay_zero_and_constant_rows_are_exact(symmetric, search):
    w = torch.tensor([[0.0] * 4, [0.6] * 4, [-0.2, 0.4, 0.1, 0.0]])
    rounding = RoundToNearest(w, Grid(4, symmetric=symmetric, search=search))
    assert rounding(w).isfinite().all()
    assert torch.equal(rounding(w)[0], torch.zeros(4))
    if not symmetric:
        assert torch.allclose(rounding(w)[1], w[1])


def test_halves_go_to_the_even_code():
    w = torch.tensor([[0.5, 1.5, 2.5, 15.0, 0.0]])
    assert RoundToNearest(w, Grid(4, search="minmax"))(w).tolist() == [[0.0, 2.0, 2.0, 15.0, 0.0]]


def test_half_precision_weights_are_rounded_in_float32_and_stay_what_they_are():
    w = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)).bfloat16()
    rounding = RoundToNearest(w, Grid(4))
    assert rounding.scale.dtype == torch.float32
    assert rounding(w).dtype == torch.bfloat16


def test_weights_need_not_be_contiguous():
    w = torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    assert torch.equal(RoundToNearest(w.T, Grid(4))(w.T), RoundToNearest(w.T.contiguous(), Grid(4))(w.T.contiguous()))
    assert torch.equal(RoundToNearest(w, Grid(4), axis=1)(w), RoundToNearest(w.T, Grid(4))(w.T).T)


def test_without_calibration_every_layer_is_rounded_and_reported():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ConvTranspose2d(8, 6, 2, groups=2), nn.Conv2d(6, 6, 3, groups=6))
    keys = list(model.state_dict())
    finished = []
    report = round_to_nearest_(
        model, grid=Grid(4), overrides={"0": Grid(8)}, on_block=lambda name, found, block: finished.append(name)
    )
    assert list(model.state_dict()) == keys
    assert finished == ["0", "1", "2"]
    assert [layer.bits for layer in report.layers] == [8, 4, 4]
    assert [len(q.scale) for q in quantized_weights(model).values()] == [8, 3, 6]
    assert report.bytes_after < report.bytes_before / 3
    assert all(0 < layer.weight_error < 0.05 and layer.moved == 0 for layer in report.layers)


def test_the_report_holds_the_model_and_its_facts_are_json_without_it():
    model = nn.Sequential(nn.Linear(4, 4))
    report = round_to_nearest_(model, None, Grid(3))
    assert report.model is model
    facts = report.facts()
    assert "model" not in facts
    assert json.loads(json.dumps(facts))["blocks"][0]["layers"][0]["name"] == "0.weight"


@pytest.mark.filterwarnings("ignore:Initializing zero-element")
def test_weights_without_elements_are_passed_by():
    model = nn.ModuleList([nn.Linear(4, 4), nn.Linear(0, 3), nn.Linear(4, 0)])
    assert [layer.name for layer in round_to_nearest_(model).layers] == ["0.weight"]
    with pytest.raises(UsageError, match="nothing to round"):
        round_to_nearest_(model, where="1")
