"""One suite over all techniques: what design promises of a technique holds for every one of them, on every model."""

import copy
import importlib
import inspect

import pytest
import torch
from cases import ALONGSIDE, ELSEWHERE, FOLLOWERS, OPTIMIZERS, REWRITES, ROUNDINGS
from checks import (
    assert_resumes,
    each_model,
    is_untouched,
    loss_of,
    mixed,
    near,
    numbered,
    pairs,
    same,
    sgd,
    shape_of,
    shared,
    train,
    trained,
    values,
)
from models import build

from weightsmith.core.errors import UsageError
from weightsmith.techniques import TECHNIQUES

NAMES = [name for card in TECHNIQUES if card.available for name in card.names]
CASES = {*REWRITES, *ROUNDINGS, *OPTIMIZERS, *FOLLOWERS, *ALONGSIDE, *ELSEWHERE}

# compiling takes seconds where all else takes milliseconds: few models, and of these one block for all that are like it
COMPILED = {"conv-bn": "", "frozen": "", "vit": "blocks.1", "llama": "model.model.layers.1"}

# tied weights and rotary attention are what some of the models are here for
pytestmark = pytest.mark.filterwarnings("ignore:.*is tied", "ignore:.*stays in floating point")
optimizer = pytest.mark.parametrize("make", numbered(OPTIMIZERS))


# every technique


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
    assert list(experiment.presets) == ["smoke", "laptop", "paper"]
    for config in experiment.presets.values():
        assert experiment.describe(config)["claims"]


# techniques that change how weights are written


@pairs(REWRITES, when=lambda rewrite: rewrite.change_at_begin is not None)
def test_rewriting_keeps_the_outputs(rewrite, name):
    model, x = build(name)
    before = model.eval()(x)
    assert rewrite.begin(model, x) is model
    assert near(model(x), before, rewrite.change_at_begin)


@pairs(REWRITES)
def test_a_rewritten_model_trains(rewrite, name):
    model, x = build(name)
    rewrite.begin(model.train(), x)
    before = [parameter.detach().clone() for parameter in model.parameters()]
    opt = sgd(model)
    train(model, opt, x, 1)
    assert all(parameter.grad.isfinite().all() for parameter in opt.param_groups[0]["params"])
    assert any(not torch.equal(*both) for both in zip(before, model.parameters(), strict=True))
    assert model(x).isfinite().all()


@pairs(REWRITES)
def test_ending_keeps_the_outputs_that_training_gave(rewrite, name):
    model, x = trained(rewrite, name)
    before = model.eval()(x)
    assert rewrite.end(model) is model
    assert near(model(x), before, rewrite.change_at_end)


@pairs(REWRITES, when=lambda rewrite: rewrite.ends_plain)
def test_ending_gives_plain_weights_that_load_without_us(rewrite, name):
    model, x = trained(rewrite, name)
    rewrite.end(model)
    plain, _ = build(name)
    assert shape_of(model) == shape_of(plain)
    plain.load_state_dict(model.state_dict())
    assert torch.equal(plain.eval()(x), model.eval()(x))


@pairs(REWRITES)
def test_frozen_weights_do_not_move(rewrite, name):
    model, x = build(name)
    frozen = [key for key, value in mixed(model).named_parameters() if not value.requires_grad]
    before = values(rewrite.begin(model, x), frozen)
    train(model, sgd(model), x, 2)
    assert same(values(model, frozen), before)


@pairs(REWRITES, ["tied"])
def test_tied_weights_stay_tied(rewrite, name):
    model, _ = trained(rewrite, name)
    assert shared(rewrite.end(model)) == shared(build(name)[0])


@pairs(REWRITES)
def test_a_checkpoint_or_a_copy_of_the_rewritten_model_restores_it(rewrite, name):
    model, x = trained(rewrite, name)
    after = model.eval()(x)
    other, _ = build(name)
    rewrite.begin(other, x).load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), after)
    assert torch.equal(copy.deepcopy(model)(x), after)


@pairs(REWRITES, ["conv-bn", "frozen", "vit"], one=True)
def test_a_rewritten_model_compiles_to_the_same_function(rewrite, name):
    model, x = build(name)
    expected = rewrite.begin(model, x).eval()(x)
    torch._dynamo.reset()
    model.get_submodule(COMPILED[name]).compile(backend="aot_eager")
    assert torch.allclose(model(x), expected, atol=1e-5)


