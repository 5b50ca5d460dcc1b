"""Hold your own technique to the contract that every technique of this library keeps.

`check_technique` takes what you wrote, wrapped in the kind of thing that it is:

| what you wrote | kind |
|---|---|
| a verb that writes weights in another way until they are folded | `Rewrite` |
| a verb that changes weights once, such as an initialization or rounding | `Change` |
| a parametrization for `torch.nn.utils.parametrize` | `Parametrization`, or an instance as it is |
| an optimizer | `Optimizer`, or the class as it is |
| an object with `state_dict` and `load_state_dict` | `State` |
| a function from tensors to tensors | `Function` |

It needs no test runner. For one test per check and model, parametrize over `runs`.
"""

from weightsmith.testing.check import Checked, ContractBroken, Run, check_technique, runs
from weightsmith.testing.kinds import Change, Function, Optimizer, Parametrization, Rewrite, State
from weightsmith.testing.models import MODELS, build

__all__ = [
    "MODELS",
    "Change",
    "Checked",
    "ContractBroken",
    "Function",
    "Optimizer",
    "Parametrization",
    "Rewrite",
    "Run",
    "State",
    "build",
    "check_technique",
    "runs",
]
