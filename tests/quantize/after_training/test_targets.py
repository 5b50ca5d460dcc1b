import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from weightsmith import fold_
from weightsmith.core.errors import UsageError
from weightsmith.quantize import (
    Activations,
    Grid,
    LearningOptions,
    adaround_,
    export_onnx,
    flexround_,
    load_quantized,
    quantized_weights,
    round_to_nearest_,
    save_quantized,
)
from weightsmith.quantize.after_training.rtn import RoundToNearest
from weightsmith.quantize.after_training.targets import choose_targets

W3 = Grid(3, search="minmax")


def mixtral(**options):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    config = transformers.MixtralConfig(**shape, **heads, **experts, initializer_range=0.2, **options)
    return transformers.MixtralForCausalLM(config).eval()


def gpt_oss():
    """Its experts are ``(experts, in, out)``."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    shape = {"vocab_size": 19, "hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 2, "head_dim": 8}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32}
    config = transformers.GptOssConfig(**shape, **heads, num_local_experts=4, num_experts_per_tok=2)
    return transformers.GptOssForCausalLM(config).eval()


def tokens(count=6, length=12):
    return list(torch.randint(19, (count, length), generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize("granularity", ["channel", "tensor", 8])
@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_experts_in_one_tensor_are_rounded_as_each_would_be_by_itself(make, granularity):
    grid = Grid(3, granularity=granularity)
    model, trained = make(), make()
    report = round_to_nearest_(model, None, grid)
    found = quantized_weights(model)
    axis = 0 if make is mixtral else 1
    for part in ("gate_up_proj", "down_proj"):
        name = f"model.layers.1.mlp.experts.{part}"
        for index, expert in enumerate(trained.get_parameter(name)):
            alone = RoundToNearest(expert, grid, axis=axis).quantized(expert)
            assert torch.equal(found[name].codes[index], alone.codes)
            assert torch.equal(model.get_parameter(name)[index], alone.dequantize())
            assert not torch.equal(alone.dequantize(), expert)
    assert {layer.name for layer in report.layers} == found.keys()


@pytest.mark.parametrize("verb", [flexround_, adaround_])
@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_the_rounding_of_experts_is_learned(make, verb):
    model, nearest = make(), make()
    round_to_nearest_(nearest, None, W3)
    report = verb(model, tokens(), W3, iterations=40, lr=1e-2)
    assert all(block.error < block.error_rtn for block in report.blocks)
    moved = {layer.name: layer.moved for layer in report.layers}
    assert moved["model.layers.0.mlp.experts.gate_up_proj"] > 0
    assert moved["model.layers.0.mlp.experts.down_proj"] > 0
    for name, quantized in quantized_weights(model).items():
        assert torch.equal(model.get_parameter(name), quantized.dequantize())


def test_experts_that_no_token_reaches_stay_rounded_to_nearest_and_are_named():
    model, nearest = mixtral(), mixtral()
    for one in (model, nearest):
        for layer in one.model.layers:
            layer.mlp.gate.weight.data[3] = -50 * layer.mlp.gate.weight.data[:3].sum(0).sign()
            layer.mlp.gate.weight.data[:3] = 0.01 * layer.mlp.gate.weight.data[3]
            layer.mlp.gate.weight.data[2] *= -1
    seen = set()
    experts = model.model.layers[0].mlp.experts
    hook = experts.register_forward_pre_hook(lambda _, args: seen.update(args[1].unique().tolist()))
    for ids in tokens():
        model(ids[None])
    hook.remove()
    missing = set(range(4)) - seen
    assert missing, "the router of this test leaves an expert out"
    round_to_nearest_(nearest, None, W3)
    report = flexround_(model, tokens(), W3, iterations=20, lr=1e-2)
    name = "model.layers.0.mlp.experts.gate_up_proj"
    assert {f"{name}[{index}]" for index in missing} == {one for one in report.unseen if one.startswith(name)}
    for index in missing:
        assert torch.equal(model.get_parameter(name)[index], nearest.get_parameter(name)[index])


@pytest.mark.parametrize("granularity", ["channel", "tensor", 8])
@pytest.mark.parametrize("make", [mixtral, gpt_oss])
def test_experts_come_back_bit_for_bit(tmp_path, make, granularity):
    model = make()
    round_to_nearest_(model, None, Grid(4, granularity=granularity, search="minmax"))
    save_quantized(model, tmp_path / "out")
    loaded = load_quantized(tmp_path / "out")
    assert quantized_weights(loaded).keys() == quantized_weights(model).keys()
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in loaded.state_dict().items())
    ids = torch.stack(tokens(2))
    with torch.no_grad():
        assert torch.equal(loaded(ids).logits, model(ids).logits)
    with pytest.raises(UsageError, match=r"cannot hold this model.*not to a Linear"):
        save_quantized(model, tmp_path / "other", "compressed-tensors")
    with pytest.raises(UsageError, match="holds the weights of experts"):
        export_onnx(model, ids, tmp_path / "model.onnx")


def encoder(**options):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False, **options).eval()


@pytest.mark.parametrize("blocks", ["auto", "layers"])
def test_packed_projections_of_torchs_attention_are_rounded_and_learned(tmp_path, blocks):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(16, 5, 3, generator=generator) @ torch.randn(3, 16, generator=generator)
    model, trained = encoder(), encoder()
    report = flexround_(model, x, W3, blocks=blocks, iterations=60, lr=1e-2)
    assert not report.unseen
    assert len(report.layers) == 8
    assert all(block.error < block.error_rtn for block in report.blocks)
    found = quantized_weights(model)
    assert found["layers.0.self_attn.in_proj_weight"].scale.shape == (48, 1)
    assert torch.equal(model.layers[0].self_attn.in_proj_bias, trained.layers[0].self_attn.in_proj_bias)
    save_quantized(model, tmp_path / "out")
    loaded = load_quantized(tmp_path / "out", encoder())
    assert torch.equal(loaded(x), model(x))


def test_attention_whose_keys_have_another_width_has_three_projections():
    attention = nn.MultiheadAttention(16, 2, kdim=8, vdim=12)
    assert list(choose_targets(attention, None)) == ["q_proj_weight", "k_proj_weight", "v_proj_weight", "out_proj"]


def test_activations_are_refused_where_no_layer_is_called_with_them():
    model = encoder()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    options = {"iterations": 2, "options": LearningOptions(activations=Activations())}
    with pytest.raises(UsageError, match=r"cannot be quantized for layers\.0\.self_attn\.in_proj_weight"):
        flexround_(model, torch.randn(4, 5, 16), W3, **options)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    flexround_(model, torch.randn(4, 5, 16), W3, where="*linear?", **options)
    assert len(quantized_weights(model)) == 4


def test_weights_used_by_keyword_only_calls_are_seen():
    class Keywords(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x):
            return self.fc(input=x)

    assert not flexround_(Keywords(), torch.randn(8, 8), W3, blocks="whole", iterations=2).unseen


def lora(model):
    peft = pytest.importorskip("peft")
    return peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))


def test_adapters_of_peft_are_not_rounded():
    model = lora(mixtral())
    before = {name: tensor.clone() for name, tensor in model.state_dict().items() if "lora" in name}
    round_to_nearest_(model, None, W3)
    found = quantized_weights(model)
    assert sum("base_layer" in name for name in found) == 4
    assert not any("lora" in name for name in found)
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in before.items())
    with pytest.raises(UsageError, match=r"belongs to a PEFT adapter of .*q_proj: leave it out"):
        round_to_nearest_(model, None, W3, where=lambda name, _: "q_proj.lora" in name)


@pytest.mark.parametrize(
    ("put_on", "take_off", "advice"),
    [
        (lambda fc: prune.l1_unstructured(fc, "weight", 0.5), lambda fc: prune.remove(fc, "weight"), "prune.remove"),
        (nn.utils.weight_norm, nn.utils.remove_weight_norm, "remove_weight_norm"),
        (nn.utils.spectral_norm, nn.utils.remove_spectral_norm, "remove_spectral_norm"),
        (lambda fc: nn.utils.parametrizations.orthogonal(fc), fold_, "weightsmith.fold_"),
    ],
)
@pytest.mark.filterwarnings("ignore:.*is deprecated.*:FutureWarning")
def test_the_advice_for_a_computed_weight_leads_to_one_that_is_rounded(put_on, take_off, advice):
    model = nn.Sequential(nn.Linear(4, 4))
    put_on(model[0])
    with pytest.raises(UsageError, match=rf"^0\.weight .*{advice}"):
        round_to_nearest_(model, None, W3)
    take_off(model[0])
    round_to_nearest_(model, None, W3)
    assert list(quantized_weights(model)) == ["0.weight"]


def test_what_stays_as_it_was_is_listed_by_name_and_share():
    model = mixtral()
    report = round_to_nearest_(model, None, W3)
    total = sum(parameter.numel() for parameter in model.parameters())
    assert {(one.name, one.why) for one in report.left} == {
        ("model.embed_tokens.weight", "embedding"),
        ("lm_head.weight", "output embedding"),
        *((f"model.layers.{i}.mlp.gate.weight", REASON) for i in range(2)),
    }
    assert all(one.share == one.numel / total == model.get_parameter(one.name).numel() / total for one in report.left)
    large = sum(parameter.numel() for parameter in model.parameters() if parameter.ndim > 1)
    assert sum(layer.numel for layer in report.layers) + sum(one.numel for one in report.left) == large
    assert sum(layer.numel for layer in report.layers) > 0.8 * large


REASON = "a parameter of MixtralTopKRouter, whose weights are not known"


def test_the_reasons_for_leaving_out_are_told_apart():
    adapted = lora(mixtral(tie_word_embeddings=True))
    reasons = {one.name.removeprefix("base_model.model."): one.why for one in round_to_nearest_(adapted, None, W3).left}
    assert reasons["model.layers.0.self_attn.q_proj.lora_A.default.weight"] == "adapter"
    assert reasons["model.embed_tokens.weight"] == "tied to base_model.model.lm_head.weight"
    from weightsmith.adapt import BoneConfig, apply_bone_

    bone = apply_bone_(mixtral(), BoneConfig(r=4, where="*q_proj"))
    reasons = {one.name: one.why for one in round_to_nearest_(bone, None, W3).left}
    assert reasons["model.layers.0.self_attn.q_proj.bone.default"] == "adapter"
    report = flexround_(mixtral(), tokens(), W3, iterations=1, where="*self_attn*")
    reasons = {one.name: one.why for one in report.left}
    assert reasons["model.layers.1.mlp.experts.down_proj"] == "not chosen, or outside of the blocks"
