import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, parametrize
from torch.nn.utils import weight_norm as hooked_weight_norm
from torch.testing import assert_close

from weightsmith import fold_
from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.reparam import WeightCompander, assert_valid, compand_, saturation_report
from weightsmith.reparam.apply import sites


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 5))


class Tied(nn.Module):
    def __init__(self, sparse: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4, sparse=sparse)
        self.head = nn.Linear(4, 7, bias=False)
        self.head.weight = self.embed.weight
        self.embed.weight.data.mul_(0.2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.head(self.embed(tokens))


def untouched(model: nn.Module, before: dict[str, torch.Tensor]) -> bool:
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[key], before[key]) for key in before)


@pytest.mark.parametrize("fn", ["arctan", "arcsinh", "erf"])
@pytest.mark.parametrize("learnable", [False, True])
@pytest.mark.parametrize("share", ["layer", "model"])
def test_outputs_do_not_change_at_the_start_nor_by_folding(fn, learnable, share) -> None:
    model, x = small().double(), torch.randn(2, 3, 4, 4, dtype=torch.float64)
    model.eval()
    plain, expected = copy.deepcopy(model), model(x)
    assert compand_(model, 0.6, 0.9, fn=fn, learnable=learnable, share=share) is model
    assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    companded = model(x)
    fold_(model)
    assert torch.equal(model(x), companded)
    assert model.state_dict().keys() == plain.state_dict().keys()
    assert [type(module) for module in model.modules()] == [type(module) for module in plain.modules()]


def test_linear_and_convolution_weights_are_companded_and_nothing_else() -> None:
    model = compand_(small())
    assert [site.name for site in sites(model)] == ["0.weight", "4.weight"]
    assert isinstance(model[0].bias, nn.Parameter)
    assert not parametrize.is_parametrized(model[1])


def test_where_can_name_other_modules_and_exclude_some() -> None:
    model = nn.ModuleDict({"embed": nn.Embedding(5, 3), "body": nn.Linear(3, 3), "head": nn.Linear(3, 5)})
    model["embed"].weight.data.mul_(0.1)
    compand_(model, where=["embed", "body"])
    assert [site.name for site in sites(model)] == ["embed.weight", "body.weight"]


def test_a_single_layer_is_a_model_too() -> None:
    layer = compand_(nn.ConvTranspose1d(3, 2, 3))
    assert [site.name for site in sites(layer)] == ["weight"]


def test_the_parameter_keeps_its_identity_through_companding_and_folding() -> None:
    layer = nn.Linear(3, 2)
    weight = layer.weight
    compand_(layer)
    assert layer.parametrizations.weight.original is weight
    assert fold_(layer).weight is weight


def test_learned_pairs_are_one_per_layer_or_one_per_model() -> None:
    fine, coarse = compand_(small(), learnable=True), compand_(small(), learnable=True, share="model")
    assert len({id(site.compander.a) for site in sites(fine)}) == 2
    assert len({id(site.compander.a) for site in sites(coarse)}) == 1
    assert len(list(fine.parameters())) - len(list(coarse.parameters())) == 2


def test_tied_weights_are_inverted_once_and_stay_tied() -> None:
    model, tokens = Tied(), torch.arange(7)
    expected, weight = model(tokens), model.embed.weight
    compand_(model, learnable=True)
    assert_close(model(tokens), expected)
    assert model.embed.parametrizations.weight.original is model.head.parametrizations.weight.original is weight
    assert model.embed.parametrizations.weight[0] is model.head.parametrizations.weight[0]
    assert [site.name for site in sites(model)] == ["embed.weight"]
    model(tokens).sum().backward()
    assert weight.grad is not None
    fold_(model)
    assert model.embed.weight is model.head.weight is weight
    assert_close(model(tokens), expected)


def test_a_weight_tied_to_a_parametrized_one_is_refused() -> None:
    model = Tied()
    parametrize.register_parametrization(model.embed, "weight", nn.Identity())
    with pytest.raises(ValueError, match="tied to a tensor that is parametrized already"):
        compand_(model, where="head")


