"""How weights are written: the network sees a bounded curve of what trains.

| name | what it is |
|---|---|
| ``compand_`` | write weights as ``a * arctan(v / b)`` (Weight Compander) |
| ``WeightCompander``, ``Curve`` | the parametrization, and the functions that it can bend weights with |
| ``param_groups``, ``add_weight_decay_grad_`` | decay where the method wants it |
| ``InWeightSpace`` | any optimizer, seeing the weight instead of what trains |
| ``load_plain_state_dict``, ``plain_state_dict`` | checkpoints of the plain model, in and out |
| ``saturation_report``, ``assert_valid`` | saturated weights, and whether every learned pair is valid |
"""

from weightsmith.reparam.apply import assert_valid, compand_, saturation_report
from weightsmith.reparam.compander import WeightCompander
from weightsmith.reparam.curves import Curve
from weightsmith.reparam.plain import load_plain_state_dict, plain_state_dict
from weightsmith.reparam.weight_space import InWeightSpace, add_weight_decay_grad_, param_groups

__all__ = [
    "Curve",
    "InWeightSpace",
    "WeightCompander",
    "add_weight_decay_grad_",
    "assert_valid",
    "compand_",
    "load_plain_state_dict",
    "param_groups",
    "plain_state_dict",
    "saturation_report",
]
