"""Everything that happens to a neural network's weights.

One folder per thing that is done to a weight, imported on first use:

    import weightsmith as ws

    ws.init       where weights start             ibp_, low_rank_, apply_
    ws.reparam    how weights are written         compand_, InWeightSpace
    ws.optim      how weights move                AdamP, SGDP
    ws.reweight   what counts, and how much       MetaRescaler
    ws.prune      which weights stay              MagnitudePruner, iterate, save_sparse
    ws.quantize   how finely they are kept        flexround_, prepare_ofq_, save_quantized
    ws.adapt      few weights for many            apply_bone_
    ws.average    many checkpoints into one       merge_checkpoints
    ws.continual  new beside old                  WeightAligning, align_weights_
    ws.certify    what weights guarantee          bounds, verified_error, CertifiedTraining
    ws.search     which weights to have           evolve, SearchSpace, SuperNet, gan
    ws.diagnose   what weights tell               effective_rank, LazinessProbe
    ws.fold_      bake every parametrization into plain weights
    ws.select     which modules a ``where=`` argument means
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weightsmith import (
        adapt,
        average,
        certify,
        continual,
        diagnose,
        init,
        optim,
        prune,
        quantize,
        reparam,
        reweight,
        search,
    )
    from weightsmith.core.fold import fold_
    from weightsmith.core.select import select

__version__ = "0.1.0"

ROOMS = (
    "init",
    "reparam",
    "optim",
    "reweight",
    "prune",
    "quantize",
    "adapt",
    "average",
    "continual",
    "certify",
    "search",
    "diagnose",
)
"""The folders of techniques, in the order of a weight's life. Import rules, API pages and navigation follow it."""

_FUNCTIONS = {"fold_": "weightsmith.core.fold", "select": "weightsmith.core.select"}

__all__ = [
    "ROOMS",
    "__version__",
    "adapt",
    "average",
    "certify",
    "continual",
    "diagnose",
    "fold_",
    "init",
    "optim",
    "prune",
    "quantize",
    "reparam",
    "reweight",
    "search",
    "select",
]


def __getattr__(name: str) -> Any:
    if name in ROOMS:
        return importlib.import_module(f"weightsmith.{name}")
    if name in _FUNCTIONS:
        return getattr(importlib.import_module(_FUNCTIONS[name]), name)
    raise AttributeError(f"module 'weightsmith' has no attribute {name!r}")


def __dir__() -> list[str]:
    return __all__
