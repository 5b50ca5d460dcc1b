"""New beside old: classes and instructions that arrive in steps.

| names | what they do |
|---|---|
| `WeightAligning`, `AligningOptions` | distillation, exemplars and aligned heads around your own training loop |
| `align_weights_`, `align_logits`, `WeightAlignment` | the alignment alone, on any linear head |
| `expand_head_`, `expand_head`, `clip_head_` | room for new classes, and heads without negative weights |
| `incremental_loss`, `distillation_loss` | what is trained at each step |
| `ExemplarMemory`, `herding` | a few examples of every class, chosen so that their mean is the class's |
| `ClassOrder` | labels of the data, in order of arrival, and rows of the head |
| `fit_bias_correction`, `correct_bias` | BiC, the rival that learns two numbers per step |
| `DynamicEMA`, `balance_weight` | an average of the weights that follows as far as gradients and distances say |
| `InstructionRouter`, `Assignment`, `SentenceEncoder` | which group of parameters a task belongs to |
| `ContinualTuner` | both around your own training: a group of parameters per kind of instruction |
| `ForgettingMeter`, `ForgettingReport`, `prediction_accuracy` | what is lost and gained after every task |
| `EWC` | the rival that holds important weights in place |
| `transfer`, `Transfer` | forgetting and the other measures of the field, from the scores |
"""

from weightsmith.continual.aligning import WeightAlignment, align_logits, align_weights_
from weightsmith.continual.aligning_options import AligningOptions
from weightsmith.continual.balance import balance_weight
from weightsmith.continual.bias_correction import correct_bias, fit_bias_correction
from weightsmith.continual.classes import ClassOrder
from weightsmith.continual.distillation import distillation_loss, incremental_loss
from weightsmith.continual.dynamic_ema import DynamicEMA
from weightsmith.continual.encoder import SentenceEncoder
from weightsmith.continual.ewc import EWC
from weightsmith.continual.forgetting import ForgettingMeter, ForgettingReport
from weightsmith.continual.head import clip_head_, expand_head, expand_head_
from weightsmith.continual.herding import herding
from weightsmith.continual.memory import ExemplarMemory
from weightsmith.continual.prediction import prediction_accuracy
from weightsmith.continual.router import Assignment, InstructionRouter
from weightsmith.continual.transfer import Transfer, transfer
from weightsmith.continual.tuner import ContinualTuner
from weightsmith.continual.weight_aligning import WeightAligning

__all__ = [
    "EWC",
    "AligningOptions",
    "Assignment",
    "ClassOrder",
    "ContinualTuner",
    "DynamicEMA",
    "ExemplarMemory",
    "ForgettingMeter",
    "ForgettingReport",
    "InstructionRouter",
    "SentenceEncoder",
    "Transfer",
    "WeightAligning",
    "WeightAlignment",
    "align_logits",
    "align_weights_",
    "balance_weight",
    "clip_head_",
    "correct_bias",
    "distillation_loss",
    "expand_head",
    "expand_head_",
    "fit_bias_correction",
    "herding",
    "incremental_loss",
    "prediction_accuracy",
    "transfer",
]
