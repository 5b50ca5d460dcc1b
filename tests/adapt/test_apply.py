"""Adapters on models: they change nothing at first, train alone, live side by side, and leave without a trace."""

import copy
import dataclasses
import json
import pickle

import pytest
import torch
from torch import nn

import weightsmith.adapt as adapt
from weightsmith.adapt import BoneConfig, apply_bone_, bone_disabled, set_adapter_, unload_bone_
from weightsmith.adapt.registry import bone_layers
from weightsmith.core.errors import WeightsmithWarning

CONFIGS = {
    "miss": BoneConfig(r=4),
    "mini": BoneConfig(r=4, variant="mini", mini_r=2),
    "row": BoneConfig(r=4, variant="row"),
    "col": BoneConfig(r=4, variant="col"),
    "free": BoneConfig(r=4, variant="free", tile=(2, 1)),
    "free1": BoneConfig(r=4, variant="free", tile=(1, 2)),
}
each = pytest.mark.parametrize("name", CONFIGS)
BODY = ["0", "2"]


def on_body(name, **options):
    return dataclasses.replace(CONFIGS[name], where=BODY, **options)


def losses(model, optimizer, x, steps):
    found = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = (model(x) - 1).square().mean()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    return found


@each
def test_a_new_adapter_changes_nothing_and_only_it_trains(name, net, x):
    before, weights = net(x), copy.deepcopy(net.state_dict())
    assert apply_bone_(net, on_body(name)) is net
    assert torch.allclose(net(x), before, atol=1e-6)
    trained = [name for name, parameter in net.named_parameters() if parameter.requires_grad]
    assert trained == ["0.bone.default", "2.bone.default"]
    found = losses(net, torch.optim.Adam([p for p in net.parameters() if p.requires_grad], 0.01), x, 10)
    assert found[-1] < found[0]
    assert all(torch.equal(net.state_dict()[key], value) for key, value in weights.items())


@each
def test_unloading_gives_back_what_went_in(name, net, x, shake):
    net[0].bias.requires_grad_(False)
    before, keys, classes = net(x), list(net.state_dict()), [type(module) for module in net.modules()]
    shake(apply_bone_(net, on_body(name)))
    assert not torch.allclose(net(x), before)
    assert unload_bone_(net) is net
    assert torch.equal(net(x), before)
    assert list(net.state_dict()) == keys
    assert [type(module) for module in net.modules()] == classes
    assert [key for key, parameter in net.named_parameters() if not parameter.requires_grad] == ["0.bias"]
    assert not hasattr(net, "_bone")


@each
def test_unloading_with_merge_leaves_plain_weights_that_do_the_same(name, net, x, shake):
    keys = list(net.state_dict())
    adapted = shake(apply_bone_(net, on_body(name)))(x)
    unload_bone_(net, merge=True)
    assert type(net[0]) is nn.Linear
    assert list(net.state_dict()) == keys
    assert torch.allclose(net(x), adapted, atol=1e-6)


@each
def test_copies_and_pickles_are_the_same_model(name, net, x, shake):
    expected = shake(apply_bone_(net, on_body(name)))(x)
    for twin in (copy.deepcopy(net), pickle.loads(pickle.dumps(net))):
        assert torch.equal(twin(x), expected)
        assert type(unload_bone_(twin)[0]) is nn.Linear


@each
def test_a_folder_keeps_whether_kernels_are_fused(name, net, tmp_path):
    fresh = copy.deepcopy(net)
    adapt.save_bone(apply_bone_(net, on_body(name, fused=False)), tmp_path)
    model = adapt.load_bone(copy.deepcopy(fresh), tmp_path)
    assert not any(form.fused for _, layer in bone_layers(model) for form in layer.bone_forms.values())
    settings = json.loads((tmp_path / "bone_config.json").read_text())
    del settings["fused"]  # as it was written before there was a choice
    (tmp_path / "bone_config.json").write_text(json.dumps(settings))
    assert all(f.fused for _, layer in bone_layers(adapt.load_bone(fresh, tmp_path)) for f in layer.bone_forms.values())


