import copy
from functools import partial

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.utils import parametrizations, parametrize, prune

import weightsmith as ws
from weightsmith.core.errors import UsageError
from weightsmith.quantize import prepare_ofq_
from weightsmith.quantize.after_training.rtn import RoundToNearest
from weightsmith.reparam import compand_


class Twice(nn.Module):
    def forward(self, x):
        return 2 * x

    def right_inverse(self, w):
        return w / 2


class Half(nn.Module):
    def forward(self, x):
        return x.half()

    def right_inverse(self, w):
        return w.float()


@given(st.integers(1, 6), st.integers(1, 6), st.booleans())
def test_fold_keeps_class_keys_and_outputs(inputs, outputs, bias):
    model = nn.Sequential(nn.Linear(inputs, outputs, bias=bias), nn.ReLU())
    keys, x = list(model.state_dict()), torch.randn(3, inputs)
    parametrize.register_parametrization(model[0], "weight", Twice())
    before = model(x)
    assert ws.fold_(model) is model
    assert type(model[0]) is nn.Linear
    assert list(model.state_dict()) == keys
    assert torch.equal(model(x), before)


def _ofq(**options):
    return lambda layer: prepare_ofq_(layer, activation_bits=None, qk_reparam=False, weight_bits=4, **options)


def _parametrized(make):
    def wrap(layer):
        parametrize.register_parametrization(layer, "weight", make(layer.weight))
        return layer

    return wrap


WRAPS = {
    "weight_norm": parametrizations.weight_norm,
    "weight_norm over all": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "orthogonal by householder": lambda layer: parametrizations.orthogonal(layer, orthogonal_map="householder"),
    "weight_norm over spectral_norm": lambda layer: parametrizations.spectral_norm(parametrizations.weight_norm(layer)),
    "compander": partial(compand_, include_frozen=True),
    "learned positive compander": partial(compand_, learnable=True, positive=True, include_frozen=True),
    "compander on weight_norm": lambda layer: compand_(parametrizations.weight_norm(layer), allow_existing=True),
    "statsq": _ofq(weight="statsq"),
    "lsq": _ofq(weight="lsq"),
    "round to nearest": _parametrized(RoundToNearest),
}
"""Every parametrization of torch and of this library."""

each_wrap = pytest.mark.parametrize("wrap", WRAPS.values(), ids=WRAPS)


def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 4, bias=False)))
    model[2].requires_grad_(False)
    return model


def names(model):
    """All that an optimizer and a checkpoint know: order, shape, dtype and flag of parameters, and keys."""
    parameters = [(name, p.shape, p.dtype, p.requires_grad, type(p)) for name, p in model.named_parameters()]
    return parameters, list(model.state_dict()), {name for name, _ in model.named_buffers()}


@each_wrap
def test_fold_keeps_the_function_and_restores_the_set_of_parameters(wrap):
    model = network()
    plain = names(model)
    for layer in (model[0], model[2], model[3][0]):
        wrap(layer)
    x = torch.randn(5, 4)
    before = model.eval()(x)
    assert ws.fold_(model.train()) is model
    assert not any(parametrize.is_parametrized(module) for module in model.modules())
    assert names(model) == plain
    assert torch.allclose(model(x), before, atol=1e-6)


@each_wrap
def test_an_optimizer_that_was_built_before_trains_the_folded_weights(wrap):
    model = wrap(nn.Linear(4, 4))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ws.fold_(model)
    before = model.weight.clone()
    model(torch.randn(5, 4)).square().sum().backward()
    optimizer.step()
    assert not torch.equal(model.weight, before)


@each_wrap
def test_a_parametrized_layer_that_is_used_twice_folds_once(wrap):
    layer = wrap(nn.Linear(4, 4))
    model = nn.Sequential(layer, nn.Tanh(), layer)
    x = torch.randn(5, 4)
    before = model.eval()(x)
    ws.fold_(model)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]
    assert torch.allclose(model(x), before, atol=1e-6)


def test_a_buffer_stays_a_buffer():
    model = nn.Module()
    model.register_buffer("scale", torch.ones(3))
    parametrize.register_parametrization(model, "scale", Twice())
    ws.fold_(model)
    assert dict(model.named_buffers()).keys() == {"scale"}
    assert not list(model.parameters())


