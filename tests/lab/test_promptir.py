"""PromptIR against the published network."""

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from weightsmith.core.errors import UsageError
from weightsmith.lab.models.promptir import (
    ChannelAttention,
    ChannelNorm,
    Downsample,
    GatedFeedForward,
    PromptGenerator,
    PromptIR,
    RestorationBlock,
    Upsample,
)

GOLDEN = load_file(Path(__file__).parents[1] / "golden/mir-l.safetensors")
SMALL = {
    "dim": 12, "num_blocks": (1, 1), "num_refinement": 1, "heads": (1, 2), "expansion": 2.0,
    "prompt_dims": (8,), "prompt_sizes": (8,), "prompt_length": 3,
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("blk.ln", lambda: ChannelNorm(8, "WithBias")),
        ("blk.mdta", lambda: ChannelAttention(8, 2, bias=False)),
        ("blk.gdfn", lambda: GatedFeedForward(8, 2.66, bias=False)),
        ("blk.block", lambda: RestorationBlock(8, 2, 2.66, bias=False, norm="WithBias")),
        ("blk.down", lambda: Downsample(8)),
        ("blk.up", lambda: Upsample(8)),
        ("prompt", lambda: PromptGenerator(6, 5, 4, 8)),
    ],
)
def test_parts_are_the_published_ones(name, make):
    part = make().double()
    part.load_state_dict({k.removeprefix(f"{name}.p."): v for k, v in GOLDEN.items() if k.startswith(f"{name}.p.")})
    torch.testing.assert_close(part(GOLDEN[f"{name}.x"]), GOLDEN[f"{name}.y"], rtol=1e-9, atol=1e-11)


def filled(model):
    """The rule by which the reference network's parameters are filled."""
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            fan = parameter[0].numel() if parameter.dim() > 1 else parameter.numel()
            base, amplitude = 0.0, 1 / math.sqrt(max(fan, 1))
            if "norm" in name and name.endswith("weight"):
                base, amplitude = 1.0, 0.1
            elif name.endswith("temperature"):
                base, amplitude = 1.0, 0.3
            elif name.endswith("prompt_param"):
                base, amplitude = 0.5, 0.5
            elif name.endswith("bias"):
                base, amplitude = 0.0, 0.1
            j = torch.arange(parameter.numel(), dtype=torch.float64)
            parameter.copy_((base + amplitude * torch.sin(0.7 * j + 1.3 * index)).reshape(parameter.shape))
    return model


def test_the_whole_network_is_the_published_one():
    model = filled(PromptIR(include_unused=True).double())
    assert sum(parameter.numel() for parameter in model.parameters()) == 35_592_263
    assert len(list(model.parameters())) == 548
    with torch.no_grad():
        torch.testing.assert_close(model(GOLDEN["net_full.x"]), GOLDEN["net_full.y"], rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("size", [(16, 24), (15, 9), (1, 1), (3, 40)])
@pytest.mark.parametrize("prompts", [True, False])
def test_images_of_any_size(size, prompts):
    model = PromptIR(**SMALL, prompts=prompts)
    assert model(torch.rand(2, 3, *size)).shape == (2, 3, *size)


@pytest.mark.parametrize("levels", [2, 3, 4])
@pytest.mark.parametrize("norm", ["WithBias", "BiasFree"])
def test_other_depths_and_norms_train(levels, norm):
    model = PromptIR(8, (1,) * levels, 1, (1, 2, 2, 4)[:levels], norm=norm, bias=True)
    model(torch.rand(1, 3, 16, 16)).square().mean().backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_channels_without_any_signal_give_zeros_and_no_nan():
    attention = ChannelAttention(8, 2, bias=False)
    assert torch.equal(attention(torch.zeros(1, 8, 4, 4)), torch.zeros(1, 8, 4, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: PromptIR(heads=(1, 2)), "num_blocks and heads"),
        (lambda: PromptIR(dim=10, heads=(3, 2, 4, 8)), "heads must divide"),
        (lambda: PromptIR(norm="layer"), "norm"),
        (lambda: PromptIR(**SMALL, include_unused=True), "include_unused"),
        (lambda: PromptIR(**SMALL)(torch.rand(1, 1, 8, 8)), "images must be RGB"),
    ],
)
def test_bad_use(call, message):
    with pytest.raises(UsageError, match=message):
        call()
