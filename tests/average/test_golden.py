"""Numbers computed by naive float64 loops from the definitions, on adapters of a real Trainer and PEFT run."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from runs import lora_delta, write_adapter, write_model, write_state
from safetensors.torch import load_file

from weightsmith.average import (
    average_state_dicts,
    checkpoint_losses,
    find_checkpoints,
    merge_checkpoints,
    metric_weights,
    weigh_checkpoints,
)

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "mwa.json").read_text())
TENSORS = load_file(GOLDEN / "mwa.safetensors")
STEPS = CASES["checkpoint_steps"]
MERGES = {case["tag"]: case for case in CASES["merges"]}


def under(prefix):
    return {name.removeprefix(prefix): tensor for name, tensor in TENSORS.items() if name.startswith(prefix)}


@pytest.fixture
def run_of(tmp_path):
    def build(dtype=torch.float32):
        for step in STEPS:
            tensors = {name: tensor.to(dtype) for name, tensor in under(f"ckpt/{step}/").items()}
            write_adapter(tmp_path / "run" / f"checkpoint-{step}", tensors, CASES["adapter_config"])
            write_state(tmp_path / "run" / f"checkpoint-{step}", **CASES["trainer_state"])
        return tmp_path / "run"

    return build


@pytest.mark.parametrize("case", CASES["weights"], ids=lambda case: case["name"])
def test_weights_equal_the_recorded_ones(case):
    found = metric_weights(case["values"], case["metric"], case["scheme"], case["penalty_factor"])
    np.testing.assert_allclose(found, case["expected"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES["ema"], ids=lambda case: str(case["beta"]))
def test_exponential_weights_equal_the_recorded_ones(case):
    found = metric_weights(range(case["n"]), "steps", "ema", case["beta"])
    np.testing.assert_allclose(found, case["expected"], rtol=0, atol=1e-12)


@pytest.mark.parametrize("source", ["since_previous", "last", "eval"])
def test_losses_of_a_real_log_equal_the_recorded_ones(run_of, source):
    found = checkpoint_losses(find_checkpoints(run_of()), source)
    np.testing.assert_allclose(found, CASES["expected_losses"][source], rtol=0, atol=1e-12)


def test_the_final_entry_of_a_finished_run_is_no_loss(run_of):
    run = run_of()
    state = CASES["trainer_state"]
    history = [*state["log_history"], CASES["trainer_state_final_entry"]]
    write_state(run / "checkpoint-20", **{**state, "log_history": history})
    for source in ("since_previous", "last"):
        assert checkpoint_losses(find_checkpoints(run), source) == pytest.approx(CASES["expected_losses"][source])


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.float64, 1e-12)])
@pytest.mark.parametrize("tag", MERGES)
@pytest.mark.parametrize("mode", ["factors", "svd", "cat"])
@pytest.mark.filterwarnings("ignore:averaging factors loses")
def test_merged_adapters_equal_the_recorded_ones(run_of, tmp_path, tag, mode, dtype, tolerance):
    case, run = MERGES[tag], run_of(dtype)
    options = {
        "metric": case["metric"],
        "source": case["loss_source"],
        "scheme": case["scheme"],
        "penalty": case["penalty_factor"],
    }
    shares = [share.weight for share in weigh_checkpoints(run, **options)]
    np.testing.assert_allclose(shares, case["weights"], rtol=0, atol=1e-12)
    report = merge_checkpoints(run, tmp_path / "out", lora_mode=mode, **options)
    merged = load_file(tmp_path / "out" / "adapter_model.safetensors")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())

    def close(found, expected):
        assert (found.double() - expected).norm() <= tolerance * expected.norm()

    if mode == "factors":
        for name, expected in under(f"merge/{tag}/factors/").items():
            close(merged[name], expected)
    kind = {"factors": "factors_delta", "svd": "svd_delta", "cat": "delta"}[mode]
    deltas = under(f"merge/{tag}/{kind}/")
    assert deltas
    for module, expected in deltas.items():
        close(lora_delta(merged, config, module), expected)
        exact = TENSORS[f"merge/{tag}/delta/{module}"]
        lost = float((exact - expected).norm() / exact.norm())
        reported = {"factors": report.gaps, "svd": report.discarded, "cat": {}}[mode]
        if reported:
            assert reported[module.removeprefix("base_model.model.")] == pytest.approx(lost, abs=10 * tolerance)


def test_a_recorded_full_merge_is_met_to_the_last_rounding(tmp_path):
    for index in range(3):
        write_model(tmp_path / "run" / f"checkpoint-{index + 1}", under(f"full/{index}/"))
    merge_checkpoints(
        [tmp_path / "run" / f"checkpoint-{i}" for i in (1, 2, 3)], tmp_path / "out", weights=CASES["full_weights"]
    )
    merged = load_file(tmp_path / "out" / "model.safetensors")
    in_memory = average_state_dicts([under(f"full/{i}/") for i in range(3)], CASES["full_weights"])
    for name, expected in under("full/expected/").items():
        assert merged[name].dtype == expected.dtype
        assert torch.equal(merged[name], in_memory[name])
        if expected.is_floating_point():
            spacing = torch.nextafter(expected.abs(), torch.full_like(expected, torch.inf)) - expected.abs()
            assert ((merged[name] - expected).abs() <= spacing).all()
        else:
            assert torch.equal(merged[name], expected)