@each
def test_save_load_continue_equals_never_having_stopped(name, net, x, tmp_path):
    def ready(model):
        apply_bone_(model, on_body(name))
        return model, torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.01)

    fresh = copy.deepcopy(net)
    model, optimizer = ready(net)
    losses(model, optimizer, x, 3)
    adapt.save_bone(model, tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    straight = losses(model, optimizer, x, 3)
    resumed = adapt.load_bone(fresh, tmp_path)
    optimizer = torch.optim.AdamW([p for p in resumed.parameters() if p.requires_grad], lr=0.01)
    optimizer.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    assert losses(resumed, optimizer, x, 3) == straight


@pytest.mark.parametrize("name", ["miss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("row", "col"))])
def test_an_adapted_model_compiles_without_a_graph_break(name, net, x, shake):
    shake(apply_bone_(net, on_body(name)))
    torch._dynamo.reset()
    compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
    assert torch.allclose(compiled(x), net(x), atol=1e-6)
    compiled(x).sum().backward()
    assert net[0].bone["default"].grad.isfinite().all()


def test_the_default_leaves_the_head_of_a_language_model_alone(llama):
    for tie in (True, False):
        model = apply_bone_(llama(tie), BoneConfig(r=8))
        names = [name.rpartition(".")[2] for name, _ in bone_layers(model)]
        assert names == 2 * ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def classifier(kind):
    transformers = pytest.importorskip("transformers")
    blocks = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    text = {"vocab_size": 32, "max_position_embeddings": 16, "num_labels": 3, "pad_token_id": 0}
    config, cls = {
        "bert": (transformers.BertConfig(**blocks, **text), transformers.BertForSequenceClassification),
        "roberta": (transformers.RobertaConfig(**blocks, **text), transformers.RobertaForSequenceClassification),
        "llama": (transformers.LlamaConfig(**blocks, **text), transformers.LlamaForSequenceClassification),
        "vit": (
            transformers.ViTConfig(**blocks, num_labels=3, image_size=8, patch_size=4),
            transformers.ViTForImageClassification,
        ),
        "tokens": (transformers.BertConfig(**blocks, **text), transformers.BertForTokenClassification),
    }[kind]
    torch.manual_seed(0)
    return cls(config)


@pytest.mark.parametrize(
    ("kind", "head"),
    [
        ("bert", "classifier"),
        ("roberta", "classifier"),
        ("llama", "score"),
        ("vit", "classifier"),
        ("tokens", "classifier"),
    ],
)
def test_the_default_leaves_classifiers_alone_and_says_so(kind, head):
    model = classifier(kind)
    wrapped = nn.ModuleDict({"inner": copy.deepcopy(model)})
    # three labels: "row" could not even be put on the head
    with pytest.warns(WeightsmithWarning, match=rf"^{head} will not train: .*modules_to_save=\('{head}',\)"):
        apply_bone_(model, BoneConfig(r=8, variant="row"))
    names = [name for name, _ in bone_layers(model)]
    assert names
    assert not any(name.startswith(head) for name in names)
    with pytest.warns(WeightsmithWarning, match=rf"^inner\.{head} will not train"):
        apply_bone_(wrapped, BoneConfig(r=8))
    for quiet in (BoneConfig(r=8, modules_to_save=(head,)), BoneConfig(r=2, where=["*", f"!*{head}*"])):
        apply_bone_(classifier(kind), quiet)


def test_a_head_that_timm_names_is_left_alone():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.fc = nn.Linear(8, 8), nn.Linear(8, 3)

        def get_classifier(self):
            return self.fc

    model = Net()
    with pytest.warns(WeightsmithWarning, match="^fc will not train"):
        apply_bone_(model, BoneConfig(r=4, variant="row"))
    assert [name for name, _ in bone_layers(model)] == ["body"]


@each
def test_without_fused_kernels_functions_of_functions_work(name, net, x, shake):
    model = shake(apply_bone_(net.double(), on_body(name, fused=False)))
    x = x.double()
    fused = copy.deepcopy(model)
    for _, layer in bone_layers(fused):
        layer.bone_forms = {key: dataclasses.replace(form, fused=True) for key, form in layer.bone_forms.items()}
    assert torch.allclose(model(x), fused(x))
    blocks = {key: p for key, p in model.named_parameters() if p.requires_grad}

    def loss(blocks, row):
        return torch.func.functional_call(model, blocks, (row[None],)).square().sum()

    each_row = torch.func.vmap(torch.func.grad(loss), in_dims=(None, 0))(blocks, x)
    for key in blocks:
        summed = torch.autograd.grad(fused(x).square().sum(), fused.get_parameter(key))[0]
        assert torch.allclose(each_row[key].sum(0), summed)
    leaf = x.clone().requires_grad_()
    assert torch.autograd.gradcheck(model, leaf)
    assert torch.autograd.gradgradcheck(model, leaf)
    hessian = torch.func.hessian(loss)(blocks, x[0])
    assert all(part.isfinite().all() for row in hessian.values() for part in row.values())
    with pytest.raises(RuntimeError):
        torch.func.vmap(
            torch.func.grad(lambda b, r: torch.func.functional_call(fused, b, (r[None],)).sum()), (None, 0)
        )(blocks, x)


def test_where_chooses_and_rank_pattern_overrules_r(net):
    apply_bone_(net, BoneConfig(r=4, variant="row", where=["*", "!4"], rank_pattern={"2": 2}))
    assert {name: tuple(layer.bone["default"].shape) for name, layer in bone_layers(net)} == {
        "0": (2, 4, 4),
        "2": (4, 2, 2),
    }


def test_a_shared_module_is_adapted_once(x):
    layer = nn.Linear(8, 8)
    model = apply_bone_(nn.Sequential(layer, layer), BoneConfig(r=4))
    assert sum(parameter.requires_grad for parameter in model.parameters()) == 1


def test_the_newest_adapter_acts_until_others_are_chosen(net, x, shake):
    first = shake(apply_bone_(net, on_body("row"), "first"))(x)
    second = shake(apply_bone_(net, on_body("miss"), "second"), seed=3)(x)
    assert not torch.allclose(first, second)
    assert torch.equal(set_adapter_(net, "first")(x), first)
    assert [n for n, p in net.named_parameters() if p.requires_grad] == ["0.bone.first", "2.bone.first"]
    with bone_disabled(net):
        plain = net(x)
    assert torch.equal(net(x), first)
    assert torch.equal(set_adapter_(net, [])(x), plain)


def test_additive_forms_add_up_in_any_order(x, shake):
    net = nn.Linear(8, 12, bias=False)
    base = net(x)
    changes = []
    for name in ("miss", "mini", "row", "free1"):
        apply_bone_(net, CONFIGS[name], name)
        changes.append(shake(net, seed=len(changes))(x) - base)
    for order in (["miss", "mini", "row", "free1"], ["row", "free1", "mini", "miss"]):
        assert torch.allclose(set_adapter_(net, order)(x), base + sum(changes), atol=1e-5)


def test_forms_that_need_the_weight_are_applied_in_order(x, shake):
    net = nn.Linear(8, 12, bias=False)
    shake(apply_bone_(net, CONFIGS["col"], "a"), 0.5)
    shake(apply_bone_(net, CONFIGS["free"], "b"), 0.5, seed=3)
    a, b, weight = net.bone["a"], net.bone["b"], net.weight
    once = weight + adapt.bone_delta(weight, a, "col")
    both = once + adapt.bone_delta(once, b, "free")
    assert torch.allclose(set_adapter_(net, ["a", "b"])(x), x @ both.T, atol=1e-5)
    assert not torch.allclose(set_adapter_(net, ["b", "a"])(x), x @ both.T, atol=1e-3)


def test_dropout_acts_in_training_alone(net, x, shake):
    for name in ("miss", "row"):
        model = shake(apply_bone_(copy.deepcopy(net), on_body(name, dropout=0.5)))
        assert torch.equal(model(x), model(x))
        model.train()
        assert not torch.equal(model(x), model(x))


def test_modules_to_save_train_in_full_and_belong_to_their_adapter(net, x, shake):
    before = net(x)
    apply_bone_(net, BoneConfig(r=4, where="0", modules_to_save=("4",)), "first")
    assert torch.allclose(net(x), before, atol=1e-6)
    first = shake(net)(x)
    apply_bone_(net, BoneConfig(r=4, where="0", modules_to_save=("4",)), "second")
    assert torch.allclose(net(x), before, atol=1e-6)
    second = shake(net, seed=5)(x)
    assert torch.equal(set_adapter_(net, "first")(x), first)
    assert net[4].weight.requires_grad
    assert torch.equal(set_adapter_(net, "second")(x), second)
    with bone_disabled(net):
        assert torch.equal(net(x), before)
    assert set(adapt.bone_state_dict(net, "first")) == {"0.bone", "4.weight", "4.bias"}
    assert torch.equal(unload_bone_(net)(x), before)


def test_the_adapter_is_float32_where_the_weight_is_half(net, x):
    net = apply_bone_(net.bfloat16(), BoneConfig(r=4))
    assert net[0].bone["default"].dtype == torch.float32
    assert net(x.bfloat16()).dtype == torch.bfloat16
    assert apply_bone_(nn.Linear(8, 8).double(), BoneConfig(r=4)).bone["default"].dtype == torch.float64


@pytest.mark.parametrize("kind", ["linear", "conv", "grouped", "embedding", "conv1d"])
def test_miss_goes_on_other_layers_and_merging_agrees(kind, shake):
    if kind == "conv1d":
        conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    torch.manual_seed(0)
    layer, x = {
        "linear": lambda: (nn.Linear(10, 6), torch.randn(3, 10)),
        "conv": lambda: (nn.Conv1d(10, 6, 3, padding=1, padding_mode="circular"), torch.randn(10, 7)),
        "grouped": lambda: (nn.Conv2d(12, 8, 3, 2, groups=2), torch.randn(2, 12, 7, 7)),
        "embedding": lambda: (nn.Embedding(9, 10, padding_idx=2), torch.randint(9, (2, 5))),
        "conv1d": lambda: (conv1d(6, 10), torch.randn(2, 3, 10)),
    }[kind]()
    before, plain = layer(x), type(layer)
    apply_bone_(layer, BoneConfig(r=4, where=""))
    assert torch.equal(layer(x), before)
    shake(layer, 0.5)
    if kind == "embedding":
        layer.bone["default"].data[:, 2] = 0  # never trained: it has no gradient
    adapted = layer(x)
    assert not torch.allclose(adapted, before)
    adapted.sum().backward()
    assert layer.bone["default"].grad.abs().sum() > 0
    assert kind != "embedding" or not layer.bone["default"].grad[:, 2].any()
    assert torch.allclose(adapt.merge_bone_(layer)(x), adapted, atol=1e-5)
    assert torch.equal(adapt.unmerge_bone_(layer)(x), adapted)
    assert type(unload_bone_(layer)) is plain


@each
def test_a_conv1d_takes_every_form(name, shake):
    conv1d = pytest.importorskip("transformers").pytorch_utils.Conv1D
    layer, x = conv1d(12, 8), torch.randn(2, 3, 8)
    shake(apply_bone_(layer, CONFIGS[name]))
    adapted = layer(x)
    assert torch.allclose(adapt.merge_bone_(layer)(x), adapted, atol=1e-5)


class Quantized(nn.Module):
    """Integer weights with a scale, as libraries make them: no float weight to be seen."""

    def __init__(self, linear):
        super().__init__()
        self.out_features, self.in_features = linear.weight.shape
        self.register_buffer("scale", linear.weight.detach().abs().max() / 127)
        self.register_buffer("qweight", (linear.weight.detach() / self.scale).round().char())

    def forward(self, x):
        return nn.functional.linear(x, self.qweight * self.scale)


@pytest.mark.parametrize("name", ["miss", "mini", "row", "free1"])
def test_forms_that_need_no_weight_train_on_quantized_layers(name, net, x):
    model = nn.Sequential(Quantized(net[0]), nn.Tanh(), Quantized(net[2]))
    before = model(x)
    apply_bone_(model, CONFIGS[name])
    assert torch.equal(model(x), before)
    found = losses(model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01), x, 10)
    assert found[-1] < found[0]
    assert torch.equal(unload_bone_(model)(x), before)


def test_a_torchao_layer_is_a_quantized_layer(x):
    quantization = pytest.importorskip("torchao.quantization")
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig())
    before = model(x)
    apply_bone_(model, BoneConfig(r=4, variant="row"))
    assert torch.allclose(model(x), before, atol=1e-6)
    found = losses(model, torch.optim.Adam([p for p in model.parameters() if p.requires_grad], 0.01), x, 10)
    assert found[-1] < found[0]


def test_the_fast_path_of_a_transformer_layer_does_not_bypass_an_adapter(shake):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    shake(apply_bone_(layer, BoneConfig(r=4, where="linear*")))
    with torch.no_grad():
        fast = layer(x)
    assert torch.allclose(fast, layer(x), atol=1e-6)
    assert not unload_bone_(layer)._forward_pre_hooks


def test_an_encoder_takes_a_padding_mask_in_evaluation(shake):
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2).eval()
    x, mask = torch.randn(2, 3, 8), torch.tensor([[False, False, False], [False, False, True]])
    with pytest.warns(WeightsmithWarning, match=r"layers\.0\.self_attn\.in_proj_weight.*will not train"):
        apply_bone_(encoder, BoneConfig(r=4))
    shake(encoder)
    with torch.no_grad():
        found = encoder(x, src_key_padding_mask=mask)
    assert torch.allclose(found[~mask], encoder(x, src_key_padding_mask=mask)[~mask], atol=1e-5)
    assert unload_bone_(encoder).use_nested_tensor is True


