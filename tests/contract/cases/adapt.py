"""Adapters."""

import torch

from weightsmith.adapt import BoneConfig, apply_bone_, bone_delta, bone_linear, unload_bone_
from weightsmith.testing import Function, Rewrite


def _adapt(variant, refuses, *, single, everywhere=None):
    config = {"r": 2, "variant": variant, "rank_pattern": dict.fromkeys(single, 1)}
    return Rewrite(
        lambda model, x, where=None: apply_bone_(model, BoneConfig(where=where or everywhere, **config)),
        lambda model: unload_bone_(model, merge=True),
        change_at_begin=0.0,
        change_at_end=1e-5,
        refuses=dict.fromkeys(refuses, "matches nothing"),
    )


_CONVOLUTIONS = ("conv-bn", "conv-transpose", "depthwise")  # no layer that is adapted unless it is named
_NARROW = ("0", "patch_embed")  # some of these have one input
_ODD = ("", "0", "2")  # some of these have three outputs

REWRITES = {
    "weightsmith.adapt.apply_bone_": [
        _adapt("miss", _CONVOLUTIONS, single=_NARROW),
        _adapt("miss", ["conv-transpose"], single=_NARROW, everywhere=["*", "!embedding", "!head"]),  # tied, these two
        _adapt("row", _CONVOLUTIONS, single=_ODD),
        _adapt("col", _CONVOLUTIONS, single=_ODD),
    ],
}


def _tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


FUNCTIONS = {
    "weightsmith.adapt.bone_linear": [Function(bone_linear, lambda: (*_tensors((3, 6), (4, 6), (4,), (2, 4)), "miss"))],
    "weightsmith.adapt.bone_delta": [Function(bone_delta, lambda: (*_tensors((4, 6), (2, 4)), "miss"))],
}

ALONGSIDE = {
    "weightsmith.adapt.BoneConfig",
    "weightsmith.adapt.set_adapter_",
    "weightsmith.adapt.bone_disabled",
    "weightsmith.adapt.bone_state_dict",
    "weightsmith.adapt.load_bone_state_dict_",
    "weightsmith.adapt.trainable_parameters",
    "weightsmith.adapt.merge_bone_",
    "weightsmith.adapt.unmerge_bone_",
    "weightsmith.adapt.unload_bone_",
    "weightsmith.adapt.save_bone",
    "weightsmith.adapt.load_bone",
}

ELSEWHERE = {
    # needs PEFT and a model of PEFT's: tests/integrations/test_peft.py
    "weightsmith.adapt.accelerate_peft_",
}
