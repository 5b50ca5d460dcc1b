"""Every number of the reference implementation (auto_LiRPA 0.7.1 and the official code), at its tolerance."""

import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from weightsmith.certify import (
    BoundRegularizer,
    CertifiedTraining,
    EpsilonSchedule,
    bounds,
    margins,
    robust_cross_entropy,
    trace,
    verified_error,
)
from weightsmith.certify.bounding import BoundOptions, make_box, run_box
from weightsmith.certify.losses import fused_log_bound

NETS = SimpleNamespace(**runpy.run_path(str(Path(__file__).with_name("networks.py"))))
BUILDERS = {
    "mlp": NETS.mlp, "leaky": NETS.leaky, "cnn_bn_eval": NETS.cnn_bn, "residual": NETS.Residual, "maxpool":
    NETS.MaxPooled, "zoo_ibp": NETS.Zoo,
}  # fmt: skip
METHODS = {"IBP": "ibp", "CROWN-IBP": "crown-ibp", "CROWN": "crown"}


def tolerance(name, golden):
    if golden["x"].dtype == torch.float32:
        return {"rtol": 1e-5, "atol": 1e-6}
    return {"rtol": 1e-7 if name == "leaky" else 1e-9, "atol": 1e-12}


@pytest.mark.parametrize("reference", METHODS)
@pytest.mark.parametrize("name", BUILDERS)
def test_bounds_and_margins_are_those_of_the_reference(name, reference):
    golden = NETS.case(name)
    if f"{reference}/lower" not in golden:
        pytest.skip("recorded for IBP only")
    model = NETS.with_parameters(BUILDERS[name](), name).eval()
    box = {"lower": golden["x_L"], "upper": golden["x_U"], "method": METHODS[reference]}
    found = bounds(model, golden["x"], None, **box)
    torch.testing.assert_close(found.lower, golden[f"{reference}/lower"], **tolerance(name, golden))
    torch.testing.assert_close(found.upper, golden[f"{reference}/upper"], **tolerance(name, golden))
    proved = margins(model, golden["x"], golden["y"], None, **box)
    torch.testing.assert_close(proved.lower, golden[f"{reference}/margin_lower"], **tolerance(name, golden))
    torch.testing.assert_close(model(golden["x"]), golden["logits"], **tolerance(name, golden))


def test_training_mode_has_the_bounds_and_gradients_of_the_reference():
    golden = NETS.case("cnn_bn_train")
    model = NETS.with_parameters(NETS.cnn_bn(3, 27, 8, 4), "cnn_bn_train").train()
    args = (golden["x"], golden["eps"].item())
    clip = {"lower": 0.0, "upper": 1.0}
    exact = {"rtol": 1e-9, "atol": 1e-12}
    torch.testing.assert_close(bounds(model, *args, **clip).lower, golden["logits_lower"], **exact)
    crown = margins(model, args[0], golden["y"], args[1], method="crown-ibp", **clip).lower
    torch.testing.assert_close(crown, golden["crown_ibp_margin_lower"], **exact)
    proved = margins(model, args[0], golden["y"], args[1], **clip).lower
    torch.testing.assert_close(proved, golden["margin_lower"], **exact)
    loss = robust_cross_entropy(proved)
    torch.testing.assert_close(loss[None], golden["robust_ce"], **exact)
    loss.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, golden[f"grad/{name}"], rtol=1e-9, atol=1e-12)


def test_fused_bounds_are_those_of_the_reference():
    golden = NETS.case("fusion")
    model = NETS.with_parameters(NETS.fusion(), "fusion")
    traced, options = trace(model, golden["x"]), BoundOptions()
    box = make_box(traced, (golden["x"],), golden["eps"].item(), None, None, options)
    done = run_box(traced, (box,), (golden["x"],), method="ibp", options=options)

    def fused(weight):
        return fused_log_bound(traced, done, golden["y"], weight=weight)

    close = {"rtol": 1e-5, "atol": 1e-6}
    torch.testing.assert_close(fused(0.0)[:, None], golden["ibp_log_upper"], **close)
    torch.testing.assert_close(fused(1.0)[:, None], golden["crown_ibp_log_upper"], **close)
    for weight in (0.25, 0.75):
        torch.testing.assert_close(fused(weight).mean()[None], golden[f"mixed_loss_factor_{weight}"], **close)


