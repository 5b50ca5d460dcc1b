"""Folders and layers of the installed PEFT: written there and read here, and back; the same numbers, only faster."""

import copy
import json
import math
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from weightsmith.adapt import (
    BoneConfig,
    accelerate_peft_,
    apply_bone_,
    bone_state_dict,
    load_bone,
    save_bone,
    set_adapter_,
)
from weightsmith.core.errors import UsageError

peft = pytest.importorskip("peft")
close = {"rtol": 1e-5, "atol": 1e-6}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 3)

    def forward(self, x):
        return self.head(torch.tanh(self.second(torch.tanh(self.first(x)))))


LAYERS = ["first", "second"]
# our arguments, PEFT's, and the largest block size that fits
FORMS = {
    "miss": ({}, {}),
    "mini": ({"variant": "mini", "mini_r": 4}, {"init_weights": "mini", "mini_r": 4}),
    "col": ({"variant": "col"}, {"init_weights": "bat"}),
}
each = pytest.mark.parametrize("form", FORMS)


@pytest.fixture
def x():
    return torch.randn(2, 5, 16, generator=torch.Generator().manual_seed(1))


def theirs(form, r=8, **options):
    model = peft.get_peft_model(Net(), peft.MissConfig(r=r, target_modules=LAYERS, **FORMS[form][1], **options))
    return shaken(model)


def ours(form, r=8, **options):
    return shaken(apply_bone_(Net(), BoneConfig(r=r, where=LAYERS, **FORMS[form][0], **options)))


def shaken(model, seed=3):
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=generator)
    return model


@each
@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ["head"]}], ids=["adapter", "with a head"])
def test_a_folder_of_peft_is_read_here(form, extra, x, tmp_path):
    model = theirs(form, **extra)
    model.save_pretrained(tmp_path)
    assert torch.allclose(load_bone(Net(), tmp_path)(x), model(x), **close)


@each
@pytest.mark.parametrize("extra", [{}, {"modules_to_save": ("head",)}], ids=["adapter", "with a head"])
def test_a_folder_of_ours_is_read_by_peft(form, extra, x, tmp_path):
    model = ours(form, **extra)
    save_bone(model, tmp_path, format="peft")
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.allclose(loaded(x), model(x), **close)
    assert torch.allclose(loaded.merge_and_unload()(x), model(x), **close)


@each
def test_there_and_back_is_the_same_adapter(form, tmp_path):
    model = theirs(form)
    model.save_pretrained(tmp_path / "one")
    save_bone(load_bone(Net(), tmp_path / "one"), tmp_path / "two", format="peft")
    one, two = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    one, two = (peft.MissConfig.from_pretrained(tmp_path / name) for name in ("one", "two"))
    for field in ("r", "mini_r", "init_weights", "miss_dropout", "target_modules", "bias"):
        assert (field == "mini_r" and form != "mini") or getattr(one, field) == getattr(two, field)


@each
@pytest.mark.parametrize("pickled", [False, True], ids=["safetensors", "pickle"])
def test_an_old_bone_folder_is_read_here_and_turned_into_one_that_peft_opens(form, pickled, x, tmp_path):
    model = theirs(form)
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    old = {key: config[key] for key in ("r", "target_modules", "init_weights", "bias", "modules_to_save")}
    old |= {"peft_type": "BONE"} | ({"mini_r": 4} if form == "mini" else {})
    (tmp_path / "adapter_config.json").write_text(json.dumps(old))
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    tensors = {key.replace("miss_block", "bone_block"): tensor for key, tensor in tensors.items()}
    if pickled:
        (tmp_path / "adapter_model.safetensors").unlink()
        torch.save(tensors, tmp_path / "adapter_model.bin")
    else:
        save_file(tensors, tmp_path / "adapter_model.safetensors")
    with pytest.raises(Exception, match="BONE"):
        peft.PeftModel.from_pretrained(Net(), tmp_path)
    if pickled:
        with pytest.raises(UsageError, match="allow_pickle=True"):
            load_bone(Net(), tmp_path)
    here = load_bone(Net(), tmp_path, allow_pickle=pickled)
    assert torch.allclose(here(x), model(x), **close)
    save_bone(here, tmp_path / "new", format="peft")
    assert torch.allclose(peft.PeftModel.from_pretrained(Net(), tmp_path / "new")(x), model(x), **close)


