"""What only quantization promises: weights on a grid, in a model that is otherwise the user's, and runs that resume."""

import functools

import pytest
import torch
from cases.quantize import FOLLOWERS, ROUNDINGS
from cases.quantize import REWRITES as PREPARATIONS
from checks import numbered, on_models, pairs

from weightsmith.core.errors import UsageError
from weightsmith.quantize import Grid, finish_ofq_, integer_weights, prepare_ofq_, quantized_weights
from weightsmith.testing import State, build
from weightsmith.testing.measures import is_untouched, mixed, sgd, shape_of, shared, train, trained
from weightsmith.testing.states import continuing_equals_never_having_stopped

pytestmark = pytest.mark.filterwarnings("ignore:.*is tied", "ignore:.*stays in floating point")
rounding = pytest.mark.parametrize("verb", numbered(ROUNDINGS))


def run(verb, name, dtype=torch.float32, **options):
    model, x = build(name, dtype)
    return model, x, verb(mixed(model), x, **options)


rounded = functools.cache(run)  # several tests look at one model, and none of them changes it


# rounding after training


@on_models("verb", ROUNDINGS)
def test_only_the_reported_weights_change_and_they_are_on_their_grid(verb, name):
    model, _, report = rounded(verb, name)
    before = build(name)[0].state_dict()
    found = quantized_weights(model)
    assert [layer.name for layer in report.layers] == list(found)
    assert found
    assert all(torch.equal(model.get_parameter(key), weight.dequantize()) for key, weight in found.items())
    assert {key for key, value in model.state_dict().items() if not torch.equal(value, before[key])} == set(found)


@rounding
def test_tied_weights_are_left_alone_and_refused_by_name(verb):
    model, x, _ = rounded(verb, "tied")
    assert shared(model) == 1
    assert list(quantized_weights(model)) == ["body.weight"]
    model, _ = build("tied")
    with pytest.raises(UsageError, match=r"head\.weight is tied to that of embedding"):
        verb(model, x, where="head")
    assert is_untouched(model, "tied")


@rounding
@pytest.mark.parametrize("name", ["conv-bn", "frozen"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_rounding_keeps_any_float_dtype(verb, name, dtype):
    model, x, _ = run(verb, name, dtype)
    assert shape_of(model) == shape_of(mixed(build(name, dtype)[0]))
    assert all(
        torch.equal(model.get_parameter(key), w.dequantize(dtype)) for key, w in quantized_weights(model).items()
    )
    assert model.eval()(x).isfinite().all()


@rounding
@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("vit", {"where": "no.such.layer"}, "matches nothing"),
        ("embedding", {"where": "0"}, "matches nothing"),
        ("conv-bn", {"overrides": {"3": Grid(granularity=4)}}, "3: granularity=4 groups the inputs of a matrix"),
        ("linear", {"overrides": {"": Grid(granularity=4)}}, "granularity=4 does not divide the 6 inputs"),
    ],
)
def test_rounding_that_does_not_fit_is_an_error_and_changes_nothing(verb, name, options, message):
    model, x = build(name)
    with pytest.raises(UsageError, match=message):
        verb(model, x, **options)
    assert is_untouched(model, name)
    assert not quantized_weights(model)


@rounding
def test_rounding_touches_only_what_where_names(verb):
    model, x = build("vit")
    verb(model, x, where="blocks.1.mlp.*")
    assert list(quantized_weights(model)) == ["blocks.1.mlp.fc1.weight", "blocks.1.mlp.fc2.weight"]


# training on a grid


@pairs(PREPARATIONS)
def test_training_finishes_on_the_integers_that_it_used(rewrite, name):
    model, _ = trained(rewrite, name)
    integers = {key.replace(".product", ".product_weight"): found for key, found in integer_weights(model).items()}
    finished = quantized_weights(finish_ofq_(model))
    assert finished.keys() == integers.keys()
    for key, found in integers.items():
        assert torch.equal(model.get_parameter(key), found.dequantize())
        assert torch.equal(finished[key].dequantize(), found.dequantize())


@on_models("make", FOLLOWERS)
def test_save_load_continue_equals_never_having_stopped(make, name):
    x = build(name)[1]

    def start():
        model, _ = build(name)
        # eight bits at the ends would be too fine to oscillate in six steps
        opt = sgd(prepare_ofq_(model, activation_bits=None, qk_reparam="auto", ends_bits=None), lr=0.5)
        return model, opt, make(model, opt)

    continuing_equals_never_having_stopped(State(start, lambda model, opt, _: train(model, opt, x, 1)), name)
