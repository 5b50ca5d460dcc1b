"""How finely weights are kept: rounding after training, training on a grid, and what is written of it.

=========================================================  ==========================================================
after training
``round_to_nearest_``                                      the baseline: every weight to the closest grid value
``flexround_``, ``adaround_``, ``adaquant_``               learn the rounding from a few hundred unlabelled samples
``LearningOptions``                                        details of learning a rounding
``quantize_activations_``, ``Activations``                 dynamic or static activations, after or during that
``RoundToNearest``, ``FlexRound``, ``LRQ``, ...            the roundings, as parametrizations of one weight
``Report``, ``BlockReport``, ``LayerReport``, ``LeftOut``  what was done, how large the errors are, what was not done
during training
``prepare_ofq_``, ``calibrate_``, ``reparameterize_qk_``   train a transformer at 2 to 4 bits
``ofq_report``, ``OFQReport``                              what was converted, and what stays in floating point
``ConfidenceGuidedAnnealing``, ``distillation_loss``       the second stage, and the teacher
``OscillationTracker``, ``IterativeFreezing``, ...         watch weights oscillate, and other ways to stop them
``statsq``, ``lsq``                                        the quantizers, as functions
integers
``Grid``, ``QuantizedWeight``, ``quantized_weights``       the grid, a weight on it, and those of a model
``integer_weights``, ``write_``, ``attach_``               from and into a model
``save_quantized``, ``load_quantized``, ``export_onnx``    folders and files
``pack_rows``, ``unpack_rows``                             bits
=========================================================  ==========================================================

The model that a function changes, reads or saves is its first argument; ``load_quantized``, which makes a new one,
takes the folder first.
"""

from weightsmith.quantize.after_training.activations import (
    Activations,
    DynamicActivation,
    StaticActivation,
    quantize_activations_,
)
from weightsmith.quantize.after_training.adaquant import AdaQuant
from weightsmith.quantize.after_training.adaround import AdaRound
from weightsmith.quantize.after_training.flexround import FlexRound
from weightsmith.quantize.after_training.lrq import LRQ
from weightsmith.quantize.after_training.reconstruct import LearningOptions
from weightsmith.quantize.after_training.rtn import RoundToNearest
from weightsmith.quantize.after_training.verbs import (
    adaquant_,
    adaround_,
    flexround_,
    round_to_nearest_,
)
from weightsmith.quantize.formats.export import export_onnx, load_quantized, save_quantized
from weightsmith.quantize.formats.pack import pack_rows, unpack_rows
from weightsmith.quantize.grid import Grid, QuantizedWeight, attach_, quantized_weights, write_
from weightsmith.quantize.in_training.annealing import ConfidenceGuidedAnnealing, trainable
from weightsmith.quantize.in_training.cache import cached_weights
from weightsmith.quantize.in_training.distillation import distillation_loss
from weightsmith.quantize.in_training.finish import check_finite, finish_ofq_, integer_weights
from weightsmith.quantize.in_training.lsq import ActivationQuantizer, LSQWeight, lsq
from weightsmith.quantize.in_training.oscillation import (
    Dampening,
    IterativeFreezing,
    OscillationTracker,
    boundary_occupancy,
)
from weightsmith.quantize.in_training.preparation import OFQReport, ofq_report
from weightsmith.quantize.in_training.prepare import calibrate_, prepare_ofq_, reparameterize_qk_
from weightsmith.quantize.in_training.statsq import StatsQ, statsq, statsq_codes
from weightsmith.quantize.report import BlockReport, LayerReport, LeftOut, Report

__all__ = [
    "LRQ",
    "ActivationQuantizer",
    "Activations",
    "AdaQuant",
    "AdaRound",
    "BlockReport",
    "ConfidenceGuidedAnnealing",
    "Dampening",
    "DynamicActivation",
    "FlexRound",
    "Grid",
    "IterativeFreezing",
    "LSQWeight",
    "LayerReport",
    "LearningOptions",
    "LeftOut",
    "OFQReport",
    "OscillationTracker",
    "QuantizedWeight",
    "Report",
    "RoundToNearest",
    "StaticActivation",
    "StatsQ",
    "adaquant_",
    "adaround_",
    "attach_",
    "boundary_occupancy",
    "cached_weights",
    "calibrate_",
    "check_finite",
    "distillation_loss",
    "export_onnx",
    "finish_ofq_",
    "flexround_",
    "integer_weights",
    "load_quantized",
    "lsq",
    "ofq_report",
    "pack_rows",
    "prepare_ofq_",
    "quantize_activations_",
    "quantized_weights",
    "reparameterize_qk_",
    "round_to_nearest_",
    "save_quantized",
    "statsq",
    "statsq_codes",
    "trainable",
    "unpack_rows",
    "write_",
]
