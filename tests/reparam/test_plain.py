import copy

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torch.testing import assert_close

from weightsmith import fold_
from weightsmith.core.errors import WeightsmithWarning
from weightsmith.reparam import compand_, load_plain_state_dict, plain_state_dict


def small() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(16, 5))


class Mask(nn.Module):
    def forward(self, w: torch.Tensor) -> torch.Tensor:
        return w * (w.abs() > 0.05)

    def right_inverse(self, w: torch.Tensor) -> torch.Tensor:
        return w


def test_a_plain_checkpoint_loads_into_a_companded_model() -> None:
    source, model = small(), compand_(small(), 0.6, 0.8, learnable=True)
    outcome = load_plain_state_dict(model, source.state_dict())
    assert not outcome.missing_keys
    assert not outcome.unexpected_keys
    assert_close(model[0].weight, source[0].weight)
    assert_close(model[3].bias, source[3].bias)
    assert float(model[0].parametrizations.weight[0].a.detach()) == pytest.approx(0.6)


def test_plain_state_dict_is_what_folding_would_give() -> None:
    model = nn.ModuleDict({"a": nn.Linear(3, 3), "b": small()})
    compand_(model, learnable=True, positive=True)
    plain = plain_state_dict(model)
    assert parametrize.is_parametrized(model["a"])
    folded = fold_(model).state_dict()
    assert plain.keys() == folded.keys()
    assert all(torch.equal(plain[key], folded[key]) for key in folded)


def test_plain_checkpoints_round_trip_under_a_further_parametrization() -> None:
    model = compand_(nn.Sequential(nn.Linear(6, 6)))
    parametrize.register_parametrization(model[0], "weight", Mask())
    plain = plain_state_dict(model)
    assert (plain["0.weight"] == 0).any()
    load_plain_state_dict(model, plain)
    assert_close(model[0].weight.detach(), plain["0.weight"])


def test_a_plain_checkpoint_out_of_reach_is_refused_by_name_and_changes_nothing() -> None:
    model = compand_(small())
    before, state = copy.deepcopy(model.state_dict()), small().state_dict()
    state["3.weight"][0, 0] = 5.0
    with pytest.raises(ValueError, match=r"3\.weight: .*max .* = 5"):
        load_plain_state_dict(model, state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_missing_and_unexpected_keys_are_reported_as_torch_does() -> None:
    model, state = compand_(small()), small().state_dict()
    del state["0.weight"]
    state["other"] = torch.zeros(1)
    with pytest.raises(RuntimeError, match="Missing key"):
        load_plain_state_dict(model, state)
    outcome = load_plain_state_dict(model, state, strict=False)
    assert outcome.missing_keys == ["0.parametrizations.weight.original"]
    assert outcome.unexpected_keys == ["other"]


def test_a_plain_checkpoint_takes_the_dtype_of_the_model() -> None:
    source, model = small().half(), compand_(small())
    load_plain_state_dict(model, source.state_dict())
    assert_close(model[3].weight.detach(), source[3].weight.detach().float())


def test_assigning_a_weight_writes_it_through_the_inverse() -> None:
    layer, w = compand_(nn.Linear(3, 2)), torch.full((2, 3), 0.4)
    layer.weight = w
    assert_close(layer.weight.detach(), w)


def test_companded_checkpoints_carry_their_pair_and_warn_when_it_differs() -> None:
    source, model = compand_(small(), 0.9, 0.8), compand_(small(), 0.9, 0.7)
    with pytest.warns(WeightsmithWarning, match="b is 0.8 in the checkpoint and was 0.7 here"):
        model.load_state_dict(source.state_dict())
    assert torch.equal(model[0].weight, source[0].weight)
    model.load_state_dict(source.state_dict())  # the same pair: no warning, which would be an error here


def test_learned_pairs_load_without_a_warning() -> None:
    source, model = compand_(small(), 0.5, 1.0, learnable=True), compand_(small(), learnable=True)
    model.load_state_dict(source.state_dict())
    assert torch.equal(model[3].weight, source[3].weight)


def test_plain_state_dict_folds_other_parametrizations_too_and_does_not_advance_them() -> None:
    model = nn.Sequential(nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), nn.Linear(3, 2), nn.Linear(2, 2))
    compand_(model, where=["0", "1"], allow_existing=True, learnable=True, positive=True)
    before = copy.deepcopy(model.state_dict())
    plain = plain_state_dict(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    folded = fold_(model).state_dict()
    assert plain.keys() == folded.keys()
    assert all(torch.equal(plain[key], value) for key, value in folded.items())


def test_a_checkpoint_of_another_curve_is_refused(tmp_path) -> None:
    torch.save(compand_(small(), fn="erf", a=2.0).state_dict(), tmp_path / "checkpoint.pt")
    state = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    with pytest.raises(RuntimeError, match="trained with fn='erf' and is 'arctan' here"):
        compand_(small(), a=2.0).load_state_dict(state)
    compand_(small(), fn="erf", a=2.0).load_state_dict(state)
    compand_(small(), a=2.0).load_state_dict(dict(state))  # where the curve has not been kept, nothing is compared
