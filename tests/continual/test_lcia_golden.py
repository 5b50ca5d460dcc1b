"""The average and the router against the authors' own functions."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from weightsmith.continual import DynamicEMA, InstructionRouter

FOLDER = Path(__file__).parents[1] / "golden"
GOLDEN = load_file(FOLDER / "lcia.safetensors")
ROUTING = json.loads((FOLDER / "lcia-routing.json").read_text())
TENSORS = {"small": ["lora_A", "lora_B"], "mixed": ["w", "bias"], "repeat": ["w"]}
SETTINGS = {
    "official": {"init": "after_first_step"},
    "next": {"init": "after_first_step", "kappa": 0.01, "fallback_beta": 0.999},
    "eq45": {"mode": "paper"},
}


def replay(case, kind, dtype):
    """Walk the stored parameters and gradients; averages and weights of every step."""
    names = TENSORS[case]
    held = {name: {k: GOLDEN[f"{case}.{name}.{k}"].to(dtype) for k in ("theta0", "theta", "grad")} for name in names}
    live = {name: nn.Parameter(held[name]["theta0"].clone()) for name in names}
    frozen = nn.Parameter(torch.ones(3, dtype=dtype), requires_grad=False)
    ema = DynamicEMA([*live.items(), ("frozen", frozen)], **SETTINGS[kind])
    averages, weights = [], []
    for step in range(len(held[names[0]]["theta"])):
        for name, parameter in live.items():
            parameter.data.copy_(held[name]["theta"][step])
            parameter.grad = held[name]["grad"][step].clone()
        ema.step()
        averages.append({name: tensor.clone() for name, tensor in ema.average.items()})
        weights.append(ema.last_alpha)
    ema.copy_to_model()
    return averages, weights, live


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(
    ("case", "kind"),
    [(case, kind) for case in TENSORS for kind in SETTINGS if f"{case}.w.ema_{kind}" in GOLDEN or case == "small"],
)
def test_the_average_at_every_step(case, kind, dtype):
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    averages, weights, live = replay(case, kind, dtype)
    for at, name in enumerate(TENSORS[case]):
        found = torch.stack([step[name] for step in averages])
        torch.testing.assert_close(found, GOLDEN[f"{case}.{name}.ema_{kind}"].to(dtype), rtol=tolerance, atol=tolerance)
        alphas = torch.tensor([step[name] for step in weights], dtype=torch.float64)[1:]
        if kind == "eq45":
            expected = 1 - GOLDEN[f"{case}.beta_eq45"][1:, at]
        else:
            raw = GOLDEN[f"{case}.alpha_raw_{kind}"][1:, at]
            expected = torch.where((raw > 0) & (raw < 1), raw, 0.01 if kind == "official" else 0.001)
        torch.testing.assert_close(alphas, expected, rtol=tolerance, atol=tolerance)
        if kind == "official":
            final = GOLDEN[f"{case}.{name}.final_official"].to(dtype)
            torch.testing.assert_close(live[name].data, final, rtol=tolerance, atol=tolerance)


def test_a_frozen_tensor_keeps_its_live_values():
    live = GOLDEN["mixed.frozen.theta"][-1]
    frozen = nn.Parameter(live.clone(), requires_grad=False)
    ema = DynamicEMA([("w", nn.Parameter(GOLDEN["mixed.w.theta0"].clone())), ("frozen", frozen)], "fixed")
    ema.step()
    ema.copy_to_model()
    assert "frozen" not in ema.average
    assert torch.equal(frozen, GOLDEN["mixed.frozen.final_official"])


@pytest.mark.parametrize("stream", ["origin", "multi"])
def test_the_groups_of_a_stream(stream):
    golden = ROUTING[stream]
    router = InstructionRouter("tfidf", golden["threshold"])
    for entry in golden["train"]:
        found = router.assign(entry["instructions"])
        assert found.all_similarities == pytest.approx(entry["mean_similarity_per_group"], abs=1e-9)
        assert (found.group, found.is_new) == (entry["group"], entry["new_group"])
        router.commit(found, entry["instructions"])
        book = {str(at): sorted(group) for at, group in enumerate(router.groups, 1)}
        assert book == entry["codebook_after"]
    for entry in golden["test"]:
        found = router.assign(entry["instructions"], train=False)
        assert found.all_similarities == pytest.approx(entry["mean_similarity_per_group"], abs=1e-9)
        assert found.group == entry["group"]


@pytest.mark.parametrize("stream", ["origin", "multi"])
def test_the_default_threshold_is_the_one_of_the_stream(stream):
    router = InstructionRouter("tfidf")
    for entry in ROUTING[stream]["train"]:
        found = router.assign(entry["instructions"])
        assert (found.group, found.is_new) == (entry["group"], entry["new_group"])
        router.commit(found, entry["instructions"])