def test_weights_out_of_reach_are_all_named_and_nothing_is_changed() -> None:
    model = small()
    model[0].weight.data[0, 0, 0, 0] = 0.9
    model[4].weight.data[0, 0] = -1.2
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"0.weight \(max \|w\| = 0.9\), 4.weight.* 1.2\).*sufficient a is 0.764"):
        compand_(model, 0.5)
    assert untouched(model, before)
    compand_(model, 0.764)


def test_clipping_warns_once_with_the_counts() -> None:
    model = small()
    model[4].weight.data[0, :2] = torch.tensor([3.0, -3.0])
    with pytest.warns(WeightsmithWarning, match="2 of 80 in 4.weight") as caught:
        compand_(model, overflow="clip")
    assert len(caught) == 1
    assert_close(model[4].weight[0, :2].detach(), torch.tensor([1.0, -1.0]) * 0.95 * next(sites(model)).compander.bound)


def test_companding_twice_is_refused() -> None:
    model = compand_(small())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=r"0\.weight is companded already: call fold_"):
        compand_(model)
    assert untouched(model, before)
    compand_(fold_(model))


def test_another_parametrization_is_refused_unless_allowed() -> None:
    model = small()
    parametrizations.spectral_norm(model[4])
    with pytest.raises(ValueError, match=r"4\.weight is computed by _SpectralNorm.*allow_existing=True"):
        compand_(model)
    compand_(model, allow_existing=True)
    model.eval()
    held = model[4].parametrizations.weight
    assert_close(model[4].weight, held[1](held[0](held.original)))
    assert [site.name for site in sites(model)] == ["0.weight"]
    expected = model[4].weight.detach()
    assert_close(fold_(model)[4].weight.detach(), expected)


def test_a_weight_made_by_a_hook_is_refused() -> None:
    with pytest.warns(FutureWarning):
        model = nn.Sequential(hooked_weight_norm(nn.Linear(3, 3)))
    with pytest.raises(ValueError, match=r"0\.weight is computed from weight_g and weight_v"):
        compand_(model)


def test_frozen_weights_are_left_alone_unless_asked_for() -> None:
    model = small()
    model[0].weight.requires_grad_(False)
    compand_(model)
    assert [site.name for site in sites(model)] == ["4.weight"]
    model = small().requires_grad_(False)
    with pytest.raises(ValueError, match="include_frozen=True"):
        compand_(model)
    compand_(model, learnable=True, include_frozen=True)
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert not fold_(model)[0].weight.requires_grad


def test_lazy_and_meta_weights_ask_to_be_materialized() -> None:
    with pytest.raises(ValueError, match="weight has no values yet: run one batch"):
        compand_(nn.Sequential(nn.LazyLinear(3)))
    with pytest.raises(ValueError, match="weight has no values yet, as it is on the meta device"):
        compand_(nn.Sequential(nn.Linear(2, 3, device="meta")))


def test_sparse_complex_and_quantized_weights_are_a_type_error() -> None:
    with pytest.raises(TypeError, match="complex64"):
        compand_(nn.Linear(2, 3, dtype=torch.complex64))
    layer = nn.Linear(2, 3)
    layer.weight = nn.Parameter(layer.weight.detach().to_sparse())
    with pytest.raises(TypeError, match="sparse_coo"):
        compand_(layer)
    layer.weight = nn.Parameter(torch.ones(3, 2, dtype=torch.int8), requires_grad=False)
    with pytest.raises(TypeError, match="int8"):
        compand_(layer, include_frozen=True)
    with pytest.raises(TypeError, match="weight has sparse gradients"):
        compand_(Tied(sparse=True))


def test_modules_without_a_weight_are_skipped_and_no_match_is_an_error() -> None:
    with pytest.raises(ValueError, match="matches nothing"):
        compand_(nn.Sequential(nn.ReLU(), nn.BatchNorm1d(2, affine=False)))
    with pytest.raises(ValueError, match="did you mean"):
        compand_(nn.ModuleDict({"decoder": nn.Linear(2, 2)}), where="decodr")


def test_unknown_options_are_refused_before_anything_changes() -> None:
    model = small()
    before = copy.deepcopy(model.state_dict())
    for options in ({"share": "block"}, {"overflow": "wrap"}, {"fn": "tan"}, {"a": 0.0}, {"b": float("nan")}):
        with pytest.raises(ValueError):
            compand_(model, **options)
    assert untouched(model, before)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_keep_their_dtype_and_their_weights(dtype) -> None:
    layer = nn.Linear(8, 8).to(dtype)
    before = layer.weight.detach().clone()
    compand_(layer, learnable=True)
    assert layer.weight.dtype == layer.parametrizations.weight.original.dtype == dtype
    assert layer.parametrizations.weight[0].a.dtype == torch.float32
    assert_close(layer.weight.detach(), before)


