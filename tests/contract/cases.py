"""How the contract suite calls each public name; a name of an available technique without a case fails the suite."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import nn

from weightsmith import fold_
from weightsmith.adapt import BoneConfig, apply_bone_, unload_bone_
from weightsmith.optim import SGDP, AdamP
from weightsmith.optim import param_groups as decay_matrices_only
from weightsmith.quantize import (
    ConfidenceGuidedAnnealing,
    Dampening,
    Grid,
    IterativeFreezing,
    OscillationTracker,
    adaquant_,
    adaround_,
    calibrate_,
    finish_ofq_,
    flexround_,
    prepare_ofq_,
    reparameterize_qk_,
    round_to_nearest_,
)
from weightsmith.reparam import InWeightSpace, compand_, param_groups


@dataclass(frozen=True)
class Rewrite:
    """A verb that changes how weights are written, and the verb that makes them plain again.

    Attributes:
        begin: ``(model, inputs, where=...) -> model``.
        end: ``model -> model``.
        change_at_begin: How far outputs may move when it begins; ``None``: it is meant to change them.
        change_at_end: How far outputs may move when it ends.
        ends_plain: Whether the model then has the modules and the keys that it came with.
        refuses: Models that it does not take, with what the error says.
    """

    begin: Callable[..., nn.Module]
    end: Callable[[nn.Module], nn.Module] = fold_
    change_at_begin: float | None = None
    change_at_end: float = 0.0
    ends_plain: bool = True
    refuses: Mapping[str, str] = field(default_factory=dict)


def _compand(*args, **options):
    return Rewrite(lambda model, x, where=None: compand_(model, *args, where=where, **options), change_at_begin=1e-5)


COMPANDERS = {
    "weightsmith.reparam.compand_": [
        _compand(),
        _compand(0.5, 1.0, learnable=True, overflow="clip"),
        _compand(1.0, 1.0, fn="arcsinh", learnable=True, share="model"),
    ],
}


def _weights_only(model, x, where=None, **options):
    return prepare_ofq_(model, activation_bits=None, qk_reparam=False, where=where, **options)


def _everything(model, x, where=None):
    return calibrate_(prepare_ofq_(model, qk_reparam="auto", where=where), x)


def _attention(model, x, where=None):
    return calibrate_(reparameterize_qk_(model, where=where), x)


_NO_ATTENTION = ("linear", "conv-bn", "conv-transpose", "depthwise", "embedding", "tied", "frozen")

# with activations or a query-key product, what is left at the end has quantisers, and a product in the place of weights
PREPARATIONS = {
    "weightsmith.quantize.prepare_ofq_": [
        Rewrite(_weights_only, finish_ofq_),
        Rewrite(lambda *args, **options: _weights_only(*args, weight="lsq", weight_bits=3, **options)),
        Rewrite(_everything, finish_ofq_, change_at_end=1e-5, ends_plain=False),
    ],
    "weightsmith.quantize.reparameterize_qk_": [
        Rewrite(
            _attention,
            finish_ofq_,
            change_at_end=1e-5,
            ends_plain=False,
            refuses=dict.fromkeys(_NO_ATTENTION, "matches nothing") | {"llama": "a rotary embedding turns query"},
        ),
    ],
}


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

ADAPTERS = {
    "weightsmith.adapt.apply_bone_": [
        _adapt("miss", _CONVOLUTIONS, single=_NARROW),
        _adapt("miss", ["conv-transpose"], single=_NARROW, everywhere=["*", "!embedding", "!head"]),  # tied, these two
        _adapt("row", _CONVOLUTIONS, single=_ODD),
        _adapt("col", _CONVOLUTIONS, single=_ODD),
    ],
}

REWRITES = COMPANDERS | PREPARATIONS | ADAPTERS


_GRID = Grid(3, search="minmax")  # the search for a better range is slow, and tests/quantize compares the searches


def _round(verb, **options):
    return lambda model, x, **others: verb(model, x, _GRID, blocks="layers", **options, **others)


# a few large steps, of which the last is kept: what is learnt must show, not be good
_LEARNING = {"iterations": 3, "lr": 0.05, "batch_size": 2, "keep_best": False}

ROUNDINGS = {
    "weightsmith.quantize.round_to_nearest_": [
        lambda model, x, **options: round_to_nearest_(model, grid=_GRID, **options),
        _round(round_to_nearest_),
    ],
    "weightsmith.quantize.flexround_": [_round(flexround_, **_LEARNING)],
    "weightsmith.quantize.adaround_": [_round(adaround_, **_LEARNING)],
    "weightsmith.quantize.adaquant_": [_round(adaquant_, **_LEARNING)],
}
"""Verbs that round a trained model for good: ``verb(model, inputs, where=..., ...) -> Report``."""


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


def _anneal(model, optimizer, **options):
    annealing = ConfidenceGuidedAnnealing(model, **options)
    annealing.attach(optimizer)
    return annealing


def _track(model, optimizer):
    tracker = OscillationTracker(model)
    tracker.attach(optimizer)
    return tracker


def _freeze(model, optimizer):
    # nearly every oscillation freezes: six steps have few
    freezing = IterativeFreezing(model, 6, start=0.0, threshold=(0.32, 0.31), momentum=0.3)
    optimizer.register_step_pre_hook(lambda *_: freezing.step())
    return freezing


def _dampen(model, optimizer):
    damp = Dampening(model, 6, start=0.0)
    optimizer.register_step_pre_hook(lambda *_: damp().backward())  # adds to the gradients of the loss
    optimizer.register_step_post_hook(lambda *_: damp.step())
    return damp


FOLLOWERS = {
    "weightsmith.quantize.ConfidenceGuidedAnnealing": [
        lambda model, optimizer: _anneal(model, optimizer, boundary=0.05),
        lambda model, optimizer: _anneal(model, optimizer, boundary=0.05, qk="mask"),
    ],
    "weightsmith.quantize.OscillationTracker": [_track],
    "weightsmith.quantize.IterativeFreezing": [_freeze],
    "weightsmith.quantize.Dampening": [_dampen],
}
"""What goes along with the training of a prepared model: ``make(model, optimizer)``, attached to the optimiser."""

ALONGSIDE = {
    "weightsmith.optim.param_groups",
    "weightsmith.reparam.param_groups",
    "weightsmith.reparam.WeightCompander",
    "weightsmith.quantize.Grid",
    "weightsmith.quantize.quantized_weights",
    "weightsmith.quantize.calibrate_",
    "weightsmith.quantize.finish_ofq_",
    "weightsmith.quantize.ofq_report",
    "weightsmith.quantize.statsq",
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
}
"""Names that work on every model here as parts of the cases above: what they begin with, go through, or end with."""

ELSEWHERE = {
    # tensors, numbers or checkpoints in, the same out: no model whose class, keys or flags could suffer
    "weightsmith.average.merge_checkpoints",
    "weightsmith.average.find_checkpoints",
    "weightsmith.average.checkpoint_losses",
    "weightsmith.average.metric_weights",
    "weightsmith.average.decay_weights",
    "weightsmith.average.average_state_dicts",
    "weightsmith.average.greedy_soup",
    "weightsmith.average.ema",
    "weightsmith.average.swa",
    "weightsmith.average.LAWA",
    "weightsmith.quantize.distillation_loss",
    # changes gradients between two calls of the user's, which InWeightSpace above makes: tests/reparam compares the two
    "weightsmith.reparam.add_weight_decay_grad_",
    # write files in formats of others, whose readers are the judges: tests/quantize/test_export.py
    "weightsmith.quantize.save_quantized",
    "weightsmith.quantize.load_quantized",
    "weightsmith.quantize.export_onnx",
    # needs PEFT and a model of PEFT's: tests/integrations/test_peft.py
    "weightsmith.adapt.accelerate_peft_",
}
"""Names that make none of the promises of this suite, with the reason."""
