"""Everything that happens to a neural network's weights.

The folders are named after what is done to a weight; the names below are the doors, opened on first use::

    import weightsmith as ws

    ws.optim      how weights move        AdamP, SGDP
    ws.reparam    how weights are written compand_
    ws.fold_      bake every parametrization into plain weights
    ws.select     which modules a ``where=`` argument means
"""

import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from weightsmith.core.fold import fold_
from weightsmith.core.select import select

if TYPE_CHECKING:
    from weightsmith import optim, reparam

__version__ = "0.1.0"

_ROOMS = ("optim", "reparam")
__all__ = ["__version__", "fold_", "optim", "reparam", "select"]


def __getattr__(name: str) -> ModuleType:
    if name in _ROOMS:
        return importlib.import_module(f"weightsmith.{name}")
    raise AttributeError(f"module 'weightsmith' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
