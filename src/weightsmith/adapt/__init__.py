"""Adapters that train one small tensor per weight matrix.

| name | what it is |
|---|---|
| ``apply_bone_``, ``BoneConfig`` | freeze a model and put an adapter on it: Bone, row, free, MiSS, mini |
| ``set_adapter_``, ``bone_disabled`` | several adapters on one model, and none for a while |
| ``merge_bone_``, ``unmerge_bone_`` | into the weights, and out again to the last bit |
| ``unload_bone_`` | take the adapters off, merged or not |
| ``save_bone``, ``load_bone`` | folders: our own, PEFT's MISS and BONE, exact LoRA |
| ``bone_state_dict``, ``load_bone_state_dict_`` | the same in memory |
| ``trainable_parameters`` | how many train, of how many |
| ``bone_linear``, ``bone_delta`` | the functions beneath |
| ``accelerate_peft_`` | our forward and backward pass under an unchanged PEFT model |

Order of arguments: the model that is changed or saved comes first, then the folder or the configuration. Under a
``Trainer``, see `weightsmith.integrations.bone`.
"""

from weightsmith.adapt.apply import apply_bone_, bone_disabled, set_adapter_, trainable_parameters
from weightsmith.adapt.bone import BoneConfig, bone_delta, bone_linear
from weightsmith.adapt.folders import load_bone, save_bone
from weightsmith.adapt.merge import merge_bone_, unload_bone_, unmerge_bone_
from weightsmith.adapt.peft import accelerate_peft_
from weightsmith.adapt.state import bone_state_dict, load_bone_state_dict_

__all__ = [
    "BoneConfig",
    "accelerate_peft_",
    "apply_bone_",
    "bone_delta",
    "bone_disabled",
    "bone_linear",
    "bone_state_dict",
    "load_bone",
    "load_bone_state_dict_",
    "merge_bone_",
    "save_bone",
    "set_adapter_",
    "trainable_parameters",
    "unload_bone_",
    "unmerge_bone_",
]
