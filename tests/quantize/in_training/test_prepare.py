import copy
from pathlib import Path

import pytest
import torch
import torch.multiprocessing as mp
from torch import nn
from torch.nn.utils import prune

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.core.fold import fold_
from weightsmith.lab.models import build_model
from weightsmith.lab.models.vit import Mlp
from weightsmith.quantize.after_training.activations import quantize_activations_
from weightsmith.quantize.after_training.targets import choose_targets
from weightsmith.quantize.formats.export import load_quantized, save_quantized
from weightsmith.quantize.grid import quantized_weights
from weightsmith.quantize.in_training.cache import cached_weights
from weightsmith.quantize.in_training.finish import finish_ofq_, integer_weights
from weightsmith.quantize.in_training.lsq import ActivationQuantizer, LSQWeight
from weightsmith.quantize.in_training.prepare import calibrate_, prepare_ofq_, reparameterize_qk_
from weightsmith.quantize.in_training.statsq import StatsQ, statsq
from weightsmith.quantize.in_training.weight_quantizer import sites
from weightsmith.reparam import compand_
from weightsmith.testing.models import available, build

MODELS = pytest.mark.parametrize("name", available())


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.GELU(), nn.Linear(12, 3))


def vit():
    torch.manual_seed(0)
    return build_model("vit_tiny", channels=1, size=8, classes=10)


def train(model, x, steps=2):
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    for _ in range(steps):
        optimizer.zero_grad()
        model(x).float().square().mean().backward()
        optimizer.step()


@MODELS
@pytest.mark.filterwarnings("ignore:.*is tied", "ignore:.*stays in floating point")
def test_every_model_trains_saves_and_folds_with_activations_and_products_quantized(name):
    model, x = build(name)
    frozen = {key: value.clone() for key, value in model.named_parameters() if not value.requires_grad}
    calibrate_(prepare_ofq_(model, qk_reparam="auto"), x)
    train(model, x)
    trained = model.eval()(x)
    assert trained.isfinite().all()
    other, _ = build(name)
    prepare_ofq_(other, qk_reparam="auto").load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), trained)
    assert torch.equal(copy.deepcopy(model)(x), trained)
    latents = {site.name: site.parameter for site in sites(model)}
    assert all(torch.equal(latents[key], value) for key, value in frozen.items() if key in latents)
    assert torch.equal(fold_(model)(x), trained)


def test_the_first_layer_and_the_head_keep_eight_bits_and_the_rest_gets_two():
    model = prepare_ofq_(vit())
    bits = {site.name: (type(site.quantizer), site.quantizer.bits) for site in sites(model)}
    assert bits["patch_embed.weight"] == bits["head.weight"] == (LSQWeight, 8)
    assert bits["blocks.3.mlp.fc2.weight"] == bits["blocks.3.attn.product"] == (StatsQ, 2)
    inputs = {module.name: module for module in model.modules() if isinstance(module, ActivationQuantizer)}
    assert inputs["the input of patch_embed"].bits == inputs["the input of head"].bits == 8
    assert inputs["the input of blocks.0.mlp.fc2"].signed is False
    assert inputs["the input of blocks.0.mlp.fc1"].bits == 2
    assert inputs["the input of head"].axis is None


def test_scales_belong_to_tokens_channels_or_all():
    shapes = {}
    for granularity in ("token", "channel", "tensor"):
        model = calibrate_(prepare_ofq_(vit(), granularity=granularity), torch.randn(4, 1, 8, 8))
        attention = model.blocks[0].attn
        quantizers = (
            attention.input_quantizer, attention.product_quantizer, attention.value_quantizer,
            attention.softmax_quantizer, model.blocks[0].mlp.fc2.input_quantizer, model.patch_embed.input_quantizer,
        )  # fmt: skip
        shapes[granularity] = [quantizer.scale.numel() for quantizer in quantizers]
    assert shapes == {
        "token": [17, 68, 64, 17, 17, 1],
        "channel": [64, 64, 64, 17, 256, 1],
        "tensor": [1, 1, 1, 1, 1, 1],
    }


def test_another_number_of_tokens_is_refused_unless_the_scale_is_shared():
    class Body(nn.Module):
        def __init__(self):
            super().__init__()
            self.blocks = vit().blocks

        def forward(self, tokens):
            return self.blocks(tokens)

    model = calibrate_(prepare_ofq_(Body(), ends_bits=None), torch.randn(2, 5, 64))
    with pytest.raises(UsageError, match=r"blocks.0.attn was calibrated for a length of 5 and got one of 1"):
        model(torch.randn(2, 1, 64))
    shared = calibrate_(prepare_ofq_(Body(), ends_bits=None, granularity="tensor"), torch.randn(2, 5, 64))
    assert shared(torch.randn(2, 9, 64)).shape == (2, 9, 64)


