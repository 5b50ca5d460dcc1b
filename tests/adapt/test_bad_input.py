"""What cannot be done is refused before anything changes, in words that say what to do."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn.utils import parametrizations

from weightsmith.adapt import (
    BoneConfig,
    accelerate_peft_,
    apply_bone_,
    bone_disabled,
    bone_linear,
    bone_state_dict,
    load_bone,
    load_bone_state_dict_,
    merge_bone_,
    save_bone,
    set_adapter_,
    unload_bone_,
)
from weightsmith.core.errors import UsageError


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"r": 0}, "r must be a whole number of at least 1, got 0"),
        ({"r": -3}, "r must be a whole number"),
        ({"r": 2.5}, "r must be a whole number"),
        ({"r": True}, "r must be a whole number"),
        ({"rank_pattern": {"a": 0}}, r"rank_pattern\['a'\] must be"),
        ({"variant": "bat"}, "variant 'bat' is not known"),
        ({"dropout": 1.0}, "dropout must be at least 0 and below 1"),
        ({"variant": "col", "dropout": 0.1}, "dropout must be 0 for variant 'col'"),
        ({"variant": "mini"}, "mini_r goes with variant 'mini'"),
        ({"mini_r": 4}, "mini_r goes with variant 'mini'"),
        ({"variant": "mini", "mini_r": 0}, "mini_r must be a whole number"),
        ({"variant": "free"}, "tile goes with variant 'free'"),
        ({"variant": "free", "tile": (0, 1)}, "tile must be two whole numbers"),
        ({"modules_to_save": "head"}, "modules_to_save must be a tuple"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(options, message):
    with pytest.raises(UsageError, match=message):
        BoneConfig(**options)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (BoneConfig(), "r must be at most 8, the input width of 0, got 64"),
        (BoneConfig(r=4, variant="row"), "both sides of 4, a weight of 3 x 12, got 4: the nearest that does is 3"),
        (BoneConfig(r=3, variant="col", where="0"), "nearest that does is 2"),
        (BoneConfig(r=4, variant="mini", mini_r=5), "mini_r must divide 8, the output width of 0, got 5"),
        (BoneConfig(r=4, where="5"), "where='5' matches nothing"),
        (BoneConfig(r=4, modules_to_save=("7",)), "modules_to_save holds '7'"),
    ],
)
def test_an_adapter_that_does_not_fit_is_refused_and_nothing_changes(config, message, net):
    before = copy.deepcopy(net.state_dict())
    with pytest.raises(UsageError, match=message):
        apply_bone_(net, config)
    assert list(net.state_dict()) == list(before)
    assert all(parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 4, 1), nn.Embedding(8, 8)], ids=["conv", "embedding"])
@pytest.mark.parametrize("config", [BoneConfig(2, "row", ""), BoneConfig(2, "mini", "", mini_r=2)], ids=["row", "mini"])
def test_only_miss_is_defined_on_convolutions_and_embeddings(layer, config):
    with pytest.raises(UsageError, match="variant must be 'miss'"):
        apply_bone_(layer, config)


@pytest.mark.parametrize(
    "layer",
    [
        nn.ConvTranspose2d(4, 4, 1),
        nn.Embedding(4, 4, max_norm=1.0),
        nn.Bilinear(4, 4, 4),
        type("Scaled", (nn.Embedding,), {"forward": lambda self, x: 2 * nn.Embedding.forward(self, x)})(4, 4),
    ],
    ids=["transposed convolution", "clipped embedding", "bilinear", "scaled embedding"],
)
def test_layers_that_cannot_be_adapted_never_match(layer):
    with pytest.raises(UsageError, match="matches nothing"):
        apply_bone_(nn.Sequential(layer), BoneConfig(r=2, where="0"))


def test_attention_that_multiplies_by_itself_is_explained():
    model = nn.Sequential(nn.MultiheadAttention(8, 2))
    with pytest.raises(UsageError, match="in_proj_weight"):
        apply_bone_(model, BoneConfig(r=2, where="*in_proj*"))
    with pytest.raises(UsageError, match="out_proj"):
        apply_bone_(model, BoneConfig(r=2))


def test_two_layers_with_one_weight_are_never_both_adapted(llama):
    with pytest.raises(UsageError, match=r"model\.embed_tokens and lm_head share one weight"):
        apply_bone_(llama(), BoneConfig(r=8, where=["model.embed_tokens", "lm_head"]))
    with pytest.raises(UsageError, match="all or none"):
        apply_bone_(llama(), BoneConfig(r=8, modules_to_save=("lm_head",)))


def test_layers_whose_forward_or_weight_is_somebody_elses_are_refused(net):
    with torch.device("meta"), pytest.raises(UsageError, match="meta device"):
        apply_bone_(nn.Linear(8, 8), BoneConfig(r=4))
    with pytest.raises(UsageError, match=r"weight is computed by _SpectralNorm: call weightsmith\.fold_"):
        apply_bone_(parametrizations.spectral_norm(nn.Linear(8, 8)), BoneConfig(r=4))
    net[0].forward = lambda x: x
    with pytest.raises(UsageError, match="forward method of 0 has been replaced"):
        apply_bone_(net, BoneConfig(r=4, where="0"))


def test_a_quantized_layer_refuses_forms_that_need_its_weight_and_merging():
    layer = type("Packed", (nn.Module,), {"in_features": 8, "out_features": 8, "forward": lambda self, x: x})()
    with pytest.raises(UsageError, match="variant must be row, miss or mini"):
        apply_bone_(layer, BoneConfig(r=4, variant="col"))
    apply_bone_(layer, BoneConfig(r=4, variant="row"))
    with pytest.raises(UsageError, match="cannot be merged"):
        merge_bone_(layer)


def test_dropout_is_refused_where_there_is_nothing_to_drop(x):
    with pytest.raises(UsageError, match="dropout must be 0 for"):
        apply_bone_(nn.Embedding(8, 8), BoneConfig(r=4, where="", dropout=0.1))
    net = apply_bone_(nn.Linear(8, 8), BoneConfig(r=4, dropout=0.1), "a")
    set_adapter_(apply_bone_(net, BoneConfig(r=4, variant="col"), "b"), ["a", "b"])
    with pytest.raises(UsageError, match="dropout cannot be trained beside"):
        net(x)


def test_names_of_adapters_are_checked(net):
    for name in ("", "a.b"):
        with pytest.raises(UsageError, match="adapter_name must be"):
            apply_bone_(net, BoneConfig(r=4, where="0"), name)
    for name in ("keys", "training", "half"):  # torch keeps parameters as attributes of a module
        with pytest.raises(UsageError, match="adapter_name must not be an attribute"):
            apply_bone_(net, BoneConfig(r=4, where="0"), name)
    assert all(parameter.requires_grad for parameter in net.parameters())
    apply_bone_(net, BoneConfig(r=4, where="0"))
    with pytest.raises(UsageError, match="'default' is taken"):
        apply_bone_(net, BoneConfig(r=4, where="0"))
    with pytest.raises(UsageError, match="adapter 'defualt' is not known: did you mean 'default'"):
        set_adapter_(net, "defualt")


def test_only_one_acting_adapter_may_train_modules_in_full(net):
    for name in ("a", "b"):
        apply_bone_(net, BoneConfig(r=4, where="0", modules_to_save=("4",)), name)
    with pytest.raises(UsageError, match="modules_to_save at most"):
        set_adapter_(net, ["a", "b"])


def test_a_model_without_adapters_says_so(net):
    for call in (merge_bone_, unload_bone_, bone_state_dict, lambda model: set_adapter_(model, "a")):
        with pytest.raises(UsageError, match="must carry adapters"):
            call(net)


def test_a_merged_model_refuses_what_would_act_on_the_merged_weights(net):
    merge_bone_(apply_bone_(net, BoneConfig(r=4, where="0")))
    for call in (
        lambda: apply_bone_(net, BoneConfig(r=4, where="0"), "second"),
        lambda: set_adapter_(net, []),
        lambda: bone_disabled(net).__enter__(),
    ):
        with pytest.raises(UsageError, match="unmerge_bone_ first"):
            call()


def test_a_block_of_another_shape_is_refused():
    with pytest.raises(UsageError, match=r"block of shape \(2, 4, 4\) does not fit a weight of \(12, 8\) as 'col'"):
        bone_linear(torch.ones(8), torch.ones(12, 8), None, torch.zeros(2, 4, 4), "col")
    with pytest.raises(UsageError, match="variant 'bat' is not known"):
        bone_linear(torch.ones(8), torch.ones(12, 8), None, torch.zeros(3, 4, 4), "bat")


def test_the_fused_form_refuses_a_weight_that_trains():
    weight = torch.ones(4, 4, requires_grad=True)
    with pytest.raises(UsageError, match="fused must be False or None"):
        bone_linear(torch.ones(4), weight, None, torch.zeros(2, 4), "miss", fused=True)


def test_a_state_that_does_not_fit_is_refused(net):
    apply_bone_(net, BoneConfig(r=4, where="0"))
    for state, message in (
        ({}, "lacks 0.bone"),
        ({"0.bone": torch.zeros(4, 8), "1.bone": torch.zeros(1)}, "'1.bone'"),
        ({"0.bone": torch.zeros(2, 8)}, r"shape \(4, 8\), got \(2, 8\)"),
    ):
        with pytest.raises(UsageError, match=message):
            load_bone_state_dict_(net, state)


def test_folders_that_hold_no_adapter_or_one_for_another_model_are_refused(net, tmp_path):
    with pytest.raises(UsageError, match="holds no adapter"):
        load_bone(net, tmp_path)
    save_bone(apply_bone_(copy.deepcopy(net), BoneConfig(r=4, where="2")), tmp_path / "a")
    with pytest.raises(UsageError, match="adapts '2', which is no layer"):
        load_bone(nn.Sequential(nn.Linear(8, 8)), tmp_path / "a")
    with pytest.raises(UsageError, match="does not fit"):
        load_bone(nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 9)), tmp_path / "a")
    (tmp_path / "a" / "bone.safetensors").write_bytes(b"short")
    with pytest.raises(UsageError, match="is damaged"):
        load_bone(net, tmp_path / "a")
    assert all(type(module) is not nn.Module and not hasattr(module, "bone") for module in net.modules())


@pytest.mark.parametrize("damage", ["a saved tensor is missing", "a block is missing", "a block holds integers"])
def test_a_damaged_folder_leaves_the_model_as_it_was(damage, net, tmp_path):
    config = BoneConfig(r=4, where="0", modules_to_save=("2",))
    save_bone(apply_bone_(copy.deepcopy(net), config), tmp_path)
    tensors = load_file(tmp_path / "bone.safetensors")
    if damage == "a saved tensor is missing":
        message = "lacks '2.bias'"
        del tensors["saved.2.bias"]
    elif damage == "a block is missing":
        message = "lacks the tensor of '0'"
        del tensors["bone.0"]
    else:
        message = "torch.int64"
        tensors["bone.0"] = tensors["bone.0"].long()
    save_file(tensors, tmp_path / "bone.safetensors")
    with pytest.raises(UsageError, match=message):
        load_bone(net, tmp_path)
    assert not hasattr(net, "_bone")
    assert all(parameter.requires_grad for parameter in net.parameters())


def test_formats_that_cannot_hold_an_adapter_say_which_can(net, tmp_path):
    save = lambda format, **options: save_bone(  # noqa: E731
        apply_bone_(copy.deepcopy(net), BoneConfig(r=4, **options)), tmp_path / "x", format=format
    )
    with pytest.raises(UsageError, match="format 'gguf' is not known"):
        save("gguf")
    with pytest.raises(UsageError, match="not 'row': use format='native'"):
        save("peft", variant="row", where="0")
    with pytest.raises(UsageError, match="not a rank_pattern"):
        save("peft", rank_pattern={"0": 2})
    with pytest.raises(UsageError, match="not 'col'"):
        save("lora", variant="col", where="0")
    with pytest.raises(UsageError, match="single layer"):
        save_bone(apply_bone_(nn.Linear(8, 8), BoneConfig(r=4)), tmp_path / "x", format="peft")
    conv = nn.Sequential(nn.Conv2d(8, 8, 1))
    for format in ("peft", "lora"):
        with pytest.raises(UsageError, match="use format='native'"):
            save_bone(apply_bone_(copy.deepcopy(conv), BoneConfig(r=4, where="0")), tmp_path / "x", format=format)
    assert not (tmp_path / "x").exists()


def test_accelerating_needs_a_peft_model_with_miss_layers(net):
    pytest.importorskip("peft")
    with pytest.raises(UsageError, match="has none"):
        accelerate_peft_(net)
