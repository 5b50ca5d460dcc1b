"""Many checkpoints into one: averages of a run's saved states, weighted by what the run has logged.

| name | what it is |
|---|---|
| ``merge_checkpoints`` | checkpoint folders, full models or adapters, into one folder |
| ``find_checkpoints``, ``checkpoint_losses`` | what a run has left behind, and how good each is |
| ``metric_weights``, ``weigh_checkpoints`` | metrics into weights |
| ``decay_weights`` | weights that stand for a decay of the learning rate |
| ``average_state_dicts`` | the same in memory, for any module |
| ``greedy_soup``, ``greedy_members`` | keep only members that your evaluation likes |
| ``ema``, ``swa``, ``LAWA`` | running averages while a model trains |

Order of arguments: what is averaged comes first (the model, or the checkpoints), then the folder that is made.
"""

from weightsmith.average.checkpoints import RunCheckpoint, checkpoint_losses, find_checkpoints
from weightsmith.average.merge import merge_checkpoints, weigh_checkpoints
from weightsmith.average.report import MergeReport, Share
from weightsmith.average.soup import greedy_members, greedy_soup
from weightsmith.average.state_dicts import LAWA, average_state_dicts, ema, swa
from weightsmith.average.weights import decay_weights, metric_weights

__all__ = [
    "LAWA",
    "MergeReport",
    "RunCheckpoint",
    "Share",
    "average_state_dicts",
    "checkpoint_losses",
    "decay_weights",
    "ema",
    "find_checkpoints",
    "greedy_members",
    "greedy_soup",
    "merge_checkpoints",
    "metric_weights",
    "swa",
    "weigh_checkpoints",
]