def test_channels_last_models_stay_channels_last() -> None:
    model = small().to(memory_format=torch.channels_last)
    compand_(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert fold_(model)[0].weight.is_contiguous(memory_format=torch.channels_last)


def test_a_copy_trains_apart_from_its_model() -> None:
    model = compand_(small(), learnable=True)
    twin = copy.deepcopy(model)
    for parameter in twin.parameters():
        parameter.data.mul_(1.1)
    assert not torch.equal(twin[0].weight, model[0].weight)
    assert isinstance(twin[0].parametrizations.weight[0], WeightCompander)


def test_several_uses_in_one_forward_can_share_one_evaluation() -> None:
    layer = compand_(nn.Linear(3, 3))
    with parametrize.cached():
        assert layer.weight is layer.weight


def test_saturation_is_reported_per_weight() -> None:
    model = compand_(small(), 0.7, 0.7)
    model[4].parametrizations.weight.original.data.view(-1)[:20] = 100.0
    assert saturation_report(model) == {"0.weight": 0.0, "4.weight": 0.25}
    assert set(saturation_report(compand_(small(), fn="arcsinh")).values()) == {0.0}


@pytest.mark.parametrize("value", [0.0, -0.2, float("nan")])
def test_a_learned_pair_that_left_its_range_is_named(value) -> None:
    model = compand_(small(), learnable=True)
    assert_valid(model)
    model[4].parametrizations.weight[0].b.data.fill_(value)
    with pytest.raises(ValueError, match=r"b of the compander of 4\.parametrizations.*got (0|-0.2|nan)"):
        assert_valid(model)


def test_saturated_weights_have_tiny_but_finite_gradients() -> None:
    layer = compand_(nn.Linear(2, 2))
    layer.parametrizations.weight.original.data.fill_(1e6)
    layer(torch.ones(1, 2)).sum().backward()
    gradient = layer.parametrizations.weight.original.grad
    assert ((gradient > 0) & (gradient < 1e-9)).all()


@pytest.mark.parametrize(("name", "value"), [("a", -0.2), ("b", -0.1), ("b", 0.0)])
def test_fold_refuses_a_learned_pair_that_has_left_its_range(name, value):
    model = compand_(nn.Linear(3, 2), learnable=True)
    with torch.no_grad():
        getattr(model.parametrizations.weight[0], name).fill_(value)
    with pytest.raises(UsageError):
        fold_(model)
    assert nn.utils.parametrize.is_parametrized(model)


@pytest.mark.parametrize("share", ["layer", "model"])
def test_a_companded_language_model_with_tied_embeddings_is_saved_by_its_own_method(share, tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    config = transformers.OPTConfig(
        vocab_size=32, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, ffn_dim=24, word_embed_proj_dim=16
    )
    model = compand_(transformers.OPTForCausalLM(config), learnable=True, share=share)
    model.save_pretrained(tmp_path)
    saved, state = load_file(tmp_path / "model.safetensors"), model.state_dict()
    held = {tensor.data_ptr() for name, tensor in state.items() if name in saved}
    assert {tensor.data_ptr() for tensor in state.values()} == held
    assert all(torch.equal(state[name], tensor) for name, tensor in saved.items())
    fold_(model).save_pretrained(tmp_path / "folded")
    again = transformers.OPTForCausalLM.from_pretrained(tmp_path / "folded")
    assert all(torch.equal(tensor, model.state_dict()[name]) for name, tensor in again.state_dict().items())


def test_a_curve_on_top_of_a_quantizer_is_refused() -> None:
    class Rounding(nn.Module):
        final = True

        def forward(self, w):
            return w.round()

    model = small()
    parametrize.register_parametrization(model[4], "weight", Rounding())
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match=r"4\.weight is quantized by Rounding: a curve would move it off its grid"):
        compand_(model, allow_existing=True)
    assert untouched(model, before)
