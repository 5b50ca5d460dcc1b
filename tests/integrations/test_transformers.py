import copy
import types

import pytest
import torch

from weightsmith.core.errors import UsageError
from weightsmith.core.fold import fold_
from weightsmith.quantize.in_training.annealing import ConfidenceGuidedAnnealing, near_threshold
from weightsmith.quantize.in_training.finish import integer_weights
from weightsmith.quantize.in_training.lsq import ActivationQuantizer
from weightsmith.quantize.in_training.prepare import calibrate_, prepare_ofq_
from weightsmith.quantize.in_training.weight_quantizer import WeightQuantizer, sites

transformers = pytest.importorskip("transformers")
from weightsmith.integrations.transformers import AnnealingCallback  # noqa: E402

SMALL = {"num_channels": 1, "num_labels": 3, "image_size": 16}
BLOCKS = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32, "patch_size": 4}
STAGES = {"embed_dim": 8, "depths": [2, 2], "num_heads": [2, 2], "window_size": 2, "patch_size": 2}
MODELS = {
    "vit": (transformers.ViTConfig(**SMALL, **BLOCKS), transformers.ViTForImageClassification),
    "deit": (transformers.DeiTConfig(**SMALL, **BLOCKS), transformers.DeiTForImageClassificationWithTeacher),
    "swin": (transformers.SwinConfig(**SMALL, **STAGES), transformers.SwinForImageClassification),
}
each_model = pytest.mark.parametrize("name", list(MODELS))


def build(name):
    config, kind = MODELS[name]
    torch.manual_seed(0)
    return kind(copy.deepcopy(config)), {"pixel_values": torch.randn(4, 1, 16, 16)}


@each_model
@pytest.mark.parametrize("product", [True, False])
def test_hugging_face_attention_is_found_trains_and_folds(name, product):
    model, x = build(name)
    calibrate_(prepare_ofq_(model, qk_reparam=product), x)
    model.train()
    model(**x).logits.square().sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    before = model.eval()(**x).logits
    codes = integer_weights(model)
    assert any("product" in key for key in codes) is product
    other = prepare_ofq_(build(name)[0], qk_reparam=product)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(**x).logits, before)
    assert torch.equal(fold_(model)(**x).logits, before)
    for key, quantized in codes.items():
        assert "product" in key or torch.equal(model.get_parameter(key), quantized.dequantize())


@each_model
def test_without_rounding_our_forward_is_that_of_the_library(name, monkeypatch):
    model, x = build(name)
    expected = model.eval()(**x).logits
    calibrate_(prepare_ofq_(model, qk_reparam=False), x)
    fine = lambda self, rows: rows  # noqa: E731
    monkeypatch.setattr(ActivationQuantizer, "forward", fine)
    monkeypatch.setattr(WeightQuantizer, "forward", fine)
    assert torch.allclose(model(**x).logits, expected, atol=1e-6)


def test_without_rounding_the_product_gives_the_same_logits_too(monkeypatch):
    model, x = build("swin")
    expected = model.eval()(**x).logits
    prepare_ofq_(model, activation_bits=None)
    monkeypatch.setattr(WeightQuantizer, "forward", lambda self, rows: rows)
    assert torch.allclose(model(**x).logits, expected, atol=1e-5)


def test_attention_weights_keep_their_place():
    model, x = build("vit")
    model.set_attn_implementation("eager")
    calibrate_(prepare_ofq_(model), x)
    attentions = model.eval()(**x, output_attentions=True).attentions
    assert [tuple(weights.shape) for weights in attentions] == [(4, 2, 17, 17)] * 2


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_masks_of_either_kind_are_honoured(implementation):
    model, x = build("vit")
    model.set_attn_implementation(implementation)
    calibrate_(prepare_ofq_(model, activation_bits=None), x)
    mask = torch.ones(4, 17)
    mask[:, 9:] = 0
    body = model.eval().vit
    with torch.no_grad():
        tokens = body.embeddings(x["pixel_values"])
        short = tokens[:, :9]
        prepared = transformers.masking_utils.create_bidirectional_mask(
            config=body.config, inputs_embeds=tokens, attention_mask=mask
        )
        masked = body.layers[0](tokens, prepared)[:, :9]
        assert torch.allclose(masked, body.layers[0](short, None), atol=1e-5)


class Pixels(torch.utils.data.Dataset):
    def __len__(self):
        return 16

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {"pixel_values": torch.randn(1, 16, 16, generator=generator), "labels": index % 3}


def test_a_trainer_anneals_at_the_end(tmp_path):
    model, x = build("vit")
    calibrate_(prepare_ofq_(model), x)
    annealing = ConfidenceGuidedAnnealing(model, 0.02)
    (site,) = [site for site in sites(model) if site.name == "vit.layers.0.mlp.fc1.weight"]
    seen = []

    class Watch(transformers.TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(site.latent().clone())

        def on_train_end(self, args, state, control, **kwargs):
            seen.append(site.latent().clone())

    arguments = transformers.TrainingArguments(
        str(tmp_path), max_steps=6, per_device_train_batch_size=4, learning_rate=1e-2, use_cpu=True, report_to="none",
        save_strategy="no", disable_tqdm=True, logging_strategy="no",
    )  # fmt: skip
    callback = AnnealingCallback(annealing, start=0.5, lr=1e-3)
    trainer = transformers.Trainer(model, arguments, train_dataset=Pixels(), callbacks=[callback, Watch()])
    trainer.train()
    for step in range(6):
        may = near_threshold(seen[step], 2, 0.02)
        moved = seen[step] != seen[step + 1]
        assert moved[~may].any() == (step < 3)
        assert moved[may].any()


def test_the_callback_sets_the_rate_only_when_it_is_told_to():
    linear = build("vit")[0]
    prepare_ofq_(linear, activation_bits=None)
    state = types.SimpleNamespace(global_step=9, max_steps=10)
    for lr, expected in ((None, 0.1), (1e-5, 1e-5)):
        optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
        callback = AnnealingCallback(ConfidenceGuidedAnnealing(linear), lr=lr)
        callback.on_pre_optimizer_step(None, state, None, optimizer=optimizer)
        callback.on_optimizer_step(None, state, None)
        assert optimizer.param_groups[0]["lr"] == expected


@pytest.mark.parametrize(("options", "message"), [({"start": 2.0}, "start must be"), ({"lr": 0.0}, "lr must be above")])
def test_what_is_out_of_range_is_refused(options, message):
    model = prepare_ofq_(build("vit")[0], activation_bits=None)
    with pytest.raises(UsageError, match=message):
        AnnealingCallback(ConfidenceGuidedAnnealing(model), **options)
