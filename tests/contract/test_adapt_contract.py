"""What only adapters promise: the model beneath is not touched, and whatever they did can be undone."""

import copy

import pytest
import torch
from cases.adapt import REWRITES as ADAPTERS
from checks import pairs

from weightsmith.adapt import (
    bone_disabled,
    bone_state_dict,
    load_bone,
    load_bone_state_dict_,
    merge_bone_,
    save_bone,
    set_adapter_,
    trainable_parameters,
    unload_bone_,
    unmerge_bone_,
)
from weightsmith.testing import build
from weightsmith.testing.measures import is_untouched, same, trained, values


def parameters(name):
    """Names of all that an adapter has to leave alone."""
    return [key for key, _ in build(name)[0].named_parameters(remove_duplicate=False)]


@pairs(ADAPTERS, 0)
def test_only_the_adapter_trains(rewrite, name):
    model, _ = trained(rewrite, name)
    learnt = {key: value for key, value in model.named_parameters() if value.requires_grad}
    assert learnt
    assert all(".bone.default" in f".{key}" and value.any() for key, value in learnt.items())
    assert trainable_parameters(model).trainable == sum(value.numel() for value in learnt.values())
    assert same(values(model, parameters(name)), values(build(name)[0], parameters(name)))


@pairs(ADAPTERS, 1)
def test_unmerging_restores_every_bit(rewrite, name):
    model, x = trained(rewrite, name)
    before, out = copy.deepcopy(model.state_dict()), model.eval()(x)
    merge_bone_(model)
    assert not same(model.state_dict(), before)
    assert unmerge_bone_(model) is model
    assert same(model.state_dict(), before)
    assert torch.equal(model(x), out)


@pairs(ADAPTERS, 2)
@pytest.mark.parametrize("merged", [False, True])
def test_unloading_leaves_no_trace(rewrite, name, merged):
    model, x = build(name)
    rewrite.begin(model, x)
    with torch.no_grad():
        for value in bone_state_dict(model).values():
            value.fill_(0.01)
    if merged:
        merge_bone_(model)
    assert is_untouched(unload_bone_(model), name)


@pairs(ADAPTERS, 3)
def test_a_resting_adapter_does_nothing(rewrite, name):
    model, x = trained(rewrite, name)
    acting = model.eval()(x)
    plain, _ = build(name)
    # training has moved statistics, which are not the adapter's
    plain.load_state_dict({key: value for key, value in model.state_dict().items() if ".bone." not in f".{key}"})
    with bone_disabled(model):
        assert torch.equal(model(x), plain.eval()(x))
    assert torch.equal(model(x), acting)
    assert not torch.equal(acting, plain(x))
    assert torch.equal(set_adapter_(model, [])(x), plain(x))
    assert torch.equal(set_adapter_(model, "default")(x), acting)


@pairs(ADAPTERS, 4)
def test_an_adapter_is_saved_without_its_model(rewrite, name, tmp_path):
    model, x = trained(rewrite, name)
    save_bone(model, tmp_path)
    fresh, _ = build(name)
    restored = load_bone(fresh, tmp_path)
    assert same(bone_state_dict(restored), bone_state_dict(model))
    another = load_bone_state_dict_(rewrite.begin(build(name)[0], x), bone_state_dict(model))
    assert torch.equal(another.eval()(x), restored.eval()(x))
