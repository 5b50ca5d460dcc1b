"""Everything that happens to a neural network's weights.

The folders are named after what is done to a weight; the names below are the doors, opened on first use::

    import weightsmith as ws

    ws.optim      how weights move        AdamP, SGDP
    ws.reparam    how weights are written compand_, InWeightSpace
    ws.fold_      bake every parametrization into plain weights
    ws.select     which modules a ``where=`` argument means
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith import optim, reparam
    from weightsmith.core.fold import fold_
    from weightsmith.core.select import select

__version__ = "0.1.0"
__all__ = ["__version__", "fold_", "optim", "reparam", "select"]

_DOORS = {
    "fold_": "weightsmith.core.fold",
    "optim": "weightsmith.optim",
    "reparam": "weightsmith.reparam",
    "select": "weightsmith.core.select",
}


def __getattr__(name: str) -> Any:
    if name not in _DOORS:
        raise AttributeError(f"module 'weightsmith' has no attribute {name!r}")
    module = importlib.import_module(_DOORS[name])
    return module if _DOORS[name] == f"weightsmith.{name}" else getattr(module, name)


def __dir__() -> list[str]:
    return __all__