def test_what_follows_an_activation_is_unsigned():
    model = nn.Sequential(nn.Linear(4, 4), nn.GELU(), nn.Dropout(), nn.Linear(4, 4), nn.LayerNorm(4), nn.Linear(4, 4))
    calibrate_(prepare_ofq_(model), torch.randn(8, 4))
    assert [model[i].input_quantizer.signed for i in (0, 3, 5)] == [True, False, True]


def test_convolutions_share_a_scale_per_channel_and_pixels_may_have_shifts():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ConvTranspose2d(4, 6, 3), nn.Flatten(), nn.Linear(384, 2))
    calibrate_(prepare_ofq_(model, image_shift=True), torch.rand(2, 3, 8, 8))
    assert model[0].input_quantizer.scale.shape == (3,)
    assert model[0].input_quantizer.before.shape == (8, 8)
    assert model[0].input_quantizer.signed is False
    assert model[2].input_quantizer.scale.shape == (4,)
    assert integer_weights(model)["2.weight"].scale.shape == (6, 1)


def test_pretrained_weights_are_kept():
    plain = vit()
    model = prepare_ofq_(copy.deepcopy(plain))
    proj, qkv = (getattr(model.blocks[0].attn, name).parametrizations.weight.original for name in ("proj", "qkv"))
    assert torch.equal(proj, plain.blocks[0].attn.proj.weight)
    assert torch.equal(qkv, plain.blocks[0].attn.qkv.weight)


def test_parameters_keep_their_identity_so_an_optimizer_built_before_goes_on():
    model = net()
    weight = model[2].weight
    prepare_ofq_(model)
    assert model[2].parametrizations.weight.original is weight
    scale = model[2].input_quantizer.scale
    calibrate_(model, torch.randn(4, 6))
    assert model[2].input_quantizer.scale is scale


def test_where_chooses_layers_and_attention_with_all_its_projections():
    model = prepare_ofq_(vit(), where=["blocks.*", "!blocks.0.*"])
    names = {site.name for site in sites(model)}
    assert "patch_embed.weight" not in names
    assert "blocks.0.mlp.fc1.weight" not in names
    assert {"blocks.1.attn.product", "blocks.1.mlp.fc1.weight"} <= names
    assert type(model.blocks[0].attn).__mro__[0].__module__ == type(vit().blocks[0].attn).__module__
    only = prepare_ofq_(vit(), where="*.proj")
    assert not any("product" in site.name for site in sites(only))


def test_attention_alone_can_be_reparameterized():
    model = calibrate_(reparameterize_qk_(vit(), where="blocks.1.*"), torch.randn(4, 1, 8, 8))
    assert {site.name for site in sites(model)} == {"blocks.1.attn.product", "blocks.1.attn.qkv.weight"}
    with pytest.raises(UsageError, match="matches nothing"):
        reparameterize_qk_(net())


def test_calibration_takes_what_the_model_takes_and_restores_its_mode():
    class TwoInputs(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x, y):
            return self.second(self.first(x) + y)

    for batch in ((torch.randn(2, 4), torch.randn(2, 4)), {"x": torch.randn(2, 4), "y": torch.randn(2, 4)}):
        model = prepare_ofq_(TwoInputs())
        model.second.eval()
        calibrate_(model, batch)
        assert model.second.input_quantizer.calibrated
        assert model.training
        assert not model.second.training


def test_calibrating_again_starts_anew():
    model = calibrate_(prepare_ofq_(net()), torch.randn(8, 6))
    before = model[0].input_quantizer.scale.clone()
    calibrate_(model, 10 * torch.randn(8, 6))
    assert (model[0].input_quantizer.scale > 3 * before).all()


def test_a_quantizer_that_the_batch_does_not_reach_is_named():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused, self.last = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x):
            return self.last(self.used(x))

    with pytest.warns(WeightsmithWarning, match="did not reach the input of unused"):
        calibrate_(prepare_ofq_(Unused()), torch.randn(2, 4))


def test_a_calibration_batch_with_nan_names_the_layer_that_it_reaches():
    with pytest.raises(UsageError, match="NaN or infinite values to the input of 0"):
        calibrate_(prepare_ofq_(net()), torch.full((2, 6), float("nan")))


