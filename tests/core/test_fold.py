import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations, parametrize

import weightsmith as ws
from weightsmith.core.errors import UsageError


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


@pytest.mark.parametrize(
    "wrap", [parametrizations.weight_norm, parametrizations.spectral_norm, parametrizations.orthogonal]
)
def test_fold_bakes_torchs_own_parametrizations(wrap):
    model = wrap(nn.Linear(4, 4))
    x = torch.randn(5, 4)
    before = model.eval()(x)
    ws.fold_(model.train())
    assert not parametrize.is_parametrized(model)
    assert torch.allclose(model(x), before, atol=1e-6)


def test_parameters_keep_their_identity_so_that_an_optimiser_goes_on():
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
