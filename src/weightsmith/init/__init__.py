"""Where weights start: initializations in place, of one tensor or, through ``apply_``, of a model.

| name | what it is |
|---|---|
| ``low_rank_``, ``low_rank_from_`` | a given rank at a fixed norm, from random or from present values |
| ``soft_rank_`` | a given effective rank, which may be any number |
| ``dale_`` | every unit excites or inhibits |
| ``block_`` | types of units |
| ``chain_`` | motifs of two connections |
| ``from_matrix_`` | a measured matrix |
| ``ibp_`` | interval widths that neither explode nor vanish with depth, for certified training |
| ``apply_`` | any of them on a model: recurrent, gated, transposed and tied weights |
"""

from weightsmith.init.apply import Initialized, apply_
from weightsmith.init.ibp import ibp_
from weightsmith.init.low_rank import low_rank_, low_rank_from_
from weightsmith.init.soft_rank import soft_rank_
from weightsmith.init.structured import block_, chain_, dale_, from_matrix_

__all__ = [
    "Initialized",
    "apply_",
    "block_",
    "chain_",
    "dale_",
    "from_matrix_",
    "ibp_",
    "low_rank_",
    "low_rank_from_",
    "soft_rank_",
]