def test_a_weight_with_nan_is_named_and_nothing_changes():
    model = net()
    with torch.no_grad():
        model[2].weight[0, 0] = float("nan")
    with pytest.raises(UsageError, match=r"^2\.weight holds NaN"):
        prepare_ofq_(model)
    assert not integer_weights(model)
    good = prepare_ofq_(net(), activation_bits=None)
    with torch.no_grad():
        good[2].parametrizations.weight.original[0, 0] = float("inf")
    with pytest.raises(UsageError, match=r"2\.weight holds NaN"):
        finish_ofq_(good)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 0}, "weight_bits must be an integer between 1 and 8, got 0"),
        ({"activation_bits": 9}, "activation_bits must be an integer between 1 and 8, got 9"),
        ({"ends_bits": 32}, "ends_bits must be"),
        ({"weight": "dorefa"}, "weight 'dorefa' is not known"),
        ({"granularity": "tokens"}, "did you mean 'token'"),
        ({"qk_reparam": "maybe"}, "qk_reparam must be True, False"),
        ({"where": "nothing"}, "matches nothing"),
    ],
)
def test_an_argument_out_of_range_changes_nothing(options, message):
    model = vit()
    keys = list(model.state_dict())
    with pytest.raises(UsageError, match=message):
        prepare_ofq_(model, **options)
    assert list(model.state_dict()) == keys


def test_a_model_is_prepared_only_once():
    model = prepare_ofq_(net())
    with pytest.raises(UsageError, match=r"0\.weight is computed by LSQWeight: call weightsmith\.fold_"):
        prepare_ofq_(model)
    with pytest.raises(UsageError, match="no values yet"):
        prepare_ofq_(net().to("meta"))


def test_a_parametrization_on_top_of_a_quantizer_is_refused():
    model = prepare_ofq_(net(), activation_bits=None)
    nn.utils.parametrize.register_parametrization(model[2], "weight", nn.Identity())
    with pytest.raises(UsageError, match=r"2\.weight is quantized, and Identity moves it off its grid"):
        finish_ofq_(model)


def test_companding_over_a_prepared_model_is_refused():
    with pytest.raises(UsageError, match="is quantized by LSQWeight"):
        compand_(prepare_ofq_(net(), activation_bits=None), allow_existing=True)


def test_the_advice_on_pruned_layers_works():
    model = net()
    prune.l1_unstructured(model[2], "weight", 0.5)
    with pytest.raises(UsageError, match=r"2\.weight is pruned by a mask.*prune\.remove"):
        prepare_ofq_(model)
    with pytest.raises(UsageError, match=r"2\.weight is pruned by a mask.*prune\.remove"):
        choose_targets(model, None)
    prune.remove(model[2], "weight")
    assert choose_targets(model, None).keys() == {"0", "2", "4"}
    prepare_ofq_(model)


def test_a_model_that_trains_on_its_grid_says_what_saving_needs(tmp_path):
    with pytest.raises(UsageError, match="finish_ofq_ first"):
        save_quantized(prepare_ofq_(net()), tmp_path / "folder")


def test_inputs_are_quantized_once_whatever_came_before():
    model, x = net(), torch.randn(8, 6)
    quantize_activations_(model, bits=8)
    calibrate_(prepare_ofq_(model), x)
    assert all(len(layer._forward_pre_hooks) == 1 for layer in model if isinstance(layer, nn.Linear))
    calls = []
    model[2].input_quantizer.register_forward_hook(lambda *_: calls.append(1))
    model(x)
    assert calls == [1]
    with pytest.raises(UsageError, match="input of 0 is quantized by prepare_ofq_ already"):
        quantize_activations_(model)


def test_attention_gives_up_the_quantizers_that_its_projections_had():
    model, x = vit(), torch.randn(4, 1, 8, 8)
    quantize_activations_(model, bits=8)
    calibrate_(prepare_ofq_(model, example=x), x)
    assert not model.blocks[0].attn.qkv._forward_pre_hooks
    assert {"blocks.0.attn.product"} <= {site.name for site in sites(model)}
    weights_only = prepare_ofq_(vit(), activation_bits=None)
    with pytest.raises(UsageError, match=r"blocks.0.attn.qkv belongs to attention"):
        quantize_activations_(weights_only)


def test_a_layer_may_be_called_with_a_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.second(input=self.first(input=x))

    x = torch.randn(4, 6)
    model = calibrate_(prepare_ofq_(Named(), example=[x]), [x])
    assert model.first.input_quantizer.calibrated
    assert model(x).shape == (4, 2)


