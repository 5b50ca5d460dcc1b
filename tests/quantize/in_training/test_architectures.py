"""What `prepare_ofq_` does to models that it does not know: never another function, and the docs' table says what."""

import runpy
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("transformers")
from weightsmith.adapt import BoneConfig, apply_bone_
from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.quantize import calibrate_, finish_ofq_, load_quantized, ofq_report
from weightsmith.quantize.formats.export import save_quantized
from weightsmith.quantize.in_training.lsq import ActivationQuantizer
from weightsmith.quantize.in_training.prepare import prepare_ofq_
from weightsmith.quantize.in_training.weight_quantizer import WeightQuantizer, sites

FAMILIES, build, rows = map(
    runpy.run_path(str(Path(__file__).with_name("architectures.py"))).get, ("FAMILIES", "build", "rows")
)
ROOT = Path(__file__).parents[3]
quiet = pytest.mark.filterwarnings("ignore::weightsmith.core.errors.WeightsmithWarning")
each_family = pytest.mark.parametrize("family", FAMILIES)


def output(model, batch):
    torch.manual_seed(0)  # masked autoencoders draw what they hide
    return model(**batch)[0]


def test_the_table_in_the_docs_is_what_the_small_models_give():
    page = (ROOT / "docs/techniques/ofq-architectures.md").read_text()
    assert [line for line in page.splitlines() if line.startswith("| ")][1:] == rows()


@quiet
@each_family
def test_with_every_quantizer_off_the_function_stays(family, monkeypatch):
    model, batch = build(family)
    before = output(model, batch())
    prepare_ofq_(model, example=batch(), keep_query_bias=True)
    calibrate_(model, batch())
    monkeypatch.setattr(ActivationQuantizer, "forward", lambda self, x: x)
    monkeypatch.setattr(WeightQuantizer, "forward", lambda self, rows: rows)
    after = output(model.eval(), batch())
    finite = before.isfinite()
    assert (after - before)[finite].abs().max() < 1e-5 * before[finite].abs().max().clamp_min(1)


@quiet
@each_family
def test_it_trains_and_comes_back_from_its_folder(family, tmp_path):
    model, batch = build(family)
    calibrate_(prepare_ofq_(model, weight_bits=4, activation_bits=4, example=batch()), batch())
    output(model.train(), batch()).square().sum().backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter.sub_(parameter.grad.sign(), alpha=1e-4)
    expected = output(model.eval(), batch())
    model.save_pretrained(tmp_path / "checkpoint")  # tied embeddings included
    finish_ofq_(model)
    assert torch.allclose(output(model, batch()), expected, atol=1e-4)
    save_quantized(model, tmp_path / "finished")
    assert torch.equal(output(load_quantized(tmp_path / "finished"), batch()), output(model, batch()))
    with pytest.raises(UsageError, match="save_quantized"):
        model.save_pretrained(tmp_path / "plain")


@quiet
@each_family
def test_without_an_example_one_is_made_or_attention_is_left_alone(family, monkeypatch):
    model, batch = build(family)
    before = output(model, batch())
    prepare_ofq_(model, activation_bits=None, keep_query_bias=True)
    assert ofq_report(model).ends_by == "an example made from the model's config"
    monkeypatch.setattr(WeightQuantizer, "forward", lambda self, rows: rows)
    after = output(model.eval(), batch())
    finite = before.isfinite()
    assert (after - before)[finite].abs().max() < 1e-5 * before[finite].abs().max().clamp_min(1)


