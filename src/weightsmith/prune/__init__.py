"""Which weights stay.

| names | what they do |
|---|---|
| `MagnitudePruner` | masks outside the model: prune, rewind, attach to an optimizer |
| `PruneReport`, `TensorDensity` | densities of prunable weights and of all parameters |
| `iterate`, `Round` | train, prune, rewind, and again: every round on disk, resumed after a kill |
| `save_sparse`, `load_sparse` | bit masks and values: files that really shrink |
| `shrink_`, `Shrunk` | remove output channels of which nothing is left |
"""

from weightsmith.prune.lottery import Round, iterate
from weightsmith.prune.magnitude import MagnitudePruner
from weightsmith.prune.report import PruneReport, TensorDensity
from weightsmith.prune.shrink import Shrunk, shrink_
from weightsmith.prune.sparse import load_sparse, save_sparse

__all__ = [
    "MagnitudePruner",
    "PruneReport",
    "Round",
    "Shrunk",
    "TensorDensity",
    "iterate",
    "load_sparse",
    "save_sparse",
    "shrink_",
]
