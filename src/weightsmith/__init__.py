"""Everything that happens to a neural network's weights.

The folders are named after what is done to a weight; the names below are the doors, opened on first use::

    import weightsmith as ws

    ws.reparam    how weights are written         compand_, InWeightSpace
    ws.optim      how weights move                AdamP, SGDP
    ws.quantize   how finely they are kept        flexround_, prepare_ofq_, save_quantized
    ws.adapt      few weights for many            apply_bone_
    ws.average    many checkpoints into one       merge_checkpoints
    ws.fold_      bake every parametrization into plain weights
    ws.select     which modules a ``where=`` argument means
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith import adapt, average, optim, quantize, reparam
    from weightsmith.core.fold import fold_
    from weightsmith.core.select import select

__version__ = "0.1.0"
__all__ = ["__version__", "adapt", "average", "fold_", "optim", "quantize", "reparam", "select"]

_DOORS = {
    "adapt": "weightsmith.adapt",
    "average": "weightsmith.average",
    "fold_": "weightsmith.core.fold",
    "optim": "weightsmith.optim",
    "quantize": "weightsmith.quantize",
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