@quiet
def test_a_fresh_process_computes_the_same(tmp_path):
    model, batch = build("ViT")
    calibrate_(prepare_ofq_(model, weight_bits=4, activation_bits=4), batch())
    finish_ofq_(model)
    save_quantized(model, tmp_path / "model")
    torch.save((batch(), output(model, batch())), tmp_path / "expected.pt")
    code = (
        "import torch, sys; from weightsmith.quantize import load_quantized; "
        f"model = load_quantized({str(tmp_path / 'model')!r}); "
        f"batch, expected = torch.load({str(tmp_path / 'expected.pt')!r}); "
        "sys.exit(not torch.equal(model(**batch)[0], expected))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@quiet
def test_a_folder_with_a_missing_or_an_unexpected_tensor_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    model, batch = build("ViT")
    finish_ofq_(calibrate_(prepare_ofq_(model), batch()))
    save_quantized(model, tmp_path)
    file = tmp_path / "weights/model.safetensors"
    whole = load_file(file)
    key = "vit.layers.0.attention.softmax_quantizer.scale"
    for state in ({name: held for name, held in whole.items() if name != key}, {**whole, "strange": torch.ones(1)}):
        save_file(state, file, metadata={"format": "pt"})
        with pytest.raises(UsageError, match=r"softmax_quantizer|strange"):
            load_quantized(tmp_path)


def bits(model):
    return {site.name: site.quantizer.bits for site in sites(model)}


@quiet
def test_the_patch_embedding_of_clip_keeps_eight_bits_and_no_block_of_a_headless_encoder_does():
    clip = bits(prepare_ofq_(build("CLIP vision")[0]))
    assert clip["vision_model.embeddings.patch_embedding.weight"] == clip["visual_projection.weight"] == 8
    assert sorted(set(clip.values())) == [2, 8]
    headless = bits(prepare_ofq_(build("DINOv2")[0]))
    assert [name for name, held in headless.items() if held == 8] == ["embeddings.patch_embeddings.projection.weight"]


def test_what_fails_changes_nothing():
    model, _ = build("ViT")
    before, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(UsageError, match="example= does not fit the model"):
        prepare_ofq_(model, example={"input_ids": torch.ones(1, 4, dtype=torch.long)})
    model, batch = build("T5")
    before, kinds = list(model.state_dict()), [type(module) for module in model.modules()]
    with pytest.raises(UsageError, match="qk_reparam=True is not possible"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        prepare_ofq_(model, qk_reparam=True, example=batch())
    assert list(model.state_dict()) == before
    assert [type(module) for module in model.modules()] == kinds


class Reduced(nn.Module):
    """Looks like attention, and halves its values."""

    def __init__(self):
        super().__init__()
        self.num_heads = 2
        self.q, self.k, self.v, self.proj = (nn.Linear(8, 8) for _ in range(4))
        self.gate = nn.Parameter(torch.ones(8))

    def forward(self, hidden, mask=None):
        q, k, v = (layer(hidden).unflatten(-1, (2, 4)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        out = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return self.proj(out.transpose(1, 2).flatten(2) * self.gate)


def test_a_difference_that_only_training_would_bring_out_is_seen():
    with pytest.warns(WeightsmithWarning, match=r"outputs would differ by .* only the linear layers there"):
        model = prepare_ofq_(Reduced())
    assert type(model) is Reduced
    assert "would differ" in ofq_report(model).attention[""]
    assert {"q.weight", "k.weight", "v.weight", "proj.weight"} == bits(model).keys()


def test_an_argument_that_was_not_compared_is_refused_and_keywords_are_bound():
    class Scaled(Reduced):
        def __init__(self):
            super().__init__()
            del self.gate

        def forward(self, hidden, mask=None, times=None):
            self.gate = 1 if times is None else times
            return super().forward(hidden, mask)

    x = torch.randn(2, 5, 8)
    model = prepare_ofq_(Scaled(), activation_bits=None, ends_bits=None, keep_query_bias=True)
    assert torch.equal(model(hidden=x), model(x))
    assert not torch.equal(model(x, torch.ones(5, 5).tril().bool()), model(x))
    with pytest.raises(UsageError, match="has not been compared with the original for times"):
        model(x, times=2)


def test_attention_of_torch_is_quantized_and_what_is_left_is_listed():
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2, enable_nested_tensor=False
    )
    x = torch.randn(3, 5, 16)
    calibrate_(prepare_ofq_(model.eval(), ends_bits=None, example=x), x)
    assert bits(model)["layers.0.self_attn.in_proj_weight"] == 2
    assert ofq_report(model).kept == {}
    trained = model.train()(x)
    trained.sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    expected = model.eval()(x)
    assert torch.equal(finish_ofq_(model)(x), expected)


def test_a_large_weight_that_no_layer_has_is_named_with_its_share():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.router = nn.Linear(8, 8)
            self.experts = nn.Parameter(torch.randn(4, 8, 8))

        def forward(self, x):
            return self.router(x) + (x @ self.experts).sum(0)

    with pytest.warns(WeightsmithWarning, match=r"experts \(80.0% of all matrices\) stays in floating point"):
        model = prepare_ofq_(Experts(), activation_bits=None)
    assert "in floating point: experts, 80.0% of all matrices" in str(ofq_report(model))


def test_layers_that_carry_adapters_are_named():
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model = apply_bone_(plain, BoneConfig(r=2, where="0"))
    with pytest.warns(WeightsmithWarning, match=r"0\.weight .* stays in floating point"):
        prepare_ofq_(model, activation_bits=None)


def test_adapters_of_peft_stay_in_float_and_are_named():
    peft = pytest.importorskip("peft")
    model = peft.get_peft_model(build("ViT")[0], peft.LoraConfig(target_modules=["fc1"], r=2))
    with pytest.warns(WeightsmithWarning, match=r"adapters .*fc1\.lora_A.* stay in floating point"):
        prepare_ofq_(model, activation_bits=None)
    assert any(name.endswith("fc1.base_layer.weight") for name in bits(model))
    assert not any("lora" in name for name in bits(model))


@quiet
def test_a_model_may_be_prepared_in_two_steps():
    model, batch = build("ViT")
    prepare_ofq_(model, where="*.mlp.*", example=batch())
    prepare_ofq_(model, where=["!*.mlp.*", "!*.patch_embeddings.*"], example=batch())
    assert not any(held.calibrated for held in model.modules() if isinstance(held, ActivationQuantizer))
    assert ofq_report(model).ends == ("classifier",)
    assert len(ofq_report(model).attention) == 2
    assert output(calibrate_(model, batch()), batch()).isfinite().all()


def test_a_report_needs_a_preparation():
    with pytest.raises(UsageError, match="call prepare_ofq_ first"):
        ofq_report(nn.Linear(2, 2))