@pytest.mark.parametrize("form", ["miss", "mini"])
@pytest.mark.parametrize("r", [7, 8])
def test_it_is_exported_as_an_exact_lora(form, r, x, tmp_path):
    model = ours(form, r=r, rank_pattern={"second": 4}, modules_to_save=("head",))
    save_bone(model, tmp_path, format="lora")
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path)
    assert torch.allclose(loaded(x), model(x), **close)
    assert peft.LoraConfig.from_pretrained(tmp_path).r == r


def test_an_embedding_and_a_conv1d_are_exported_as_lora_as_well(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    for net, x in (
        (nn.Sequential(nn.Embedding(9, 10), nn.Linear(10, 4)), torch.randint(9, (3, 4))),
        (nn.Sequential(transformers.pytorch_utils.Conv1D(6, 10), nn.Tanh()), torch.randn(3, 10)),
    ):
        fresh = copy.deepcopy(net)
        model = shaken(apply_bone_(net, BoneConfig(r=4, where="0")))
        save_bone(model, tmp_path, format="lora")
        assert torch.allclose(peft.PeftModel.from_pretrained(fresh, tmp_path)(x), model(x), **close)


@pytest.mark.parametrize("names", [["blocks.0.up"], ["blocks.0.up", "blocks.1.up"], ["blocks.1.up", "up"], ["up"]])
def test_peft_adapts_the_very_layers_that_were_adapted_here(names, tmp_path):
    def build():
        torch.manual_seed(0)
        blocks = nn.ModuleList(nn.ModuleDict({"up": nn.Linear(8, 8), "down": nn.Linear(8, 8)}) for _ in range(2))
        return nn.ModuleDict({"blocks": blocks, "up": nn.Linear(8, 8)})

    model = apply_bone_(build(), BoneConfig(r=4, where=names))
    save_bone(model, tmp_path, format="peft")
    loaded = peft.PeftModel.from_pretrained(build(), tmp_path).base_model.model
    assert [n for n, m in loaded.named_modules() if isinstance(m, peft.tuners.miss.MissLinear)] == sorted(names)


def test_two_bats_are_applied_in_the_order_that_peft_applies_them_in(x, tmp_path):
    model = theirs("col")
    model.add_adapter("other", peft.MissConfig(r=4, target_modules=LAYERS, init_weights="bat"))
    model.base_model.set_adapter(["default", "other"])
    shaken(model, seed=5)
    model.save_pretrained(tmp_path)
    here = load_bone(Net(), tmp_path)
    load_bone(here, tmp_path / "other", adapter_name="other")
    assert torch.allclose(set_adapter_(here, ["default", "other"])(x), model(x), **close)
    assert not torch.allclose(set_adapter_(here, ["other", "default"])(x), model(x), **close)


def test_folders_that_cannot_be_read_say_why(tmp_path):
    peft.get_peft_model(Net(), peft.LoraConfig(target_modules=LAYERS)).save_pretrained(tmp_path / "lora")
    with pytest.raises(UsageError, match="a 'LORA' adapter, not MISS or BONE"):
        load_bone(Net(), tmp_path / "lora")
    theirs("miss", bias="all").save_pretrained(tmp_path / "bias")
    with pytest.raises(UsageError, match="bias='all'"):
        load_bone(Net(), tmp_path / "bias")
    theirs("miss").save_pretrained(tmp_path / "miss")
    (tmp_path / "miss" / "adapter_model.safetensors").unlink()
    with pytest.raises(UsageError, match=r"has no adapter_model\.safetensors"):
        load_bone(Net(), tmp_path / "miss")


def test_an_accelerated_model_can_be_pickled(x):
    model = accelerate_peft_(theirs("miss"))
    again = pickle.loads(pickle.dumps(model))
    assert type(again.base_model.model.first) is type(model.base_model.model.first)
    assert torch.equal(again(x), model(x))


@each
@pytest.mark.parametrize("r", [7, 8])
def test_an_accelerated_model_computes_and_learns_the_same(form, r, x):
    if form == "col" and r == 7:
        return
    plain = theirs(form, r=r)
    fast = accelerate_peft_(copy.deepcopy(plain))
    gradients = []
    for model in (plain, fast):
        leaf = x.clone().requires_grad_()
        model(leaf).square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in model.parameters() if p.requires_grad)])
    assert torch.allclose(fast(x), plain(x), **close)
    assert all(torch.allclose(left, right, rtol=1e-4, atol=1e-5) for left, right in zip(*gradients, strict=True))


