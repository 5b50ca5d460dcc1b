"""What the contract suites have in common: which checks and models they are parametrized by.

A check that every model goes through runs here on a third of the models, another third for the next check and the next
case: every case is on every model, and every check sees every model, in a third of the combinations. The others are
marked slow, and so is compiling but on one model with the last case of a name.
"""

import pytest

from weightsmith.testing import MODELS, runs


def case_id(name, index):
    return f"{name.rpartition('.')[2]}-{index}"


def thinned(values, turn):
    """One in three pairs of a model and what belongs to it unmarked, the others marked slow."""
    return [((index + turn) % 3 != 0, value) for index, value in enumerate(values)]


def numbered(cases):
    """Parameters from a table of cases, with ids from their names."""
    return [pytest.param(case, id=case_id(name, i)) for name, made in cases.items() for i, case in enumerate(made)]


def each_run(cases):
    """Parametrize by every check of every case, on every model that belongs to both."""
    chosen = []
    techniques = [
        (case_id(name, i), case, case is made[-1]) for name, made in cases.items() for i, case in enumerate(made)
    ]
    for position, (title, case, last) in enumerate(techniques):
        by_check = {}
        for run in runs(case):
            by_check.setdefault(run.check.run.__name__, []).append(run)
        for turn, (check, found) in enumerate(by_check.items()):
            if found[0].check.compiles:
                marked = [(index > 0 or not last, run) for index, run in enumerate(found)]
            elif found[0].check.models is None and not found[0].check.refused:
                marked = thinned(found, position + turn)
            else:
                marked = [(False, run) for run in found]
            for slow, run in marked:
                marks = [pytest.mark.slow] if slow else []
                chosen.append(pytest.param(run, id=f"{title}-{check}-{run.model}", marks=marks))
    return pytest.mark.parametrize("run", chosen)


def pairs(rewrites, turn=0):
    """Parametrize by every rewrite with the models that it takes."""
    chosen = []
    for position, case in enumerate(numbered(rewrites)):
        (rewrite,) = case.values
        taken = [name for name in MODELS if name not in rewrite.refuses]
        for slow, name in thinned(taken, position + turn):
            marks = [pytest.mark.slow] if slow else []
            chosen.append(pytest.param(rewrite, name, id=f"{case.id}-{name}", marks=marks))
    return pytest.mark.parametrize(("rewrite", "name"), chosen)


def on_models(argument, cases):
    """Parametrize by every case with every model."""
    chosen = []
    for position, case in enumerate(numbered(cases)):
        for slow, name in thinned(MODELS, position):
            marks = [pytest.mark.slow] if slow else []
            chosen.append(pytest.param(*case.values, name, id=f"{case.id}-{name}", marks=marks))
    return pytest.mark.parametrize((argument, "name"), chosen)