@pytest.mark.parametrize("name", ["reg", "reg_tight"])
def test_regularizers_are_those_of_the_reference(name):
    golden = NETS.case(name)
    model = NETS.with_parameters(NETS.cnn7(), name).train()
    traced, options = trace(model, golden["x"]), BoundOptions()
    for index, (eps, values) in enumerate(zip(golden["eps"].tolist(), golden["values"], strict=True)):
        model.zero_grad()
        box = make_box(traced, (golden["x"],), eps or 1e-6, 0.0, 1.0, options)
        done = run_box(traced, (box,), (golden["x"],), method="ibp", options=options)
        found = BoundRegularizer()(done)
        torch.testing.assert_close(torch.stack(found), values[1:4], rtol=1e-6, atol=1e-7)
        (0.5 * (1 - eps / 0.1) * (found.tightness + found.balance)).backward()
        for key in ("0.weight", "4.weight"):
            recorded = golden[f"grad_reg_{index}/{key}"]
            atol = 1e-6 * max(1e-3, recorded.abs().max().item())
            torch.testing.assert_close(model.get_parameter(key).grad, recorded, rtol=1e-6, atol=atol)
    relus = [node for node in done.graph.nodes if node.op == "relu"]
    for index, node in enumerate(relus):
        entering = done.values[node.parents[0]]
        torch.testing.assert_close(entering.lower, golden[f"pre_lower/{index}"], rtol=1e-9, atol=1e-12)
        torch.testing.assert_close(entering.upper, golden[f"pre_upper/{index}"], rtol=1e-9, atol=1e-12)


def test_ten_epochs_of_training_are_those_of_the_official_loop():
    golden = NETS.case("trace")
    model = NETS.cnn7().double()
    schedule = EpsilonSchedule(0.1, 1, start=2, length=6)
    training = CertifiedTraining(model, 0.1, schedule, golden["x"], lower=0.0, upper=1.0)
    NETS.with_parameters(model, "trace", "init")
    optimizer = torch.optim.Adam(model.parameters())
    model.train()
    for epoch in range(10):
        for group in optimizer.param_groups:
            group["lr"] = golden["trace/lr"][epoch].item()
        optimizer.zero_grad()
        loss = training.loss(golden["x"], golden["y"])
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), 10.0)
        optimizer.step()
        assert training.eps == pytest.approx(golden["trace/eps"][epoch].item(), abs=1e-15)
        assert loss.item() == pytest.approx(golden["trace/Loss"][epoch].item(), rel=1e-6)
        assert norm.item() == pytest.approx(golden["trace/grad_norm"][epoch].item(), rel=1e-6)
        found = training.last.regularization
        assert (found is None) == bool(golden["trace/L_tightness"][epoch].isnan())
        training.step()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter, nn.Parameter(golden[f"final/{name}"]), rtol=1e-6, atol=1e-9)
    error = verified_error(model, [(golden["x"], golden["y"])], 0.1, lower=0.0, upper=1.0)
    assert [error.standard, float(error)] == golden["eval"][:2].tolist()
    proved = margins(model.eval(), golden["x"], golden["y"], 0.1, lower=0.0, upper=1.0)
    assert robust_cross_entropy(proved.lower).item() == pytest.approx(golden["eval"][2].item(), rel=1e-6)


@pytest.mark.parametrize(
    ("name", "eps", "start", "length", "steps", "shape"),
    [
        ("smoothed", 0.4, 1, 4, 5, "smoothed"),
        ("smoothed_start3", 8 / 255, 3, 3, 4, "smoothed"),
        ("linear", 0.3, 2, 3, 4, "linear"),
    ],
)
def test_schedules_are_those_of_the_official_code(name, eps, start, length, steps, shape):
    recorded = NETS.case("sched")[name].tolist()
    schedule = EpsilonSchedule(eps, steps, start=start, length=length, shape=shape)
    assert [schedule.value(step) for step in range(len(recorded))] == pytest.approx(recorded, rel=1e-12, abs=1e-15)
