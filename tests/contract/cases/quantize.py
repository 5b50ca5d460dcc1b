"""Rounding after training, and training on a grid."""

import torch

from weightsmith.quantize import (
    ConfidenceGuidedAnnealing,
    Dampening,
    Grid,
    IterativeFreezing,
    LearningOptions,
    OscillationTracker,
    adaquant_,
    adaround_,
    calibrate_,
    distillation_loss,
    finish_ofq_,
    flexround_,
    prepare_ofq_,
    reparameterize_qk_,
    round_to_nearest_,
    statsq,
)
from weightsmith.testing import Function, Rewrite


def _weights_only(model, x, where=None, **options):
    return prepare_ofq_(model, activation_bits=None, qk_reparam=False, where=where, **options)


def _everything(model, x, where=None):
    return calibrate_(prepare_ofq_(model, qk_reparam="auto", where=where), x)


def _attention(model, x, where=None):
    return calibrate_(reparameterize_qk_(model, where=where), x)


_NO_ATTENTION = ("linear", "conv-bn", "conv-transpose", "depthwise", "embedding", "tied", "frozen")

# with activations or a query-key product, what is left at the end has quantizers, and a product in the place of weights
REWRITES = {
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


_GRID = Grid(3, search="minmax")  # the search for a better range is slow, and tests/quantize compares the searches


def _round(verb, **options):
    return lambda model, x, **others: verb(model, x, _GRID, blocks="layers", **options, **others)


# a few large steps, of which the last is kept: what is learnt must show, not be good
_LEARNING = {"iterations": 3, "lr": 0.05, "batch_size": 2, "options": LearningOptions(keep_best=False)}

ROUNDINGS = {
    "weightsmith.quantize.round_to_nearest_": [
        lambda model, x, **options: round_to_nearest_(model, grid=_GRID, **options),
        _round(round_to_nearest_),
    ],
    "weightsmith.quantize.flexround_": [_round(flexround_, **_LEARNING)],
    "weightsmith.quantize.adaround_": [_round(adaround_, **_LEARNING)],
    "weightsmith.quantize.adaquant_": [_round(adaquant_, **_LEARNING)],
}


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


def _tensors(*shapes):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator) for shape in shapes]


FUNCTIONS = {
    "weightsmith.quantize.statsq": [
        Function(statsq, lambda: (*_tensors((4, 6)), 3)),
        Function(statsq, lambda: (*_tensors((4, 6)), 4, 1)),
    ],
    "weightsmith.quantize.distillation_loss": [
        Function(distillation_loss, lambda: (*_tensors((5, 3), (5, 3)), torch.arange(5) % 3)),
    ],
}

ALONGSIDE = {
    "weightsmith.quantize.Grid",
    "weightsmith.quantize.quantized_weights",
    "weightsmith.quantize.calibrate_",
    "weightsmith.quantize.finish_ofq_",
    "weightsmith.quantize.ofq_report",
}

ELSEWHERE = {
    # write files in formats of others, whose readers are the judges: tests/quantize/test_export.py
    "weightsmith.quantize.save_quantized",
    "weightsmith.quantize.load_quantized",
    "weightsmith.quantize.export_onnx",
}
