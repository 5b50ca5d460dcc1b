"""Values that the authors' code gives: features of four batches in a row, and one step of the rescaler."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from weightsmith.reweight import LossRescaler, MetaRescaler, SampleStatsMemory, rescaler_features
from weightsmith.reweight.meta_gradient import meta_gradient
from weightsmith.reweight.observe import Observer

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "meta-rescaling.safetensors")
STEPS = ["meta_sgd", "meta_adam_fresh", "meta_clean_val", "meta_norm_detached"]


def entry(name):
    return {key.removeprefix(f"{name}."): value for key, value in GOLDEN.items() if key.startswith(f"{name}.")}


@pytest.mark.parametrize(
    ("name", "classes", "window", "batch_size", "separate"),
    [("feat", 3, 1, 12, True), ("feat_nosep_w3", 2, 3, 8, False)],
)
def test_features_of_batches_in_a_row_equal_the_authors(name, classes, window, batch_size, separate):
    memory = SampleStatsMemory(classes, window, batch_size, class_separation=separate)
    for number in range(4):
        batch = entry(f"{name}.batch{number}")
        found = rescaler_features(batch["losses"], batch["logits"], batch["labels"], memory)
        torch.testing.assert_close(found.float(), batch["features"], rtol=1e-5, atol=1e-7)
        assert torch.equal(found[:, 18].long(), batch["agreement"])


def stacked(g, prefix):
    classes = sum(key.startswith(f"{prefix}.rescaler_") and key.endswith(".0.weight") for key in g)
    return [torch.stack([g[f"{prefix}.rescaler_{c}.{layer}.weight"] for c in range(classes)]) for layer in (0, 3)]


def rescaler_of(g):
    first, second = stacked(g, "omega")
    rescaler = LossRescaler(len(first), first.shape[1]).double()
    rescaler.load_state_dict({"first": first, "second": second})
    return rescaler


def close(found, wanted, rtol):
    torch.testing.assert_close(found, wanted, rtol=rtol, atol=1e-10 if rtol > 1e-8 else 1e-12)


NARROW = "weightsmith.reweight.settings.RescalingSettings.n_features"


def prepared(g, monkeypatch, **options):
    """The linear classifier of the reference, and a rescaler that is given its features."""
    model = nn.Linear(g["W"].shape[1], g["W"].shape[0]).double()
    model.load_state_dict({"weight": g["W"], "bias": g["b"]})
    monkeypatch.setattr(NARROW, property(lambda _: g["features"].shape[1]))
    given = {"training": g["features"], "validation": g["features_val"]}
    monkeypatch.setattr(Observer, "_features", lambda self, found, labels, purpose: given[purpose])
    optimizer = torch.optim.SGD(model.parameters(), lr=float(g["lr"]))
    meta = MetaRescaler(model, optimizer, rescaler_of(g), passes=1, rescaler_lr=1e-2, **options)
    return model, meta


@pytest.mark.parametrize("mode", ["finite_difference", "jvp", "double_backward"])
@pytest.mark.parametrize("name", STEPS)
def test_a_step_equals_the_reference(name, mode, monkeypatch):
    g = entry(name)
    batch, val = len(g["y"]), len(g["y_val"])
    official = name == "meta_adam_fresh"
    # the reference sums losses: a mean with n times the step size makes the same virtual step
    options = {"mode": "official"} if official else {"virtual_lr": float(g["lr"]) * batch}
    options |= {"outer": name != "meta_clean_val", "normalize": "loss" if name == "meta_norm_detached" else "none"}
    model, meta = prepared(g, monkeypatch, meta_grad=mode, **options)
    sums = (1, 1) if official else (batch, val)
    loss = meta.loss((g["x"], g["y"]))
    seen = meta._pending[-1]
    close(seen.losses.detach(), g["per_sample_loss"], 1e-9)
    close(seen.weights.detach(), g["w_inner"], 1e-9)
    close((loss * sums[0]).detach().view(1), g["inner_loss"], 1e-9)
    loss.backward()
    meta_loss = meta.update((g["x_val"], g["y_val"]))
    close((meta_loss * sums[1]).view(1), g["meta_loss"], 1e-9)
    if official:
        close(model.weight.detach(), g["W_star"], 1e-9)
        close(model.bias.detach(), g["b_star"], 1e-9)
    for found, wanted in zip(meta.rescaler.parameters(), stacked(g, "grad_total"), strict=True):
        close(found.grad * sums[1], wanted, 1e-7)
    if not official:  # Adam's eps sees the size of a gradient, which is that of a mean
        meta.rescaler.load_state_dict(rescaler_of(g).state_dict())
        for found in meta.rescaler.parameters():
            found.grad *= sums[1]
        torch.optim.Adam(meta.rescaler.parameters(), lr=1e-2).step()
    for found, wanted in zip(meta.rescaler.parameters(), stacked(g, "omega_after_adam"), strict=True):
        torch.testing.assert_close(found.detach(), wanted, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ["meta_sgd", "meta_adam_fresh", "meta_norm_detached"])
def test_the_outer_gradient_alone_equals_the_reference(name, monkeypatch):
    g = entry(name)
    official = name == "meta_adam_fresh"
    options = {"mode": "official"} if official else {"virtual_lr": float(g["lr"]) * len(g["y"])}
    options["normalize"] = "loss" if name == "meta_norm_detached" else "none"
    _, meta = prepared(g, monkeypatch, meta_grad="none", **options)
    meta.loss((g["x"], g["y"])).backward()
    meta.update((g["x_val"], g["y_val"]))
    for found, wanted in zip(meta.rescaler.parameters(), stacked(g, "grad_outer_only"), strict=True):
        close(found.grad * (1 if official else len(g["y_val"])), wanted, 1e-7)


@pytest.mark.parametrize("name", ["meta_sgd", "meta_clean_val"])
def test_differentiating_through_the_step_equals_the_reference(name):
    g = entry(name)
    rescaler = rescaler_of(g)
    w = rescaler(g["features"], g["y"])
    outer = rescaler(g["features_val"], g["y_val"]).detach() if name == "meta_sgd" else torch.ones(len(g["y_val"]))
    theta = [g["W"].clone().requires_grad_(), g["b"].clone().requires_grad_()]

    def losses(theta, x, y):
        return nn.functional.cross_entropy(x @ theta[0].T + theta[1], y, reduction="none")

    dw = meta_gradient(
        lambda theta: losses(theta, g["x"], g["y"]),
        lambda theta: (outer * losses(theta, g["x_val"], g["y_val"])).sum(),
        w,
        theta,
        float(g["lr"]),
    )
    found = torch.autograd.grad(w, list(rescaler.parameters()), dw)
    wanted = zip(stacked(g, "grad_total"), stacked(g, "grad_outer_only") if name == "meta_sgd" else (0, 0), strict=True)
    for value, (total, only_outer) in zip(found, wanted, strict=True):
        close(value, total - only_outer, 1e-7)