@pairs({verb: made[:1] for verb, made in REWRITES.items()}, ["llama"])
def test_a_rewritten_language_model_compiles_to_the_same_function(rewrite, name):
    test_a_rewritten_model_compiles_to_the_same_function(rewrite, name)


@pairs(REWRITES, ["vit"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_dtype_is_kept(rewrite, name, dtype):
    model, x = build(name, dtype)
    weights = dict(model.named_parameters())
    before = values(model, weights)
    written = values(rewrite.begin(model, x), weights)
    assert all(value.dtype == dtype for value in written.values())
    if rewrite.change_at_begin is not None:
        atol = 2e-2 if dtype != torch.float64 else 1e-12
        assert all(torch.allclose(value, before[key], atol=atol) for key, value in written.items())
    assert model(x).dtype == dtype
    ended = dict(rewrite.end(model).named_parameters())
    assert all(ended[key].dtype == dtype for key in weights.keys() & ended.keys())


@pairs(REWRITES, ["conv-bn"])
def test_the_memory_format_is_kept(rewrite, name):
    model, x = build(name)
    model = model.to(memory_format=torch.channels_last)
    rewrite.begin(model, x)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert rewrite.end(model)[0].weight.is_contiguous(memory_format=torch.channels_last)


@pairs(REWRITES, refused=True)
def test_a_model_that_is_refused_stays_as_it_was(rewrite, name):
    model, x = build(name)
    with pytest.raises(UsageError, match=rewrite.refuses[name]):
        rewrite.begin(model, x)
    assert is_untouched(model, name)


@pairs(REWRITES, ["vit"])
def test_where_that_matches_nothing_is_an_error_and_changes_nothing(rewrite, name):
    model, x = build(name)
    with pytest.raises(UsageError, match="matches nothing"):
        rewrite.begin(model, x, where="no.such.layer")
    assert is_untouched(model, name)


@pairs(REWRITES, ["vit"])
def test_where_touches_only_what_it_names(rewrite, name):
    model, x = build(name)
    plain = dict(build(name)[0].named_modules())
    rewrite.begin(model, x, where=["blocks.1.*", "!*.norm?"])
    changed = [key for key, module in plain.items() if type(model.get_submodule(key)) is not type(module)]
    assert changed
    assert all(key.startswith("blocks.1.") for key in changed)


# optimizers


@optimizer
@each_model
def test_an_optimizer_lowers_the_loss_and_leaves_frozen_parameters_alone(make, name):
    model, x = build(name)
    opt = make(model)
    frozen = {key: value.clone() for key, value in model.named_parameters() if not value.requires_grad}
    before = loss_of(model, x).item()
    train(model, opt, x, 8)
    assert loss_of(model, x).item() < before
    assert all(torch.equal(dict(model.named_parameters())[key], value) for key, value in frozen.items())


@optimizer
@each_model
def test_save_load_continue_equals_never_having_stopped(make, name, tmp_path):
    def start():
        model, _ = build(name)
        return model, make(model)

    assert_resumes(start, build(name)[1], tmp_path / "checkpoint.pt")


@optimizer
@each_model
def test_the_same_seed_gives_the_same_weights(make, name):
    finals = []
    for _ in range(2):
        model, x = build(name)
        train(model, make(model), x, 3)
        finals.append(model.state_dict())
    assert same(*finals)


@optimizer
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_an_optimizer_takes_any_float_dtype(make, dtype):
    model, x = build("linear", dtype)
    train(model, make(model), x, 3)
    assert all(parameter.dtype == dtype and parameter.isfinite().all() for parameter in model.parameters())


@optimizer
def test_an_optimizer_does_not_mind_the_memory_format(make):
    finals = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model, x = build("conv-bn", torch.float64)
        model = model.to(memory_format=memory_format)
        train(model, make(model), x, 3)
        finals.append(model.state_dict())
    assert all(torch.allclose(left, right, atol=1e-10) for left, right in zip(*map(dict.values, finals), strict=True))


@optimizer
def test_schedulers_and_closures_work(make):
    model, x = build("linear")
    opt = make(model)
    scheduler = torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.0)

    def closure():
        opt.zero_grad()
        loss = loss_of(model, x)
        loss.backward()
        return loss

    assert opt.step(closure).item() > 0
    scheduler.step()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    opt.step(closure)
    assert same(model.state_dict(), before)
