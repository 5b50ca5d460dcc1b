"""Quantize weights and activations: after training, during training, and as files.

| after training | |
|---|---|
| `round_to_nearest_` | the baseline: round every weight to the nearest grid value |
| `flexround_`, `adaround_`, `adaquant_` | learn the rounding from a few hundred unlabeled samples |
| `LearningOptions`, `Report` | details of learning; errors by block and layer, and what was left out |
| `quantize_activations_`, `Activations` | quantize the inputs of layers, afterwards or while the rounding is learned |
| `FlexRound`, `LRQ` | the roundings of `flexround_`, as parametrizations of one weight |

| during training | |
|---|---|
| `prepare_ofq_`, `calibrate_`, `finish_ofq_` | train a transformer at 2 to 4 bits |
| `reparameterize_qk_` | quantize attention alone |
| `ofq_report`, `integer_weights` | what was converted; the integers that the weights have become |
| `ConfidenceGuidedAnnealing`, `distillation_loss` | the second stage, and the loss against a teacher |
| `OscillationTracker`, `IterativeFreezing`, `Dampening` | measure oscillation; other ways to reduce it |
| `cached_weights`, `statsq` | quantize once for several passes; the quantizer as a function |

| integers and files | |
|---|---|
| `Grid`, `QuantizedWeight`, `quantized_weights` | the grid, a weight on it, and all such weights of a model |
| `save_quantized`, `load_quantized`, `export_onnx` | write and read folders and files |

The model that a function changes, reads or saves is its first argument. `load_quantized`, which makes a new model,
takes the folder first.
"""

from weightsmith.quantize.after_training.activations import Activations, quantize_activations_
from weightsmith.quantize.after_training.flexround import FlexRound
from weightsmith.quantize.after_training.lrq import LRQ
from weightsmith.quantize.after_training.options import LearningOptions
from weightsmith.quantize.after_training.verbs import adaquant_, adaround_, flexround_, round_to_nearest_
from weightsmith.quantize.formats.export import export_onnx, load_quantized, save_quantized
from weightsmith.quantize.grid import Grid, QuantizedWeight, quantized_weights
from weightsmith.quantize.in_training.annealing import ConfidenceGuidedAnnealing
from weightsmith.quantize.in_training.cache import cached_weights
from weightsmith.quantize.in_training.cures import Dampening, IterativeFreezing
from weightsmith.quantize.in_training.distillation import distillation_loss
from weightsmith.quantize.in_training.finish import finish_ofq_, integer_weights
from weightsmith.quantize.in_training.oscillation import OscillationTracker
from weightsmith.quantize.in_training.preparation import ofq_report
from weightsmith.quantize.in_training.prepare import calibrate_, prepare_ofq_, reparameterize_qk_
from weightsmith.quantize.in_training.statsq import statsq
from weightsmith.quantize.report import Report

__all__ = [
    "LRQ",
    "Activations",
    "ConfidenceGuidedAnnealing",
    "Dampening",
    "FlexRound",
    "Grid",
    "IterativeFreezing",
    "LearningOptions",
    "OscillationTracker",
    "QuantizedWeight",
    "Report",
    "adaquant_",
    "adaround_",
    "cached_weights",
    "calibrate_",
    "distillation_loss",
    "export_onnx",
    "finish_ofq_",
    "flexround_",
    "integer_weights",
    "load_quantized",
    "ofq_report",
    "prepare_ofq_",
    "quantize_activations_",
    "quantized_weights",
    "reparameterize_qk_",
    "round_to_nearest_",
    "save_quantized",
    "statsq",
]
