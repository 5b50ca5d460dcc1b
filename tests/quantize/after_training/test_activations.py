import copy
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.quantize import Activations, Grid, LearningOptions, flexround_, quantize_activations_
from weightsmith.quantize.after_training.activations import DynamicActivation, StaticActivation

GOLDEN = load_file(Path(__file__).parents[2] / "golden" / "flexround.safetensors")


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4))


@pytest.mark.parametrize("zero_in_range", [True, False])
def test_dynamic_quantization_is_that_of_the_authors(zero_in_range):
    quantized = DynamicActivation(8, zero_in_range=zero_in_range)(GOLDEN["tok8.x"])
    assert torch.allclose(quantized, GOLDEN["tok8.y"], rtol=1e-9, atol=1e-12)


def test_tokens_of_one_sign_saturate_only_in_the_authors_version():
    x = torch.linspace(5, 6, 16)[None]
    assert (DynamicActivation(8)(x) - x).abs().max() < 6 / 255
    assert (DynamicActivation(8, zero_in_range=False)(x) - x).abs().max() > 4


def test_static_quantization_learns_a_step_that_stays_positive():
    x = draw(64, 8)
    quantizer = StaticActivation(x, 4)
    assert (quantizer(x) - x).square().mean() < 0.02
    assert quantizer(x).unique().numel() <= 16
    (quantizer(x) - x).square().sum().backward()
    assert quantizer.scale.grad.isfinite()
    quantizer.scale.data.fill_(-0.3)
    assert quantizer(x).detach().unique().diff().min().item() == pytest.approx(0.3, rel=1e-5)
    assert quantizer(x.bfloat16()).dtype == torch.bfloat16


def test_dropping_keeps_some_elements_in_training_and_none_afterwards():
    x = draw(100, 8)
    quantizer = StaticActivation(x, 2, drop=0.5, generator=torch.Generator().manual_seed(0))
    kept = (quantizer(x) == x).float().mean()
    assert 0.4 < kept < 0.6
    assert torch.equal(quantizer.eval()(x), copy.deepcopy(quantizer)(x))
    assert (quantizer(x) == x).float().mean() < 0.01


def test_dynamic_activations_need_no_data_and_leave_the_state_dict_alone():
    model, x = net(), draw(5, 8)
    before, keys = model(x), list(model.state_dict())
    assert quantize_activations_(model, bits=8) is model
    assert list(model.state_dict()) == keys
    assert not torch.equal(model(x), before)
    assert torch.allclose(model(x), before, atol=0.05)
    assert torch.equal(copy.deepcopy(model)(x), model(x))


def test_static_activations_take_their_step_from_the_first_batch_and_are_saved():
    model, x = net().train(), draw(40, 8)
    quantize_activations_(model, x, bits=6, mode="static", where="2")
    assert model.training
    assert [key for key in model.state_dict() if "quantizer" in key] == [
        "2.input_quantizer.scale",
        "2.input_quantizer.zero_point",
    ]
    quantize_activations_(model, x, bits=6, mode="static", where="2")  # replaces, does not stack
    assert len(model[2]._forward_pre_hooks) == 1


def test_keys_and_values_can_be_quantized_too():
    model = nn.ModuleDict({"q_proj": nn.Linear(8, 8), "k_proj": nn.Linear(8, 8)})
    x = draw(3, 8)
    before = model["k_proj"](x)
    quantize_activations_(model, bits=8, where="q_proj", kv_bits=4)
    assert (model["k_proj"](x) - before).abs().max() > 0.001
    assert len(model["k_proj"](x)[0].unique()) <= 8


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "bits must be"),
        ({"kv_bits": 1}, "bits must be"),
        ({"mode": "slow"}, "mode 'slow'"),
        ({"mode": "static"}, "calibration is needed"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    model = nn.Sequential(net(), nn.ModuleDict({"k_proj": nn.Linear(8, 8)}))
    with pytest.raises(UsageError, match=message):
        quantize_activations_(model, **options)
    assert not any(hasattr(module, "input_quantizer") for module in model.modules())


class Experts(nn.Module):
    """Calls layers by keyword, and one only for samples that are positive."""

    def __init__(self):
        super().__init__()
        self.first, self.rare, self.never = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x):
        y = self.first(input=x)
        return torch.cat([y, self.rare(input=y[x[:, 0] > 0])])


def test_layers_called_by_keyword_or_first_by_a_later_batch_are_quantized_and_others_told_of():
    model, x = Experts(), draw(64, 8)
    x[:, 0] = -1
    x[40, 0] = 1
    with pytest.warns(WeightsmithWarning, match="the input of never stays in floating point: no calibration batch"):
        quantize_activations_(model, x, mode="static")
    assert [name for name, module in model.named_modules() if hasattr(module, "input_quantizer")] == ["first", "rare"]
    assert len(model(x[:8])) == 8  # no token for the expert


def test_learned_activations_begin_at_the_first_batch_that_reaches_a_layer():
    model, x = Experts(), draw(64, 8)
    x[:, 0] = -1
    x[40, 0] = 1
    options = LearningOptions(activations=Activations(bits=4))
    flexround_(model, x, Grid(4), blocks="whole", where=["first", "rare"], iterations=2, options=options)
    assert hasattr(model.rare, "input_quantizer")


def test_a_projection_that_attention_does_not_call_is_told_of():
    layer = nn.TransformerEncoderLayer(8, 2, 16)
    with pytest.warns(WeightsmithWarning, match=r"self_attn.out_proj stays in floating point"):
        quantize_activations_(layer)
    assert hasattr(layer.linear1, "input_quantizer")
    assert not hasattr(layer.self_attn.out_proj, "input_quantizer")
    with pytest.raises(UsageError, match="does not call"):
        quantize_activations_(layer, where="self_attn.out_proj")


def test_outputs_of_keys_are_quantized_once_however_often_asked_for():
    model = nn.ModuleDict({"k_proj": nn.Linear(8, 8)})
    for _ in range(2):
        quantize_activations_(model, kv_bits=4)
    assert len(model["k_proj"]._forward_hooks) == 1


def test_weights_and_activations_are_learned_together_with_random_dropping():
    reports, scales = [], []
    for _ in range(2):
        model = net()
        report = flexround_(
            model,
            draw(64, 8),
            Grid(4),
            blocks="layers",
            iterations=30,
            options=LearningOptions(activations=Activations(bits=4, lr=1e-2), input_drop=0.5),
        )
        reports.append([block.error for block in report.blocks])
        scales.append(model[2].input_quantizer.scale.item())
        assert not model[2].input_quantizer.training or model.training
        assert all(block.error <= block.error_rtn for block in report.blocks)
        assert model(draw(3, 8)).isfinite().all()
    assert reports[0] == reports[1]
    assert scales[0] == scales[1]
    with pytest.raises(UsageError, match="drop must be"):
        Activations(drop=0)