def test_the_ends_are_found_by_running_not_by_the_order_of_registration():
    class Backwards(nn.Module):
        def __init__(self):
            super().__init__()
            self.out, self.middle, self.into = nn.Linear(6, 2), nn.Linear(6, 6), nn.Linear(4, 6)

        def forward(self, x):
            return self.out(self.middle(self.into(x).relu()).relu())

    model = prepare_ofq_(Backwards(), activation_bits=None, example=torch.randn(3, 4))
    bits = {site.name: site.quantizer.bits for site in sites(model)}
    assert bits == {"out.weight": 8, "middle.weight": 2, "into.weight": 8}


def test_without_an_example_no_block_is_taken_for_a_head():
    class Headless(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Conv2d(1, 8, 2)
            self.blocks = nn.ModuleList(Mlp(8, 16) for _ in range(2))

    model = prepare_ofq_(Headless(), activation_bits=None)
    assert [site.name for site in sites(model) if site.quantizer.bits == 8] == ["embed.weight"]


def test_a_tied_weight_is_quantized_once_for_all_owners():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.body = nn.Embedding(11, 6), nn.Linear(6, 6)
            self.head = nn.Linear(6, 11, bias=False)
            self.head.weight = self.embedding.weight

        def forward(self, x):
            return self.head(self.body(self.embedding(x)))

    model = Tied()
    with pytest.warns(WeightsmithWarning, match=r"head\.weight is tied: it is quantized once, for all 2 owners"):
        prepare_ofq_(model, activation_bits=None, ends_bits=None)
    assert torch.equal(model.head.weight, model.embedding.weight)
    assert torch.equal(model.head.weight, statsq(model.head.parametrizations.weight.original, 2))
    assert len([site for site in sites(model) if "body" not in site.name]) == 1
    assert fold_(model).head.weight is model.embedding.weight


def test_two_layers_that_share_a_weight_share_its_quantizer():
    model = net()
    model[4] = nn.Linear(12, 12)
    model[4].weight = model[2].weight
    with pytest.warns(WeightsmithWarning, match=r"2\.weight is tied"):
        prepare_ofq_(model, activation_bits=None, ends_bits=None)
    assert model[2].parametrizations.weight[0] is model[4].parametrizations.weight[0]
    assert [len(model[i].parametrizations.weight) for i in (2, 4)] == [1, 1]


def test_a_weight_tied_to_something_that_cannot_be_quantized_is_refused():
    model = net()
    model.other = nn.Module()
    model.other.table = model[2].weight
    with pytest.raises(UsageError, match=r"2\.weight is tied to other\.table"):
        prepare_ofq_(model)


def test_one_weight_per_output_is_warned_of():
    model = nn.Sequential(nn.Conv2d(1, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 1))
    with pytest.warns(WeightsmithWarning, match=r"0\.weight has one value per output"):
        prepare_ofq_(model)
    w = torch.tensor([[0.3], [-0.3]])
    assert torch.allclose(statsq(w, 2), torch.tensor([[0.15], [-0.45]]))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_dtype_is_kept(dtype):
    model, x = net().to(dtype), torch.randn(5, 6, dtype=dtype)
    calibrate_(prepare_ofq_(model), x)
    assert model(x).dtype == dtype
    assert model[2].parametrizations.weight.original.dtype == model[2].weight.dtype == dtype
    assert model[2].input_quantizer.scale.dtype == torch.promote_types(dtype, torch.float32)
    codes = integer_weights(model)["2.weight"]
    assert codes.codes.abs().max() <= 2
    assert codes.scale.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.equal(fold_(model)[2].weight, codes.dequantize(dtype))


def test_the_memory_format_is_kept_and_does_not_change_the_numbers():
    outs = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 1))
        model = prepare_ofq_(model.to(memory_format=memory_format), activation_bits=None)
        outs.append(model[2].weight.detach())
        assert model[2].weight.is_contiguous(memory_format=memory_format)
        assert fold_(model)[2].weight.is_contiguous(memory_format=memory_format)
    assert torch.equal(*outs)


