"""Into the weights and out again."""

import copy
import dataclasses
import math
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from weightsmith.adapt import (
    BoneConfig,
    apply_bone_,
    bone_state_dict,
    load_bone_state_dict_,
    merge_bone_,
    set_adapter_,
    unload_bone_,
    unmerge_bone_,
)
from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.core.fold import fold_

CONFIGS = [
    BoneConfig(r=4),
    BoneConfig(r=4, variant="mini", mini_r=2),
    BoneConfig(r=4, variant="row"),
    BoneConfig(r=4, variant="col"),
    BoneConfig(r=4, variant="free", tile=(2, 3)),
]
each = pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.variant)


@pytest.fixture
def layer():
    torch.manual_seed(0)
    return nn.Linear(8, 12)


@each
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("keep_base", [True, "cpu"])
def test_unmerging_restores_every_bit(config, dtype, keep_base, layer, shake):
    former = layer.to(dtype).weight.detach().clone()
    shake(apply_bone_(layer, config), 0.3)
    merge_bone_(layer, keep_base=keep_base)
    assert layer.weight.dtype == dtype
    assert not torch.equal(layer.weight, former)
    assert torch.equal(unmerge_bone_(layer).weight, former)


@each
def test_merging_computes_the_same_and_rounds_once(config, layer, x, shake):
    adapted = shake(apply_bone_(layer, config), 0.3)(x)
    assert torch.allclose(merge_bone_(layer)(x), adapted, atol=1e-5)
    unmerge_bone_(layer).bfloat16()
    layer.bone["default"].data = layer.bone["default"].data.float()
    exact = layer.sequenced(layer.weight.double(), list(layer.acting()))
    assert torch.equal(merge_bone_(layer).weight, exact.float().bfloat16())


@each
def test_without_the_former_weight_a_formula_undoes_it_to_rounding(config, layer, shake):
    former = layer.weight.detach().clone()
    shake(apply_bone_(layer, config), 0.3)
    merge_bone_(layer, keep_base=False)
    assert torch.allclose(unmerge_bone_(layer).weight, former, atol=1e-5)


def test_adapters_in_sequence_are_undone_by_formula_last_one_first(layer, shake):
    former = layer.weight.detach().clone()
    for seed, (name, config) in enumerate({"a": CONFIGS[3], "b": CONFIGS[4], "c": CONFIGS[0]}.items()):
        shake(apply_bone_(layer, config, name), 0.1, seed)
    merge_bone_(set_adapter_(layer, ["a", "c", "b"]), keep_base=False)
    assert torch.allclose(unmerge_bone_(layer).weight, former, atol=1e-5)


def test_what_no_formula_undoes_says_so(layer, shake):
    for name in ("a", "b"):
        shake(apply_bone_(layer, CONFIGS[2], name), 0.3)
    merge_bone_(set_adapter_(layer, ["a", "b"]), keep_base=False)
    with pytest.raises(UsageError, match="keep_base=True"):
        unmerge_bone_(layer)


def test_a_singular_block_is_an_error_and_no_infinity(layer):
    apply_bone_(layer, CONFIGS[3])
    layer.bone["default"].data[:] = -torch.eye(4)
    merged = merge_bone_(layer, keep_base=False).weight.clone()
    with pytest.raises(UsageError, match="singular"):
        unmerge_bone_(layer)
    assert torch.equal(layer.weight, merged)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_values_that_are_not_finite_are_refused_and_nothing_changes(bad, net, shake):
    shake(apply_bone_(net, BoneConfig(r=4)))
    net[4].bone["default"].data[0, 0] = bad
    before = {key: value.clone() for key, value in net.state_dict().items()}
    with pytest.raises(UsageError, match="merging 4 gives values that are not finite"):
        merge_bone_(net)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items() if "bone" not in key)
    assert not merge_bone_(net, safe_merge=False)[4].weight.isfinite().all()


def test_merging_twice_and_unmerging_twice_do_nothing_with_a_warning(layer, shake):
    former = layer.weight.detach().clone()
    merged = merge_bone_(shake(apply_bone_(layer, CONFIGS[0]))).weight.clone()
    with pytest.warns(WeightsmithWarning, match="merged already"):
        merge_bone_(layer)
    assert torch.equal(layer.weight, merged)
    unmerge_bone_(layer)
    with pytest.warns(WeightsmithWarning, match="not merged"):
        unmerge_bone_(layer)
    assert torch.equal(layer.weight, former)


def test_a_tied_weight_is_untied_on_request_only(llama, shake):
    model = llama(tie=True)
    shake(apply_bone_(model, BoneConfig(r=8, where="lm_head")), 0.3)
    ids = torch.arange(6)[None]
    adapted = model(ids).logits
    with pytest.raises(UsageError, match=r"tied to that of model\.embed_tokens"):
        merge_bone_(model)
    merge_bone_(model, untie=True)
    assert torch.allclose(model(ids).logits, adapted, atol=1e-5)
    assert model.lm_head.weight is not model.model.embed_tokens.weight
    assert unmerge_bone_(model).lm_head.weight is model.model.embed_tokens.weight


