"""States that come and go: our own, the authors' package, timm, pytorch_optimizer and torch."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn

import adamp
from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.optim import SGDP, AdamP

SHAPES = [(6, 5), (4, 3, 3, 3), (6,), ()]
MAKERS = {
    "AdamP": lambda params, **options: AdamP(params, lr=0.01, weight_decay=0.1, **options),
    "AdamP nesterov": lambda params, **options: AdamP(params, lr=0.01, weight_decay=0.1, nesterov=True, **options),
    "SGDP": lambda params, **options: SGDP(params, lr=0.05, momentum=0.9, weight_decay=1e-3, **options),
    "SGDP buffer": lambda params, **options: SGDP(params, lr=0.05, momentum=0.9, project_buffer=True, **options),
}
OFFICIAL = {
    "AdamP": lambda params: adamp.AdamP(params, lr=0.01, weight_decay=0.1),
    "AdamP nesterov": lambda params: adamp.AdamP(params, lr=0.01, weight_decay=0.1, nesterov=True),
    "SGDP buffer": lambda params: adamp.SGDP(params, lr=0.05, momentum=0.9),
}


def make_params():
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]


def run(optimizer, start, stop):
    params = optimizer.param_groups[0]["params"]
    for t in range(start, stop):
        generator = torch.Generator().manual_seed(t)
        for p in params:
            g = torch.randn(p.shape, generator=generator, dtype=p.dtype)
            if p.dim() == 4:  # as behind a normalization: orthogonal to the weight
                rows, weights = g.flatten(1), p.detach().flatten(1)
                g = (rows - (rows * weights).sum(1, True) / weights.square().sum(1, True) * weights).view_as(p)
            p.grad = g
        optimizer.step()
    return [p.detach().clone() for p in params]


def through_a_file(state):
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file)


def resumed(make, source, **options):
    params = [nn.Parameter(p.detach().clone()) for p in source.param_groups[0]["params"]]
    optimizer = make(params, **options)
    optimizer.load_state_dict(through_a_file(source.state_dict()))
    return optimizer


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"capturable": True}], ids=str)
@pytest.mark.parametrize("name", MAKERS)
def test_save_load_continue_is_bitwise_as_never_stopped(name, options):
    want = run(MAKERS[name](make_params(), **options), 0, 6)
    first = MAKERS[name](make_params(), **options)
    run(first, 0, 3)
    got = run(resumed(MAKERS[name], first, **options), 3, 6)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda o: pickle.loads(pickle.dumps(o))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", MAKERS)
def test_a_copy_continues_as_the_original(name, copier):
    optimizer = MAKERS[name](make_params())
    run(optimizer, 0, 2)
    twin = copier(optimizer)
    assert twin.projection_stats()[0].channel == 0
    assert all(torch.equal(a, b) for a, b in zip(run(twin, 2, 4), run(optimizer, 2, 4), strict=True))


@pytest.mark.parametrize("name", OFFICIAL)
def test_training_moves_from_the_official_package_and_back(name):
    official = OFFICIAL[name](make_params())
    run(official, 0, 3)
    ours = resumed(MAKERS[name], official)
    for a, b in zip(run(ours, 3, 6), run(official, 3, 6), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    # the official package then computes its bias corrections from our float32 step count, hence in float32
    for a, b in zip(run(resumed(OFFICIAL[name], ours), 6, 9), run(official, 6, 9), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


def test_timm_state_loads_and_caution_is_told_to_be_missing():
    source = MAKERS["AdamP"](make_params())
    run(source, 0, 2)
    state = source.state_dict()
    for group in state["param_groups"]:
        for key in ("foreach", "maximize", "capturable"):
            del group[key]
        group["caution"] = False
    MAKERS["AdamP"](make_params()).load_state_dict(state)
    state["param_groups"][0]["caution"] = True
    with pytest.warns(WeightsmithWarning, match="caution=True"):
        MAKERS["AdamP"](make_params()).load_state_dict(state)


def test_a_step_count_kept_in_the_group_is_given_to_every_parameter():
    source = MAKERS["AdamP"](make_params())
    run(source, 0, 3)
    state = copy.deepcopy(source.state_dict())
    for held in state["state"].values():
        del held["step"]
    state["param_groups"][0]["step"] = 3
    target = MAKERS["AdamP"]([nn.Parameter(p.detach().clone()) for p in source.param_groups[0]["params"]])
    target.load_state_dict(state)
    assert "step" not in target.param_groups[0]
    assert all(torch.equal(a, b) for a, b in zip(run(target, 3, 5), run(source, 3, 5), strict=True))


def test_adamw_state_goes_on_as_adamw_while_nothing_is_projected():
    params = make_params()
    theirs = torch.optim.AdamW(params, lr=0.01, weight_decay=0.1)
    run(theirs, 0, 3)
    ours = AdamP([nn.Parameter(p.detach().clone()) for p in params], delta=0.0)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    assert (ours.param_groups[0]["lr"], ours.param_groups[0]["wd_ratio"]) == (0.01, 0.1)
    for a, b in zip(run(ours, 3, 6), run(theirs, 3, 6), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_adam_state_loads_and_its_coupled_decay_is_told_to_be_missing():
    theirs = torch.optim.Adam(make_params(), weight_decay=0.1)
    run(theirs, 0, 1)
    with pytest.warns(WeightsmithWarning, match="decoupled_weight_decay=False"):
        AdamP(make_params()).load_state_dict(theirs.state_dict())


def test_a_momentum_that_sgdp_does_not_have_is_refused_and_nothing_is_loaded():
    theirs, ours = torch.optim.SGD(make_params(), momentum=1.0), SGDP(make_params(), momentum=0.9)
    run(theirs, 0, 1)
    with pytest.raises(UsageError, match="momentum must be"):
        ours.load_state_dict(theirs.state_dict())
    assert ours.param_groups[0]["momentum"] == 0.9
    assert not ours.state


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float32, torch.float64])
def test_steps_are_counted_exactly_whatever_the_default_dtype_is(default):
    w = nn.Parameter(torch.ones(2, 2))
    before = torch.get_default_dtype()
    torch.set_default_dtype(default)
    try:
        optimizer = AdamP([w], lr=0.0)
        for _ in range(258):
            w.grad = torch.ones_like(w)
            optimizer.step()
        optimizer.load_state_dict(optimizer.state_dict())
    finally:
        torch.set_default_dtype(before)
    assert optimizer.state[w]["step"] == 258


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_state_goes_on_as_sgd_while_nothing_is_projected(momentum):
    params = make_params()
    theirs = torch.optim.SGD(params, lr=0.01, momentum=momentum)
    run(theirs, 0, 3)
    ours = SGDP([nn.Parameter(p.detach().clone()) for p in params], delta=0.0)
    ours.load_state_dict(through_a_file(theirs.state_dict()))
    for a, b in zip(run(ours, 3, 6), run(theirs, 3, 6), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_state_holds_exactly_what_the_official_package_holds():
    adam, sgd = AdamP(make_params()), SGDP(make_params())
    run(adam, 0, 1)
    run(sgd, 0, 1)
    assert all(set(held) == {"step", "exp_avg", "exp_avg_sq"} for held in adam.state.values())
    assert all(set(held) == {"momentum"} for held in sgd.state.values())