@each
def test_an_accelerated_model_is_saved_loaded_and_merged_by_peft(form, x, tmp_path):
    model = accelerate_peft_(theirs(form))
    expected = model(x)
    model.save_pretrained(tmp_path)
    assert torch.allclose(peft.PeftModel.from_pretrained(Net(), tmp_path)(x), expected, **close)
    with model.disable_adapter():
        assert torch.allclose(model(x), Net()(x), **close)
    assert torch.allclose(model.merge_and_unload()(x), expected, **close)


@each
def test_where_the_fused_form_does_not_apply_peft_computes(form, x):
    dropping = theirs(form, miss_dropout=0.5)
    fast = accelerate_peft_(copy.deepcopy(dropping))
    for model in (dropping, fast):
        torch.manual_seed(0)
        model.train()
    outputs = []
    for model in (dropping, fast):
        torch.manual_seed(0)
        outputs.append(model(x))
    assert torch.allclose(*outputs, **close)
    assert torch.allclose(fast.eval()(x), dropping.eval()(x), **close)
    half = accelerate_peft_(theirs(form).bfloat16())
    assert half(x.bfloat16()).dtype == torch.bfloat16


@each
def test_autocast_gives_the_dtype_that_peft_gives(form, x):
    plain = theirs(form)
    with torch.autocast("cpu", torch.bfloat16):
        expected, found = plain(x), accelerate_peft_(copy.deepcopy(plain))(x)
    assert found.dtype == expected.dtype
    assert torch.allclose(found.float(), expected.float(), rtol=0.05, atol=0.05)


def test_an_accelerated_bat_keeps_an_eighth_of_what_peft_keeps():
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(512, 512)), peft.MissConfig(r=64, target_modules=["0"], init_weights="bat")
    )
    x = torch.randn(64, 512, requires_grad=True)

    def kept():
        own = {parameter.data_ptr() for parameter in model.parameters()}
        sizes = {}

        def pack(tensor):
            if tensor.untyped_storage().data_ptr() not in own:
                sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            y = model(x)
        return math.copysign(sum(sizes.values()), y.requires_grad)

    before = kept()
    accelerate_peft_(model)
    assert kept() <= before / 8


def test_the_same_adapter_trains_alike_here_and_there(x):
    model, mine = theirs("col"), ours("col")
    for name, tensor in bone_state_dict(mine).items():
        layer = model.base_model.model.get_submodule(name.removesuffix(".bone"))
        tensor.copy_(layer.miss_block["default"].detach())
    results = []
    for net in (model, mine):
        optimizer = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=0.01)
        for _ in range(5):
            optimizer.zero_grad()
            net(x).square().mean().backward()
            optimizer.step()
        results.append(net(x))
    assert torch.allclose(*results, rtol=1e-4, atol=1e-5)


def test_modules_to_save_are_written_by_their_full_names(tmp_path):
    net = nn.ModuleDict(
        {"body": nn.ModuleDict({"up": nn.Linear(8, 8), "head": nn.Linear(8, 8)}), "out": nn.Linear(8, 8)}
    )
    model = apply_bone_(copy.deepcopy(net), BoneConfig(r=4, where="body.up", modules_to_save=("head",)))
    save_bone(model, tmp_path, format="peft")
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["body.head"]
    loaded = peft.PeftModel.from_pretrained(net, tmp_path).base_model.model
    assert [n for n, m in loaded.named_modules() if isinstance(m, peft.utils.ModulesToSaveWrapper)] == ["body.head"]


def test_names_that_peft_would_take_for_others_are_refused(tmp_path):
    net = nn.ModuleDict({"up": nn.Linear(8, 8), "head": nn.Linear(8, 8), "overhead": nn.Linear(8, 8)})
    model = apply_bone_(net, BoneConfig(r=4, where="up", modules_to_save=("head",)))
    with pytest.raises(UsageError, match="PEFT would take overhead for one of modules_to_save"):
        save_bone(model, tmp_path, format="peft")
    assert not list(tmp_path.iterdir())
    save_bone(model, tmp_path)


def test_layers_of_peft_are_not_adapted_once_more():
    model = peft.get_peft_model(Net(), peft.LoraConfig(target_modules=LAYERS))
    with pytest.raises(UsageError, match=r"base_model\.model\.first is a layer of PEFT"):
        apply_bone_(model, BoneConfig(r=8))
    apply_bone_(model.merge_and_unload(), BoneConfig(r=8, where=LAYERS))
