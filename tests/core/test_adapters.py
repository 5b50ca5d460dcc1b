from pathlib import Path

import pytest

from weightsmith.core.adapters import refuse_adapter_tensors
from weightsmith.core.errors import UsageError


@pytest.mark.parametrize(
    "names",
    [
        ["q.weight", "q.bone.default"],
        ["a.b.qweight", "a.b.bone.other", "c.weight"],
        ["weight", "bone.default"],
        ["q.weight", "q.bone.one", "q.bone.two", "q.bone_merged.one"],
    ],
)
def test_an_adapter_beside_weights_is_refused(names):
    with pytest.raises(UsageError, match="x holds a Bone adapter beside its base model"):
        refuse_adapter_tensors(Path("x"), names)


@pytest.mark.parametrize(
    "name",
    ["q.lora_A.default.weight", "q.base_layer.weight", "e.lora_embedding_A.default", "q.miss_block.default"],
)
def test_peft_adapters_beside_weights_are_refused_too(name):
    with pytest.raises(UsageError, match="merge_and_unload"):
        refuse_adapter_tensors(Path("x"), ["embed.weight", name])


@pytest.mark.parametrize(
    "names",
    [
        ["skeleton.bone.weight", "skeleton.joint.weight"],  # a submodule that is called so
        ["bone.weight", "joint.weight"],
        ["bone.layer.weight"],
        ["q.weight", "q.bone.default", "q.bone_merged.default"],  # in the weight already
        [],
    ],
)
def test_other_names_are_no_adapter(names):
    refuse_adapter_tensors(Path("x"), names)


def test_a_folder_of_an_adapter_says_how_it_becomes_a_model(tmp_path):
    (tmp_path / "bone_config.json").write_text("{}")
    with pytest.raises(UsageError, match="--lora-mode dense --base BASE"):
        refuse_adapter_tensors(tmp_path, [])
