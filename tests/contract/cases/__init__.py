"""How the contract suite calls each public name: a module per room, with those of the tables below that it needs.

A name of an available technique without a case fails the suite.

REWRITES: verbs that change how weights are written, ``name: [Rewrite, ...]`` of `weightsmith.testing`.
CHANGES: verbs that change values of weights once, ``name: [Change, ...]``.
ROUNDINGS: of these, verbs that round a trained model, ``verb(model, inputs, where=..., ...) -> Report``.
PARAMETRIZATIONS: ``name: [Parametrization, ...]``.
OPTIMIZERS: ``make(model) -> torch.optim.Optimizer``.
STATES: objects with state, ``name: [State, ...]``.
FOLLOWERS: of these, what goes along with the training of a prepared model, ``make(model, optimizer)``.
FUNCTIONS: tensors in, tensors out, ``name: [Function, ...]``.
ALONGSIDE: names that work on every model as parts of the cases: what they begin with, go through, or end with.
ELSEWHERE: names that make none of the promises of this suite, with the reason and where they are tested.
"""

import importlib
from typing import Any

from weightsmith import ROOMS

_MODULES = [importlib.import_module(f"{__name__}.{room}") for room in ROOMS]


def _cases(table: str) -> dict[str, Any]:
    return {name: case for module in _MODULES for name, case in getattr(module, table, {}).items()}


def _names(table: str) -> set[str]:
    return {name for module in _MODULES for name in getattr(module, table, ())}


REWRITES, PARAMETRIZATIONS = _cases("REWRITES"), _cases("PARAMETRIZATIONS")
CHANGES, ROUNDINGS = _cases("CHANGES"), _cases("ROUNDINGS")
OPTIMIZERS, FUNCTIONS = _cases("OPTIMIZERS"), _cases("FUNCTIONS")
STATES, FOLLOWERS = _cases("STATES"), _cases("FOLLOWERS")
ALONGSIDE, ELSEWHERE = _names("ALONGSIDE"), _names("ELSEWHERE")
