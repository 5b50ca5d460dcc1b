"""What counts, and how much: weights of samples whose labels may be wrong.

| name | what it is |
|---|---|
| `MetaRescaler` | trains a classifier on noisy labels and learns which of them to trust |
| `RescalingSettings` | its options |
| `LossRescaler` | the network that gives a loss its weight |
| `rescaler_features` | what it reads of a model's behavior on a sample |
| `SampleStatsMemory` | the recent samples that these are compared with |
| `directional_derivatives` | per-sample derivatives through the virtual step, in three exact ways |
| `RandomBatches` | validation batches from the same noisy data |
| `AuditTable` | which labels are suspicious |
"""

from weightsmith.reweight.audit import AuditTable
from weightsmith.reweight.memory import SampleStatsMemory
from weightsmith.reweight.meta_gradient import directional_derivatives
from weightsmith.reweight.rescaler import LossRescaler
from weightsmith.reweight.samples import MetaRescaler
from weightsmith.reweight.settings import RescalingSettings
from weightsmith.reweight.signals import rescaler_features
from weightsmith.reweight.validation import RandomBatches

__all__ = [
    "AuditTable",
    "LossRescaler",
    "MetaRescaler",
    "RandomBatches",
    "RescalingSettings",
    "SampleStatsMemory",
    "directional_derivatives",
    "rescaler_features",
]
