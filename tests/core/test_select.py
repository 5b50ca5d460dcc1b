import pytest
from torch import nn

import weightsmith as ws
from weightsmith.core.errors import UsageError


def is_linear(name, module):
    return isinstance(module, nn.Linear)


@pytest.fixture
def model():
    block = lambda: nn.ModuleDict({"attn": nn.Linear(4, 4), "mlp": nn.Linear(4, 4), "norm": nn.LayerNorm(4)})  # noqa: E731
    return nn.ModuleDict({"blocks": nn.ModuleList([block(), block()]), "head": nn.Linear(4, 2)})


@pytest.mark.parametrize(
    ("where", "names"),
    [
        (None, ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp", "head"]),
        ("head", ["head"]),
        ("blocks.*.mlp", ["blocks.0.mlp", "blocks.1.mlp"]),
        ("blocks.1.*", ["blocks.1.attn", "blocks.1.mlp"]),
        (["*.attn", "head"], ["blocks.0.attn", "blocks.1.attn", "head"]),
        (["!head"], ["blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "blocks.1.mlp"]),
        (["blocks.*", "!*.attn"], ["blocks.0.mlp", "blocks.1.mlp"]),
        (lambda name, module: name.endswith("attn") and module.in_features == 4, ["blocks.0.attn", "blocks.1.attn"]),
    ],
)
def test_where_chooses(model, where, names):
    assert list(ws.select(model, where, default=is_linear)) == names


def test_what_is_supported_may_be_wider_than_the_default(model):
    chosen = ws.select(
        model, "*.norm", default=is_linear, supported=lambda _, module: isinstance(module, nn.Linear | nn.LayerNorm)
    )
    assert list(chosen) == ["blocks.0.norm", "blocks.1.norm"]


def test_the_root_module_is_chosen_too():
    assert list(ws.select(nn.Linear(2, 2), default=is_linear)) == [""]


def test_no_match_lists_near_names(model):
    with pytest.raises(UsageError, match=r"'blocks\.0\.atn' matches nothing.*did you mean 'blocks\.0\.attn'"):
        ws.select(model, "blocks.0.atn", default=is_linear)


def test_no_match_of_a_predicate_lists_what_there_is(model):
    with pytest.raises(ValueError, match="matches nothing"):
        ws.select(model, lambda name, module: False, default=is_linear)


def test_a_model_without_anything_suitable_is_named():
    with pytest.raises(UsageError, match="ReLU has no module"):
        ws.select(nn.ReLU(), default=is_linear)


@pytest.mark.parametrize("where", [3, [1, 2], {"a": 1}, b"x"])
def test_other_types_are_refused(model, where):
    with pytest.raises(TypeError, match="where must be"):
        ws.select(model, where, default=is_linear)


def test_what_an_adapter_adds_is_no_layer_of_the_model_but_what_it_trains_in_full_is(model):
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(
        nn.ModuleDict({"net": model}), peft.LoraConfig(target_modules=["attn"], modules_to_save=["head"])
    )
    chosen = [name.removeprefix("base_model.model.net.") for name in ws.select(adapted, None, default=is_linear)]
    attn = [f"blocks.{i}.{part}" for i in (0, 1) for part in ("attn.base_layer", "mlp")]
    assert chosen == [*attn, "head.original_module", "head.modules_to_save.default"]
    assert len(ws.select(adapted, "*attn*", default=is_linear)) == 2
    assert len(ws.select(adapted, lambda name, _: "lora_A" in name, default=is_linear)) == 2