def test_weights_of_a_recurrent_layer_fold():
    model = parametrizations.weight_norm(nn.LSTM(3, 4), "weight_hh_l0")
    x = torch.randn(5, 2, 3)
    before, _ = model(x)
    ws.fold_(model)
    assert torch.allclose(model(x)[0], before, atol=1e-6)
    assert len(list(model.parameters())) == 4


def test_parameters_keep_their_identity_so_that_an_optimizer_goes_on():
    layer = nn.Linear(3, 3)
    weight = layer.weight
    parametrize.register_parametrization(layer, "weight", Twice())
    ws.fold_(layer)
    assert layer.weight is weight
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias"]


def test_tied_weights_fold_once_and_stay_tied():
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": nn.Linear(3, 3)})
    model["b"].weight = model["a"].weight
    twice = Twice()
    parametrize.register_parametrization(model["a"], "weight", twice)
    original = model["a"].parametrizations.weight.original
    model["b"].weight = original
    parametrize.register_parametrization(model["b"], "weight", twice, unsafe=True)
    model["b"].parametrizations.weight.original = original
    with torch.no_grad():
        original.fill_(1.5)
    ws.fold_(model)
    assert model["a"].weight is model["b"].weight
    assert torch.equal(model["a"].weight, torch.full((3, 3), 3.0))


def tied():
    torch.manual_seed(0)
    model = nn.ModuleDict({"embedding": nn.Embedding(5, 4), "head": nn.Linear(4, 5, bias=False)})
    nn.init.normal_(model["embedding"].weight, std=0.1)
    model["head"].weight = model["embedding"].weight
    return model


def outputs(model):
    return model["head"](model["embedding"](torch.arange(5)))


@pytest.mark.filterwarnings("ignore:head\\.weight is tied")
@pytest.mark.parametrize("wrap", [compand_, _ofq()], ids=["compander", "statsq"])
def test_tied_weights_that_our_verbs_write_fold_to_one_parameter(wrap):
    model = wrap(tied())
    before = outputs(model)
    ws.fold_(model)
    assert torch.equal(outputs(model), before)
    assert model["head"].weight is model["embedding"].weight
    assert [name for name, _ in model.named_parameters()] == ["embedding.weight"]


def test_a_tied_weight_of_which_one_owner_is_parametrized_is_refused_with_advice_that_works():
    model = tied()
    parametrizations.spectral_norm(model["head"])
    before = outputs(model.eval())
    with pytest.raises(UsageError, match=r"head\.weight and embedding\.weight share one parameter") as error:
        ws.fold_(model)
    assert parametrize.is_parametrized(model["head"])
    exec(str(error.value).partition("untie them first: ")[2], {"model": model, "torch": torch})
    ws.fold_(model)
    assert torch.allclose(outputs(model), before, atol=1e-6)
    assert len(list(model.parameters())) == 2


def test_folding_one_owner_of_a_tied_weight_is_refused_with_advice_that_works():
    model = compand_(tied())
    before = outputs(model)
    with pytest.raises(UsageError, match="share one parameter") as error:
        ws.fold_(model, where="head")
    assert torch.equal(outputs(model), before)
    exec(str(error.value).partition("untie them first: ")[2], {"model": model, "torch": torch})
    ws.fold_(model, where="head")
    assert torch.equal(outputs(model), before)
    assert not parametrize.is_parametrized(model["head"])


def test_one_original_that_is_written_in_two_ways_is_refused_with_advice_that_works():
    model = tied()
    parametrize.register_parametrization(model["head"], "weight", Twice())
    original = model["head"].parametrizations.weight.original
    model["embedding"].weight = original
    parametrize.register_parametrization(model["embedding"], "weight", nn.Identity())
    assert model["embedding"].parametrizations.weight.original is original
    before = outputs(model)
    with pytest.raises(UsageError, match="share one parameter") as error:
        ws.fold_(model)
    exec(str(error.value).partition("untie them first: ")[2], {"model": model, "torch": torch})
    assert torch.equal(outputs(ws.fold_(model)), before)


