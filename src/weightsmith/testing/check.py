"""`check_technique`: all checks that belong to a kind of technique, on all models."""

from collections.abc import Iterator
from dataclasses import dataclass

from weightsmith.core.errors import UsageError, reason
from weightsmith.testing.changes import CHANGING
from weightsmith.testing.functions import FUNCTIONAL
from weightsmith.testing.kinds import Change, Check, Function, Kind, Optimizer, Parametrization, Rewrite, State, kind_of
from weightsmith.testing.measures import Broken
from weightsmith.testing.models import NO_MODEL
from weightsmith.testing.optimizers import OPTIMIZING
from weightsmith.testing.rewrites import REWRITING
from weightsmith.testing.states import STATEFUL

_CHECKS: dict[type, tuple[Check, ...]] = {
    Rewrite: REWRITING,
    Change: CHANGING,
    Optimizer: OPTIMIZING,
    State: STATEFUL,
    Function: FUNCTIONAL,
}


class ContractBroken(AssertionError):
    """Promises that a technique does not keep; the text has a line for each."""


@dataclass(frozen=True, slots=True)
class Run:
    """One check of one technique on one model: call it; it raises if the promise does not hold."""

    technique: Kind
    check: Check
    model: str

    @property
    def name(self) -> str:
        """What is checked, and on which model."""
        title = self.check.run.__name__.replace("_", " ")
        return title if self.model == NO_MODEL else f"{title} ({self.model})"

    def __call__(self) -> None:
        """Check."""
        self.check.run(self.technique, self.model)


@dataclass(frozen=True, slots=True)
class Checked:
    """What was checked: names of the checks, each with its model."""

    passed: tuple[str, ...]


def runs(technique: object) -> Iterator[Run]:
    """Every check that a technique is held to, one by one.

    Example:
        >>> import torch
        >>> next(runs(torch.optim.AdamW)).name
        'an optimizer lowers the loss and leaves frozen parameters alone (linear)'
    """
    kind = kind_of(technique)
    if isinstance(kind, Parametrization):
        kind = kind.rewrite()
    for check in _CHECKS[type(kind)]:
        for model in check.on(kind):
            yield Run(kind, check, model)


def check_technique(technique: object, *, compiled: bool = True) -> Checked:
    """Hold a technique to the contract, on models that differ in what a technique may trip over.

    Plain weights in, plain weights out; what is frozen stays; state goes on where it stopped; the same seed gives the
    same result; ``where`` touches what it names; dtypes and memory formats are kept; layers without rows are taken.

    Args:
        technique: An optimizer class, a parametrization, or one of this module's kinds.
        compiled: Also check under ``torch.compile(fullgraph=True)``, which takes seconds per model.

    Returns:
        What was checked.

    Raises:
        ContractBroken: A promise does not hold; the message lists each with its model and what was found.
        TypeError: The technique is none of the kinds.

    Example:
        >>> import torch
        >>> len(check_technique(torch.optim.AdamW).passed)
        31
    """
    chosen = [run for run in runs(technique) if compiled or not run.check.compiles]
    if not any(run.model != NO_MODEL for run in chosen) and isinstance(technique, (Rewrite, Change)):
        raise UsageError("refuses or models leaves no model to check the technique on")
    passed, broken = [], []
    for run in chosen:
        try:
            run()
        except Broken as error:
            broken.append(f"{run.name}: {error}")
        except Exception as error:
            broken.append(f"{run.name}: {reason(error)}")
        else:
            passed.append(run.name)
    if broken:
        raise ContractBroken(
            f"{len(broken)} of {len(chosen)} checks fail (if a model is not for it, name it in refuses):\n"
            + "\n".join(f"- {one}" for one in broken)
        )
    return Checked(tuple(passed))
