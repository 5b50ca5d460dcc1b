"""Adapter tensors inside whole-model checkpoints: ``from_pretrained`` drops them, so nothing may read past them.

``Trainer`` saves an adapted model as a whole: the frozen weights under their own names and, beside them, what has
trained. Loaded as a plain model, such a file is the untrained base.
"""

import re
from collections.abc import Iterable
from pathlib import Path

from weightsmith.core.errors import UsageError

BONE_CONFIG = "bone_config.json"
"""What makes a folder one of ``weightsmith.adapt.save_bone``."""
BONE_TENSORS = "bone.safetensors"
BONE_MERGED = "bone_merged"
"""``<layer>.bone_merged.<adapter>`` in a state dict says that the layer's weight has the adapter in it."""

_PEFT = re.compile(r"(^|\.)(base_layer|lora_(embedding_)?[AB]|lora_magnitude_vector|miss_block|bone_block)(\.|$)")


def refuse_adapter_tensors(folder: Path, names: Iterable[str]) -> None:
    """Refuse a whole model that has an adapter beside its weights.

    Args:
        folder: Where it is.
        names: All its tensor names.

    Raises:
        UsageError: The folder holds a Bone adapter, or some names are those of a Bone or PEFT adapter.
    """
    if (folder / BONE_CONFIG).is_file():
        raise UsageError(
            f"{folder} holds a Bone adapter ({BONE_CONFIG}), not a whole model: put it into its base first, with "
            f"weightsmith merge {folder} --lora-mode dense --base BASE --out MERGED"
        )
    everything = list(names)
    if bone := _bone_tensors(everything):
        raise UsageError(
            f"{folder} holds a Bone adapter beside its base model ({bone[0]} and {len(bone) - 1} more tensors), which "
            "from_pretrained would drop. Train with BoneCheckpointCallback of weightsmith.integrations.bone: its "
            "checkpoints can be merged. For this one, rebuild the model as it was trained: apply_bone_ with the same "
            "BoneConfig, load_state_dict, unload_bone_(model, merge=True), save_pretrained"
        )
    if peft := [name for name in everything if _PEFT.search(name)]:
        raise UsageError(
            f"{folder} holds a PEFT adapter beside its base model ({peft[0]} and {len(peft) - 1} more tensors), which "
            "from_pretrained would drop: save what merge_and_unload() of the PeftModel returns, or the adapter alone "
            "by the PeftModel's save_pretrained"
        )


def _bone_tensors(names: list[str]) -> list[str]:
    """Tensors ``<layer>.bone.<adapter>`` that are not in the layer's weight yet."""
    known = set(names)
    owners = {name.rpartition(".")[0] for name in names}  # a submodule that is called bone belongs to no layer
    matches = [match for name in names if (match := re.fullmatch(r"(|.*\.)bone\.([^.]+)", name))]
    return [m[0] for m in matches if m[1].removesuffix(".") in owners and f"{m[1]}{BONE_MERGED}.{m[2]}" not in known]
