"""The page says of every pair of verbs what comes of it, and that is what comes of it."""

import pytest

pytest.importorskip("peft")

from compositions import VERBS, Broken, outcome, read

PAGE = read()


@pytest.mark.parametrize("first", VERBS)
@pytest.mark.parametrize("then", VERBS)
def test_a_pair_does_what_the_page_says(first, then):
    assert outcome(first, then) == PAGE[first, then]


def test_a_verb_that_loses_something_is_found():
    lossy = VERBS["fold_"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(VERBS, "fold_", type(lossy)(lambda model: model.requires_grad_(False) and _zero(model)))
        with pytest.raises(Broken, match="outputs moved"):
            outcome("compand_", "fold_")


def _zero(model):
    for parameter in model.parameters():
        parameter.data.zero_()
    return model