def test_a_weight_that_is_pruned_inside_its_parametrization_is_refused_with_advice_that_works():
    model = nn.Sequential(compand_(nn.Linear(4, 4)))
    prune.l1_unstructured(model[0].parametrizations.weight, "original", amount=0.5)
    x = torch.randn(2, 4)
    before = model(x)
    with pytest.raises(UsageError, match="computed by a hook") as error:
        ws.fold_(model)
    assert parametrize.is_parametrized(model[0])
    exec(str(error.value).partition("for pruning by ")[2], {"model": model, "torch": torch})
    ws.fold_(model)
    assert torch.equal(model(x), before)
    assert [name for name, _ in model.named_parameters()] == ["0.weight", "0.bias"]


def test_hooks_stay_and_so_does_what_they_compute():
    model = nn.Sequential(nn.Linear(4, 4), compand_(nn.Linear(4, 4)))
    prune.l1_unstructured(model[0], "weight", amount=0.5)
    x = torch.randn(2, 4)
    before = model(x)
    assert torch.equal(ws.fold_(model)(x), before)
    assert prune.is_pruned(model[0])


def test_a_frozen_weight_stays_frozen():
    layer = nn.Linear(2, 2)
    layer.weight.requires_grad_(False)
    parametrize.register_parametrization(layer, "weight", Twice())
    assert not ws.fold_(layer).weight.requires_grad


def test_a_parametrization_that_changes_the_dtype_folds_to_that_dtype():
    layer = nn.Linear(2, 2, bias=False)
    parametrize.register_parametrization(layer, "weight", Half(), unsafe=True)
    ws.fold_(layer)
    assert layer.weight.dtype == torch.float16


def test_where_folds_only_what_it_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for layer in model:
        parametrize.register_parametrization(layer, "weight", Twice())
    ws.fold_(model, where="0")
    assert [parametrize.is_parametrized(layer) for layer in model] == [False, True]
    with pytest.raises(UsageError, match="matches nothing"):
        ws.fold_(model, where="0")


def test_a_plain_model_is_returned_untouched():
    model = nn.Linear(2, 2)
    weight = model.weight
    assert ws.fold_(model).weight is weight


def test_a_value_that_is_not_finite_is_refused_before_anything_changes():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    for layer in model:
        parametrize.register_parametrization(layer, "weight", Twice())
    with torch.no_grad():
        model[1].parametrizations.weight.original[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"1\.weight"):
        ws.fold_(model)
    assert all(parametrize.is_parametrized(layer) for layer in model)


def test_folding_a_deep_copy_leaves_the_original_as_it_was():
    model = nn.Linear(2, 2)
    parametrize.register_parametrization(model, "weight", Twice())
    before = model.weight.clone()
    ws.fold_(copy.deepcopy(model))
    assert torch.equal(model.weight, before)
    assert torch.equal(ws.fold_(model).weight, before)


def test_a_parametrization_that_says_it_is_invalid_is_refused_before_anything_changes():
    class Invalid(Twice):
        def assert_valid(self, name):
            raise UsageError(f"{name} is wrong")

    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    parametrize.register_parametrization(model[0], "weight", Twice())
    parametrize.register_parametrization(model[1], "weight", Invalid())
    with pytest.raises(UsageError, match=r"1\.weight is wrong"):
        ws.fold_(model)
    assert parametrize.is_parametrized(model[0])


def test_a_sharded_model_is_refused_before_anything_changes(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1)
    try:
        model = fully_shard(compand_(nn.Sequential(nn.Linear(4, 4))), mesh=init_device_mesh("cpu", (1,)))
        with pytest.raises(UsageError, match=r"0\.weight is sharded"):
            ws.fold_(model)
        assert parametrize.is_parametrized(model[0])
    finally:
        dist.destroy_process_group()


def test_a_tied_transformers_model_that_was_companded_saves_and_loads_after_folding(tmp_path):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1
    )
    model = compand_(transformers.GPT2LMHeadModel(config), overflow="clip").eval()
    ids = torch.arange(5)[None]
    before = model(input_ids=ids).logits
    ws.fold_(model).save_pretrained(tmp_path)
    loaded = transformers.GPT2LMHeadModel.from_pretrained(tmp_path)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    assert torch.equal(loaded(input_ids=ids).logits, before)
