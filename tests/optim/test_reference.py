"""Every form of the optimizers makes the steps that the reference functions spell out."""

import itertools

import pytest
import torch
from torch import nn

from weightsmith.optim import SGDP, AdamP
from weightsmith.optim.adamp import adamp_step_
from weightsmith.optim.sgdp import sgdp_step_

SHAPES = [(6, 5), (4, 3, 2, 2), (1, 7), (7, 1), (3, 4, 5), (6,), ()]
STEPS = 6
FORMS = [{}, {"foreach": True}, {"foreach": False}, {"capturable": True}]
CASES = [
    (AdamP, {"lr": 0.05, "weight_decay": 0.1}),
    (AdamP, {"lr": 0.05, "betas": (0.5, 0.9), "eps": 1e-3, "nesterov": True, "wd_ratio": 0.5}),
    (AdamP, {"lr": 0.05, "weight_decay": 0.1, "delta": 100.0}),
    (AdamP, {"lr": 0.05, "weight_decay": 0.1, "delta": 0.0}),
    (SGDP, {"lr": 0.05, "weight_decay": 0.1}),
    (SGDP, {"lr": 0.05, "momentum": 0.9, "dampening": 0.3, "weight_decay": 0.01}),
    (SGDP, {"lr": 0.05, "momentum": 0.9, "nesterov": True, "delta": 100.0, "weight_decay": 0.01}),
    (SGDP, {"lr": 0.05, "momentum": 0.9, "project_buffer": True}),
]


def gradients(generator, w, view):
    """A gradient that is orthogonal to the weight row by row, as a whole, or not at all."""
    g = torch.randn(w.shape, generator=generator, dtype=w.dtype)
    if w.dim() < 2 or view == "none":
        return g
    if view == "layer":
        return g - (g * w).sum() / w.square().sum() * w
    rows, weights = g.flatten(1), w.flatten(1)
    return (rows - (rows * weights).sum(1, True) / weights.square().sum(1, True) * weights).view_as(w)


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize(("optimizer_class", "options"), CASES, ids=lambda value: str(value))
def test_the_optimizer_makes_the_steps_of_the_reference(optimizer_class, options, form):
    generator = torch.Generator().manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64)) for shape in SHAPES]
    optimizer = optimizer_class(params, **options, **form)
    weights = [p.detach().clone() for p in params]
    moments = [[torch.zeros_like(w) for _ in optimizer.moments] for w in weights]
    views = itertools.cycle(["channel", "none", "layer"])
    seen = {"channel": 0, "layer": 0, "none": 0}
    for k in range(1, STEPS + 1):
        view = next(views)
        for p, w, held in zip(params, weights, moments, strict=True):
            p.grad = gradients(generator, w, view)
            if optimizer_class is AdamP:
                adamp_step_(w, p.grad, *held, k, **options)
            else:
                sgdp_step_(w, p.grad, *held, **options)
        optimizer.step()
        stats = optimizer.projection_stats()[0]
        seen = {name: count + getattr(stats, name) for name, count in seen.items()}
        for p, w, held in zip(params, weights, moments, strict=True):
            torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-12)
            for key, moment in zip(optimizer.moments, held, strict=True):
                torch.testing.assert_close(optimizer.state[p][key], moment, rtol=0, atol=1e-12)
    if "delta" not in options:
        assert all(seen.values())
