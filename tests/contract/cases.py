"""How the contract suite calls each public name; a name of an available technique without a case fails the suite."""

import torch

from weightsmith.optim import SGDP, AdamP
from weightsmith.optim import param_groups as decay_matrices_only
from weightsmith.reparam import InWeightSpace, compand_, param_groups

REPARAMETRISATIONS = {
    "weightsmith.reparam.compand_": [
        lambda model, **options: compand_(model, **options),
        lambda model, **options: compand_(model, 0.5, 1.0, learnable=True, overflow="clip", **options),
        lambda model, **options: compand_(model, 1.0, 1.0, fn="arcsinh", learnable=True, share="model", **options),
    ],
}
"""Verbs that change how weights are written: ``verb(model, where=...) -> model``."""


def _in_weight_space(model):
    compand_(model, overflow="clip")
    return InWeightSpace(torch.optim.AdamW(param_groups(model, 0.0), lr=0.01), model)


OPTIMIZERS = {
    "weightsmith.optim.AdamP": [
        lambda model: AdamP(model.parameters(), lr=0.01, weight_decay=0.1),
        lambda model: AdamP(decay_matrices_only(model, 0.1), lr=0.01, nesterov=True, capturable=True),
    ],
    "weightsmith.optim.SGDP": [
        lambda model: SGDP(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda model: SGDP(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=False),
    ],
    "weightsmith.reparam.InWeightSpace": [_in_weight_space],
}
"""Optimisers: ``make(model) -> torch.optim.Optimizer``."""

ELSEWHERE = {
    "weightsmith.optim.param_groups",
    "weightsmith.reparam.WeightCompander",
    "weightsmith.reparam.param_groups",
    "weightsmith.reparam.add_weight_decay_grad_",
    # on checkpoints and state dicts, not on modules: their own tests cover them
    "weightsmith.average.merge_checkpoints",
    "weightsmith.average.find_checkpoints",
    "weightsmith.average.checkpoint_losses",
    "weightsmith.average.metric_weights",
    "weightsmith.average.average_state_dicts",
    "weightsmith.average.greedy_soup",
    "weightsmith.average.ema",
    "weightsmith.average.swa",
    "weightsmith.average.LAWA",
    # they need calibration, a frozen model or a folder: tests/quantize and tests/adapt hold them to the same promises
    "weightsmith.quantize.flexround_",
    "weightsmith.quantize.adaround_",
    "weightsmith.quantize.adaquant_",
    "weightsmith.quantize.round_to_nearest_",
    "weightsmith.quantize.Grid",
    "weightsmith.quantize.quantized_weights",
    "weightsmith.quantize.save_quantized",
    "weightsmith.quantize.load_quantized",
    "weightsmith.quantize.export_onnx",
    "weightsmith.quantize.prepare_ofq_",
    "weightsmith.quantize.calibrate_",
    "weightsmith.quantize.finish_ofq_",
    "weightsmith.quantize.reparameterize_qk_",
    "weightsmith.quantize.ConfidenceGuidedAnnealing",
    "weightsmith.quantize.OscillationTracker",
    "weightsmith.quantize.IterativeFreezing",
    "weightsmith.quantize.Dampening",
    "weightsmith.quantize.statsq",
    "weightsmith.quantize.distillation_loss",
    "weightsmith.adapt.apply_bone_",
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
    "weightsmith.adapt.bone_linear",
    "weightsmith.adapt.bone_delta",
    "weightsmith.adapt.accelerate_peft_",
}
"""Names with nothing of their own to check here: parts of the cases above, or no verbs on modules."""