def test_a_fused_projection_gives_the_codes_of_its_value_rows():
    model = calibrate_(prepare_ofq_(vit()), torch.randn(4, 1, 8, 8))
    codes = integer_weights(model)
    qkv = model.blocks[0].attn.qkv
    assert codes["blocks.0.attn.qkv.weight"].shape == (64, 64)
    assert torch.equal(codes["blocks.0.attn.qkv.weight"].dequantize(), qkv.weight[128:])
    assert torch.equal(qkv.weight[:128], qkv.parametrizations.weight.original[:128])
    attention = model.blocks[0].attn
    product = attention.product(*attention.query_key_weights())
    assert torch.equal(codes["blocks.0.attn.product"].dequantize(), product)
    assert codes["blocks.0.attn.product"].offset == 0.5


@pytest.mark.filterwarnings("ignore:the biases of query and key")
@pytest.mark.parametrize("separate", [False, True])
@pytest.mark.parametrize("keep", [False, True])
def test_a_finished_model_computes_the_same_and_is_saved_as_integers(separate, keep, tmp_path):
    def make():
        torch.manual_seed(0)
        model = vit()
        if separate:
            for block in model.blocks:
                block.attn = Separate()
        return prepare_ofq_(model, keep_query_bias=keep)

    x = torch.randn(4, 1, 8, 8)
    model = calibrate_(make(), x)
    train(model, x)
    expected, integers = model.eval()(x), integer_weights(model)
    assert finish_ofq_(model) is model
    assert torch.allclose(model(x), expected, atol=1e-5)
    attached = quantized_weights(model)
    assert len(attached) == len(integers)
    assert torch.equal(attached["blocks.0.attn.product_weight"].codes, integers["blocks.0.attn.product"].codes)
    assert not any(name.startswith("blocks.0.attn.q.") for name, _ in model.named_parameters())
    save_quantized(model, tmp_path / "saved")
    restored = load_quantized(tmp_path / "saved", finish_ofq_(make()))
    assert torch.equal(restored(x), model(x))


class Separate(nn.Module):
    def __init__(self):
        super().__init__()
        self.num_heads = 4
        self.q, self.k, self.v, self.proj = (nn.Linear(64, 64) for _ in range(4))

    def forward(self, x):
        q, k, v = (layer(x).unflatten(-1, (4, 16)).transpose(1, 2) for layer in (self.q, self.k, self.v))
        return self.proj(nn.functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))


def test_evaluation_and_training_see_the_same_weights():
    model = calibrate_(prepare_ofq_(net()), torch.randn(4, 6))
    x = torch.randn(4, 6)
    assert torch.equal(model.train()(x), model.eval()(x))
    with cached_weights(model), torch.no_grad():
        assert torch.equal(model(x), model(x))


@pytest.mark.parametrize("checkpointed", [False, True])
def test_gradient_checkpointing_does_not_change_gradients(checkpointed):
    model = calibrate_(prepare_ofq_(vit()), torch.randn(4, 1, 8, 8))
    tokens = torch.randn(2, 17, 64)
    expected = torch.autograd.grad(model.blocks[0](tokens).square().sum(), model.blocks[0].parameters())
    out = torch.utils.checkpoint.checkpoint(model.blocks[0], tokens, use_reentrant=False)
    found = torch.autograd.grad(out.square().sum(), model.blocks[0].parameters())
    assert all(torch.equal(left, right) for left, right in zip(found, expected, strict=True))


@pytest.mark.parametrize("make", [net, pytest.param(vit, marks=pytest.mark.slow)])
def test_a_prepared_model_compiles_into_one_graph(make):
    x = torch.randn(4, 6) if make is net else torch.randn(4, 1, 8, 8)
    model = calibrate_(prepare_ofq_(make()), x)
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(model, backend="aot_eager", fullgraph=True)(x), model(x), atol=1e-5)


def _calibrate_in(rank, folder):
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    model = prepare_ofq_(net())
    calibrate_(model, torch.randn(8, 6, generator=torch.Generator().manual_seed(rank)).add(10 * rank))
    torch.save(model.state_dict(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.slow
def test_all_processes_start_from_the_scales_of_the_first(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[3])  # the other processes import this file by its dotted name
    mp.spawn(_calibrate_in, (str(tmp_path),), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in (0, 1))
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


def test_the_ends_are_found_where_layers_are_called_by_keyword():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.middle, self.last = nn.Linear(4, 6), nn.Linear(6, 6), nn.Linear(6, 2)

        def forward(self, x):
            return self.last(input=self.middle(input=self.first(input=x).relu()).relu())

    model = prepare_ofq_(Named(), activation_bits=None, example=torch.randn(3, 4))
    assert {site.name: site.quantizer.bits for site in sites(model)} == {
        "first.weight": 8,
        "middle.weight": 2,
        "last.weight": 8,
    }
