"""How weights move: optimizers.

| name | what it is |
|---|---|
| ``AdamP`` | Adam(W) that drops the part of the step that only changes a weight's norm |
| ``SGDP`` | the same for SGD with momentum |
| ``param_groups`` | weight decay for matrices and kernels only |
"""

from weightsmith.optim.adamp import AdamP
from weightsmith.optim.param_groups import param_groups
from weightsmith.optim.sgdp import SGDP

__all__ = ["SGDP", "AdamP", "param_groups"]
