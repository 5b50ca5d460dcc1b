"""Numbers of the authors' layers (col, row), of PEFT 0.21.2 (miss, bat, training) and of plain loops (the rest)."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from weightsmith.adapt import BoneConfig, apply_bone_, bone_delta, bone_linear, merge_bone_

NUMBERS = load_file(Path(__file__).parents[1] / "golden" / "bone.safetensors")
EXACT = {"rtol": 0, "atol": 1e-10}
LINEAR = {"col": "col", "row": "row", "bat": "col", "miss": "miss", "miss_nondiv": "miss", "miss_mini": "mini"}
either = pytest.mark.parametrize("fused", [True, False], ids=["fused", "plain"])


def golden(group):
    return {key.split("/")[1]: tensor for key, tensor in NUMBERS.items() if key.startswith(f"{group}/")}


def block_of(numbers):
    return numbers["B"] if "B" in numbers else numbers["D"]


@either
@pytest.mark.parametrize("group", LINEAR)
def test_outputs_and_gradients_are_those_of_the_reference(group, fused):
    numbers = golden(group)
    x, block = numbers["x"].clone().requires_grad_(), block_of(numbers).clone().requires_grad_()
    y = bone_linear(x, numbers["W"], numbers.get("b"), block, LINEAR[group], fused=fused)
    y.backward(numbers["dy"])
    assert torch.allclose(y, numbers["y"], **EXACT)
    assert torch.allclose(x.grad, numbers["dx"], **EXACT)
    assert torch.allclose(block.grad, numbers["dB" if "dB" in numbers else "dD"], **EXACT)


@pytest.mark.parametrize("group", ["bat", "miss", "miss_nondiv", "miss_mini"])
def test_merged_weights_are_those_of_the_reference(group):
    numbers = golden(group)
    model = nn.Linear(*reversed(numbers["W"].shape), dtype=torch.float64)
    model.weight.data = numbers["W"].clone()
    variant, block = LINEAR[group], block_of(numbers)
    mini_r = block.shape[1] if variant == "mini" else None
    apply_bone_(model, BoneConfig(r=8, variant=variant, mini_r=mini_r))
    model.bone["default"].data = block
    assert torch.allclose(merge_bone_(model).weight, numbers["W_merged"], **EXACT)


@pytest.mark.parametrize(("group", "variant"), [("free", "free"), ("conv", "miss"), ("embedding", "miss")])
def test_updates_are_those_of_plain_loops(group, variant):
    numbers = golden(group)
    assert torch.allclose(bone_delta(numbers["W"], block_of(numbers), variant), numbers["delta"], **EXACT)


def test_a_convolution_computes_what_plain_loops_do():
    numbers = golden("conv")
    conv = nn.Conv2d(10, 6, 3, int(numbers["stride"]), int(numbers["padding"]), bias=False, dtype=torch.float64)
    conv.weight.data = numbers["W"].clone()
    apply_bone_(conv, BoneConfig(r=4, where=""))
    conv.bone["default"].data = numbers["D"]
    assert torch.allclose(conv(numbers["x"]), numbers["y"], **EXACT)


def test_an_embedding_computes_what_plain_loops_do():
    numbers = golden("embedding")
    embedding = nn.Embedding(11, 10, _weight=numbers["W"].clone())
    apply_bone_(embedding, BoneConfig(r=4, where=""))
    embedding.bone["default"].data = numbers["D"]
    assert torch.allclose(embedding(numbers["idx"]), numbers["y"], **EXACT)


@pytest.mark.parametrize(("group", "variant"), [("train_miss", "miss"), ("train_bat", "col")])
def test_five_steps_of_adamw_end_where_the_reference_does(group, variant):
    numbers = golden(group)
    model = nn.Linear(16, 12, bias=False, dtype=torch.float64)
    model.weight.data = numbers["W"].clone()
    apply_bone_(model, BoneConfig(r=4, variant=variant))
    block = model.bone["default"]
    optimizer = torch.optim.AdamW([block], lr=1e-2, weight_decay=0.0)
    for loss, after in zip(numbers["losses"], numbers["D_steps"], strict=True):
        optimizer.zero_grad()
        found = nn.functional.mse_loss(model(numbers["x"]), numbers["target"])
        found.backward()
        optimizer.step()
        assert found.item() == pytest.approx(loss.item(), abs=1e-10)
        assert torch.allclose(block, after, **EXACT)