def test_hooks_of_accelerate_go_on_working(net, x, shake):
    hooks = pytest.importorskip("accelerate.hooks")
    before = net(x)
    hooks.add_hook_to_module(net[0], hooks.ModelHook())
    adapted = shake(apply_bone_(net, BoneConfig(r=4, where="0")))(x)
    assert not torch.allclose(adapted, before)
    assert torch.equal(unload_bone_(net)(x), before)


def test_gradient_checkpointing_trains_the_same(llama, shake):
    ids = torch.arange(8)[None]
    gradients = []
    for reentrant in (None, True, False):
        model = llama()
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        shake(apply_bone_(model.train(), BoneConfig(r=8, variant="row")), 0.01)
        model(input_ids=ids, labels=ids).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad]))
    assert all(torch.allclose(gradients[0], other, atol=1e-6) for other in gradients[1:])


def test_the_trainer_trains_it_and_resumes_from_its_checkpoint(llama, tmp_path):
    transformers = pytest.importorskip("transformers")
    rows = [{"input_ids": [i % 32, (i + 1) % 32, 3], "labels": [i % 32, (i + 1) % 32, 3]} for i in range(16)]

    def train(resume):
        arguments = transformers.TrainingArguments(
            str(tmp_path), max_steps=4, save_steps=2, per_device_train_batch_size=2, learning_rate=1e-2,
            report_to=[], disable_tqdm=True, use_cpu=True, logging_strategy="no",
        )  # fmt: skip
        model = apply_bone_(llama(), BoneConfig(r=8, variant="row"))
        assert isinstance(model, transformers.PreTrainedModel)
        transformers.Trainer(model, arguments, train_dataset=rows).train(resume_from_checkpoint=resume)
        return adapt.bone_state_dict(model)

    straight = train(None)
    resumed = train(str(tmp_path / "checkpoint-2"))
    assert any(tensor.any() for tensor in straight.values())
    assert all(torch.equal(straight[name], resumed[name]) for name in straight)


def test_a_sentence_tells_how_many_parameters_train(net):
    apply_bone_(net, BoneConfig(r=4, where="0"))
    assert str(adapt.trainable_parameters(net)) == "32 of 251 parameters train (12.7 %)"