def test_an_untied_weight_trains_after_unloading_if_the_tied_one_did(llama, shake):
    model = llama(tie=True)
    merge_bone_(shake(apply_bone_(model, BoneConfig(r=8, where="lm_head"))), untie=True)
    assert unload_bone_(model, merge=True).lm_head.weight.requires_grad


def test_merging_no_adapter_says_so(layer, shake):
    set_adapter_(shake(apply_bone_(layer, CONFIGS[2])), [])
    with pytest.warns(WeightsmithWarning, match="no adapter is active"):
        merge_bone_(layer)


def test_a_merged_model_can_move_before_it_is_unmerged(layer, shake):
    former = layer.weight.detach().clone()
    merge_bone_(shake(apply_bone_(layer, CONFIGS[2]))).double()
    assert torch.equal(unmerge_bone_(layer).weight, former.double())


@pytest.mark.parametrize("merge", [True, False])
def test_a_merged_model_unloads_as_asked(merge, layer, x, shake):
    before = layer(x)
    adapted = merge_bone_(shake(apply_bone_(layer, CONFIGS[2])))(x)
    assert torch.equal(unload_bone_(layer, merge=merge)(x), adapted if merge else before)


@each
def test_a_merged_state_is_never_applied_twice(config, net, x, shake):
    config = dataclasses.replace(config, where=["0", "2"])
    fresh = apply_bone_(copy.deepcopy(net), config)
    model = merge_bone_(shake(apply_bone_(net, config)))
    state = copy.deepcopy(model.state_dict())
    before = copy.deepcopy(fresh.state_dict())
    for wrapped in (fresh, nn.Sequential(fresh)):
        prefix = "" if wrapped is fresh else "0."
        with pytest.raises(UsageError, match=r"adapter default merged into the weight of 0, .*apply it again"):
            wrapped.load_state_dict({prefix + name: tensor for name, tensor in state.items()})
    assert all(torch.equal(tensor, before[name]) for name, tensor in fresh.state_dict().items())
    merge_bone_(fresh).load_state_dict(state)
    assert torch.equal(fresh(x), model(x))
    with pytest.raises(UsageError, match="without adapters, and the model has merged default into its own"):
        fresh.load_state_dict(before)
    with pytest.raises(UsageError, match="unmerge_bone_ first"):
        load_bone_state_dict_(fresh, bone_state_dict(model))
    unmerge_bone_(fresh).load_state_dict(unmerge_bone_(model).state_dict())
    assert torch.equal(fresh(x), model(x))


def test_copies_of_a_model_check_what_they_load_and_an_unloaded_one_does_not(layer, shake):
    state = merge_bone_(shake(apply_bone_(copy.deepcopy(layer), CONFIGS[0]))).state_dict()
    apply_bone_(layer, CONFIGS[0])
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        with pytest.raises(UsageError, match="merged into the weight of the model"):
            twin.load_state_dict(state)
    assert not unload_bone_(layer)._load_state_dict_pre_hooks
    layer.load_state_dict({name: tensor for name, tensor in state.items() if "bone" not in name})


def test_a_merged_state_loads_into_a_plain_model_as_what_it_computes(layer, x, shake):
    plain = copy.deepcopy(layer)
    model = merge_bone_(shake(apply_bone_(layer, CONFIGS[0])))
    plain.load_state_dict(model.state_dict(), strict=False)
    assert torch.equal(plain(x), model(x))


@pytest.mark.parametrize("verb", [merge_bone_, unload_bone_])
def test_a_layer_that_was_parametrized_since_is_folded_first(verb, layer, x, shake):
    shake(apply_bone_(layer, CONFIGS[2]))
    parametrize.register_parametrization(layer, "weight", nn.Identity())
    adapted = layer(x)
    with pytest.raises(UsageError, match="call fold_ on the model first"):
        verb(layer)
    assert torch.equal(layer(x), adapted)
    assert torch.allclose(fold_(layer)(x), adapted, atol=1e-6)
    assert torch.allclose(unload_bone_(layer, merge=True)(x), adapted, atol=1e-5)
    assert type(layer) is nn.Linear


def test_what_was_quantized_is_no_longer_so_after_a_merge(net, x, shake, tmp_path):
    grid = pytest.importorskip("weightsmith.quantize")
    grid.round_to_nearest_(net)
    adapted = shake(apply_bone_(net, BoneConfig(r=4, variant="row", where=["0", "2"])))(x)
    assert torch.allclose(unload_bone_(net, merge=True)(x), adapted, atol=1e-5)
    with pytest.raises(ValueError, match=r"0\.weight"):
        grid.save_quantized(net, tmp_path / "out", format="weightsmith")
