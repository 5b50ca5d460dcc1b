"""One suite over all techniques: what design promises of a technique holds for every one of them, on every model."""

import importlib
import inspect

import pytest
from cases import (
    ALONGSIDE,
    CHANGES,
    ELSEWHERE,
    FOLLOWERS,
    FUNCTIONS,
    OPTIMIZERS,
    PARAMETRIZATIONS,
    REWRITES,
    ROUNDINGS,
    STATES,
)
from checks import each_run

from weightsmith.techniques import TECHNIQUES
from weightsmith.testing import Change, Optimizer

NAMES = [name for card in TECHNIQUES if card.available for name in card.names]


CALLED = {name: [Optimizer(make) for make in made] for name, made in OPTIMIZERS.items()}
CALLED |= {name: [Change(verb) for verb in verbs] for name, verbs in ROUNDINGS.items()}
CALLED |= REWRITES | CHANGES | PARAMETRIZATIONS | FUNCTIONS | STATES
CASES = {*CALLED, *FOLLOWERS, *ALONGSIDE, *ELSEWHERE}

# tied weights, rotary attention and layers without rows are what some of the models are here for
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*is tied", "ignore:.*stays in floating point", "ignore:the loss of block 'none' was not finite"
)


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_exists_is_documented_and_in_the_suite(name):
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    assert attribute in importlib.import_module(module).__all__
    assert inspect.getdoc(found)
    assert name in CASES, "add a case to tests/contract/cases"


def test_the_suite_names_nothing_that_no_technique_has():
    assert set(NAMES) >= CASES


@pytest.mark.parametrize("card", [card for card in TECHNIQUES if card.available], ids=lambda card: card.slug)
def test_every_available_technique_has_an_experiment_with_the_three_presets(card):
    experiment = importlib.import_module(card.experiment).EXPERIMENT
    assert experiment.slug == card.slug
    assert [name for name in experiment.presets if name != "long"] == ["smoke", "laptop", "paper"]
    for config in experiment.presets.values():
        assert experiment.describe(config)["claims"]


@each_run(CALLED)
def test_a_technique_keeps_the_contract(run):
    run()
