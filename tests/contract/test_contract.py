"""One suite over all techniques: what design promises of a technique holds for every one of them, on every model."""

import copy
import importlib
import inspect

import pytest
import torch
from cases import ELSEWHERE, OPTIMIZERS, REPARAMETRISATIONS
from models import MODELS, build
from torch import nn

import weightsmith as ws
from weightsmith.core.errors import UsageError
from weightsmith.techniques import TECHNIQUES

NAMES = [name for card in TECHNIQUES if card.available for name in card.names]


def numbered(cases):
    return [
        pytest.param(case, id=f"{name.rpartition('.')[2]}-{i}")
        for name, made in cases.items()
        for i, case in enumerate(made)
    ]


reparametrisation = pytest.mark.parametrize("rewrite", numbered(REPARAMETRISATIONS))
optimizer = pytest.mark.parametrize("make", numbered(OPTIMIZERS))
each_model = pytest.mark.parametrize("name", list(MODELS))


def loss_of(model, x):
    out = model(x)
    return (out.float() ** 2).mean() + out.float().mean()


def train(model, opt, x, steps):
    for _ in range(steps):
        opt.zero_grad()
        loss_of(model, x).backward()
        opt.step()


def same(left, right):
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


# every technique


@pytest.mark.parametrize("name", NAMES)
def test_every_public_name_exists_is_documented_and_in_the_suite(name):
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    assert attribute in importlib.import_module(module).__all__
    assert inspect.getdoc(found)
    assert name in {*REPARAMETRISATIONS, *OPTIMIZERS, *ELSEWHERE}, "add a case to tests/contract/cases.py"


@pytest.mark.parametrize("card", [card for card in TECHNIQUES if card.available], ids=lambda card: card.slug)
def test_every_available_technique_has_an_experiment_with_the_three_presets(card):
    experiment = importlib.import_module(card.experiment).EXPERIMENT
    assert experiment.slug == card.slug
    assert list(experiment.presets) == ["smoke", "laptop", "paper"]
    for config in experiment.presets.values():
        assert experiment.describe(config)["claims"]


# techniques that change how weights are written


@reparametrisation
@each_model
def test_rewriting_keeps_the_outputs_and_folding_gives_the_model_back(rewrite, name):
    model, x = build(name)
    before, keys = model.eval()(x), list(model.state_dict())
    assert rewrite(model) is model
    assert torch.allclose(model(x), before, atol=1e-5, rtol=1e-4)
    written = model(x)
    assert ws.fold_(model) is model
    assert list(model.state_dict()) == keys
    assert type(model) is type(build(name)[0])
    assert [type(module) for module in model.modules()] == [type(module) for module in build(name)[0].modules()]
    assert torch.equal(model(x), written)


@reparametrisation
@each_model
def test_a_trained_model_folds_to_plain_weights_that_load_without_us(rewrite, name):
    model, x = build(name)
    rewrite(model)
    train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01), x, 2)
    trained = model.eval()(x)
    plain, _ = build(name)
    plain.load_state_dict(ws.fold_(model).state_dict())
    assert torch.equal(plain.eval()(x), trained)


@reparametrisation
@each_model
def test_frozen_weights_do_not_move(rewrite, name):
    model, x = build(name)
    frozen = {key: value.clone() for key, value in model.named_parameters() if not value.requires_grad}
    rewrite(model)
    train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01), x, 1)
    ws.fold_(model)
    assert all(torch.allclose(dict(model.named_parameters())[key], value, atol=1e-6) for key, value in frozen.items())


@reparametrisation
@each_model
def test_tied_weights_stay_tied(rewrite, name):
    model, x = build(name)
    shared = len(list(model.named_parameters(remove_duplicate=False))) - len(list(model.parameters()))
    rewrite(model)
    train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01), x, 1)
    ws.fold_(model)
    assert len(list(model.named_parameters(remove_duplicate=False))) - len(list(model.parameters())) == shared


@reparametrisation
@each_model
def test_a_checkpoint_of_the_rewritten_model_restores_it(rewrite, name):
    model, x = build(name)
    rewrite(model)
    train(model, torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01), x, 1)
    other, _ = build(name)
    rewrite(other).load_state_dict(model.state_dict())
    assert torch.equal(other.eval()(x), model.eval()(x))
    assert torch.equal(copy.deepcopy(model)(x), model(x))


@reparametrisation
@pytest.mark.parametrize("name", ["conv-bn", "vit", "llama"])
def test_a_rewritten_model_compiles_to_the_same_function(rewrite, name):
    model, x = build(name)
    rewrite(model).eval()
    torch._dynamo.reset()
    assert torch.allclose(torch.compile(model, backend="aot_eager")(x), model(x), atol=1e-5)


@reparametrisation
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_any_float_dtype_is_kept(rewrite, dtype):
    model, _ = build("linear", dtype)
    before = model.weight.clone()
    rewrite(model)
    assert model.weight.dtype == dtype
    assert torch.allclose(model.weight, before, atol=2e-2 if dtype != torch.float64 else 1e-12)
    assert ws.fold_(model).weight.dtype == dtype


@reparametrisation
def test_the_memory_format_is_kept(rewrite):
    model, _ = build("conv-bn")
    model = model.to(memory_format=torch.channels_last)
    rewrite(model)
    assert model[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert ws.fold_(model)[0].weight.is_contiguous(memory_format=torch.channels_last)


@reparametrisation
def test_where_that_matches_nothing_is_an_error_and_changes_nothing(rewrite):
    model, _ = build("vit")
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(UsageError, match="matches nothing"):
        rewrite(model, where="no.such.layer")
    assert same(model.state_dict(), before)


@reparametrisation
def test_where_touches_only_what_it_names(rewrite):
    model, _ = build("conv-bn")
    rewrite(model, where="3")
    changed = [name for name, module in model.named_modules() if nn.utils.parametrize.is_parametrized(module)]
    assert changed == ["3"]


# optimisers


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
    model, x = build(name)
    opt = make(model)
    train(model, opt, x, 3)
    torch.save({"model": model.state_dict(), "optimizer": opt.state_dict()}, tmp_path / "checkpoint.pt")
    train(model, opt, x, 3)

    resumed, _ = build(name)
    resumed_opt = make(resumed)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    resumed_opt.load_state_dict(saved["optimizer"])
    train(resumed, resumed_opt, x, 3)
    assert same(model.state_dict(), resumed.state_dict())


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
