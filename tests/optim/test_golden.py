"""Numbers recorded from the authors' package adamp 0.3.0 (and timm 1.0.31 for the unprojected buffer)."""

import json
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from torch import nn

from weightsmith.optim import SGDP, AdamP
from weightsmith.optim.projection import View, invariant_view, look, project

PATH = Path(__file__).parents[1] / "golden" / "adamp.safetensors"
with safe_open(PATH, "pt") as file:
    NUMBERS = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118  (not a dict)
    CASES = {name: json.loads(text) for name, text in sorted(file.metadata().items()) if text.startswith("{")}
TRAJECTORIES = [name for name in CASES if name.startswith(("adamp_", "sgdp_"))]
FORMS = {
    "default": {},
    "together": {"foreach": True},
    "one by one": {"foreach": False},
    "capturable": {"capturable": True},
}


def optimizer_for(case, params, **options):
    meta = CASES[case]
    if case.endswith("official"):
        options["project_buffer"] = True
    return {"AdamP": AdamP, "SGDP": SGDP}[meta["optimizer"]](params, **meta["hyper"], **options)


def numbers_of(case, kind):
    return [NUMBERS.get(f"{case}.p{i}.{kind}") for i in range(len(CASES[case]["params"]))]


def tolerance(case):
    return {"rtol": 0, "atol": 2e-6 if "f32" in case else 1e-12}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", TRAJECTORIES)
def test_every_step_equals_the_recorded_one(case, form):
    params = [nn.Parameter(init.clone()) for init in numbers_of(case, "init")]
    optimizer = optimizer_for(case, params, **FORMS[form])
    branches = [b for b in numbers_of(case, "branch") if b is not None]
    for t in range(CASES[case]["steps"]):
        for p, grad in zip(params, numbers_of(case, "grad"), strict=True):
            p.grad = grad[t].clone()
        optimizer.step()
        for key in ("param", "exp_avg", "exp_avg_sq", "momentum"):
            for p, value in zip(params, numbers_of(case, key), strict=True):
                if value is not None:
                    mine = p.detach() if key == "param" else optimizer.state[p][key]
                    torch.testing.assert_close(mine, value[t], **tolerance(case))
        stats = optimizer.projection_stats()[0]
        assert [stats.none, stats.channel, stats.layer] == [sum(int(b[t]) == v for b in branches) for v in range(3)]


@pytest.mark.parametrize("case", TRAJECTORIES)
def test_a_recorded_state_continues_as_recorded(case):
    t = 0
    params = [nn.Parameter(param[t].clone()) for param in numbers_of(case, "param")]
    keys = ("exp_avg", "exp_avg_sq") if case.startswith("adamp") else ("momentum",)
    state = {i: {key: NUMBERS[f"{case}.p{i}.{key}"][t] for key in keys} for i in range(len(params))}
    if case.startswith("adamp"):
        state = {i: {"step": t + 1, **s} for i, s in state.items()}
    optimizer = optimizer_for(case, params)
    official = {
        "lr",
        "betas",
        "momentum",
        "dampening",
        "weight_decay",
        "nesterov",
        "eps",
        "delta",
        "wd_ratio",
        "params",
    }
    groups = [{k: v for k, v in g.items() if k in official} for g in optimizer.state_dict()["param_groups"]]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
    for later in range(t + 1, CASES[case]["steps"]):
        for p, grad in zip(params, numbers_of(case, "grad"), strict=True):
            p.grad = grad[later].clone()
        optimizer.step()
        for p, value in zip(params, numbers_of(case, "param"), strict=True):
            torch.testing.assert_close(p.detach(), value[later], **tolerance(case))


@pytest.mark.parametrize("k", range(len(CASES["proj_f64"]["items"])))
def test_projection_alone_equals_the_recorded_one(k):
    meta = CASES["proj_f64"]
    want = {
        key: NUMBERS[f"proj_f64.{k}.{key}"]
        for key in ("p", "grad", "update", "projected", "wd_ratio", "branch", "cos_channel", "cos_layer")
    }
    options = {"delta": meta["delta"], "eps": meta["eps"]}
    view = invariant_view(want["p"], want["grad"], **options)
    assert View(int(view)) == want["branch"] == look(want["p"].flatten(1), want["grad"].flatten(1), **options)[0]
    assert (meta["wd_ratio"] if view else 1.0) == want["wd_ratio"]
    projected = project(want["update"], want["p"], view, eps=meta["eps"])
    torch.testing.assert_close(projected, want["projected"], rtol=0, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("case", ["e2e_adamp_bn", "e2e_sgdp_bn"])
def test_training_a_network_ends_as_recorded(case):
    model = nn.Sequential(nn.Linear(5, 8, bias=False), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
    prefix = f"{case}.init."
    model.load_state_dict({key.removeprefix(prefix): value for key, value in NUMBERS.items() if key.startswith(prefix)})
    optimizer = optimizer_for(case, model.parameters())
    for want in NUMBERS[f"{case}.loss"]:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(NUMBERS[f"{case}.x"]), NUMBERS[f"{case}.y"])
        torch.testing.assert_close(loss.detach(), want, rtol=0, atol=1e-9)
        loss.backward()
        optimizer.step()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, NUMBERS[f"{case}.final.{name}"], rtol=0, atol=1e-9)
