"""The page says of every pair of verbs what comes of it, and that is what comes of it."""

import pytest
import torch

pytest.importorskip("peft")

from compositions import REFUSED, VERBS, Broken, build, outcome, outputs, read

from weightsmith.core.errors import UsageError

PAGE = read()


@pytest.mark.parametrize("first", VERBS)
@pytest.mark.parametrize("then", VERBS)
def test_a_pair_does_what_the_page_says(first, then):
    assert outcome(first, then) == PAGE[first, then]


REFUSED_PAIRS = [pair for pair, cell in PAGE.items() if cell == REFUSED]


@pytest.mark.filterwarnings("ignore::weightsmith.core.errors.WeightsmithWarning")
@pytest.mark.parametrize(("first", "then"), REFUSED_PAIRS)
def test_what_is_refused_goes_through_once_the_first_is_finished(first, then):
    verb = VERBS[then]
    model = VERBS[first].finish(VERBS[first].apply(build()))
    if (first, then) in STILL_REFUSED:
        with pytest.raises(UsageError, match=STILL_REFUSED[first, then]):
            verb.apply(model)
        return
    before = outputs(model)
    assert torch.allclose(outputs(verb.apply(model)), before, atol=verb.moves)


# what is finished leaves input quantizers, which stay
STILL_REFUSED = {("prepare_ofq_", "quantize_activations_"): "is quantized by prepare_ofq_ already"}


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
