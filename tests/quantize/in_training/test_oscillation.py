import copy

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.core.fold import fold_
from weightsmith.lab.models import build_model
from weightsmith.quantize.in_training.cures import Dampening, Freezing, IterativeFreezing, dampening
from weightsmith.quantize.in_training.distillation import distillation_loss
from weightsmith.quantize.in_training.finish import integer_weights
from weightsmith.quantize.in_training.lsq import LSQWeight
from weightsmith.quantize.in_training.oscillation import Oscillation, OscillationTracker, boundary_occupancy
from weightsmith.quantize.in_training.prepare import calibrate_, prepare_ofq_
from weightsmith.quantize.in_training.weight_quantizer import low_bit_sites

GOLDEN = load_file("tests/golden/ofq.safetensors")
MOMENTUM, THRESHOLD = GOLDEN["osc/hp"].tolist()
FRAMES = GOLDEN["osc/x_int"]
METHODS = pytest.mark.parametrize("weight", ["statsq", "lsq"])


def net(weight="statsq"):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 12), nn.ReLU(), nn.Linear(12, 3))
    return prepare_ofq_(model, activation_bits=None, weight=weight)


def vit():
    torch.manual_seed(0)
    model = build_model("vit_tiny", channels=1, size=8, classes=10)
    return calibrate_(prepare_ofq_(model), torch.randn(4, 1, 8, 8))


def train(model, optimizer, steps, *, before=None, after=None, penalty=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        loss = model(torch.randn(16, 6, generator=generator)).square().mean()
        (loss if penalty is None else loss + penalty()).backward()
        if before:
            before()
        optimizer.step()
        if after:
            after()


def close(left, right):
    return torch.allclose(left.double(), right.double(), rtol=0, atol=1e-9)


def test_frequencies_and_counts_are_those_of_the_authors_tracker():
    oscillation = Oscillation(FRAMES[0], MOMENTUM, dtype=torch.float64)
    for index, codes in enumerate(FRAMES):
        assert int(oscillation.step(codes).sum()) == GOLDEN["osc/track/oscillated_sum"][index]
        if index == 20:
            assert close(oscillation.frequency, GOLDEN["osc/track/ema_mid"])
    assert close(oscillation.frequency, GOLDEN["osc/track/ema_final"])
    assert close(oscillation.total, GOLDEN["osc/track/total"])


def test_freezing_is_that_of_the_authors_tracker():
    freezing = Freezing(FRAMES[0], MOMENTUM, dtype=torch.float64)
    for index, codes in enumerate(FRAMES):
        assert torch.equal(freezing.freeze(codes, THRESHOLD), GOLDEN["osc/freeze/out"][index])
        assert int(freezing.frozen.sum()) == GOLDEN["osc/freeze/n_frozen"][index]
    frozen = GOLDEN["osc/freeze/frozen"].bool()
    assert torch.equal(freezing.frozen, frozen)
    assert close(freezing.frozen_codes[frozen], GOLDEN["osc/freeze/frozen_x_int"][frozen])
    assert close(freezing.average, GOLDEN["osc/freeze/ema_x_int"])


def test_the_first_change_and_a_drift_in_one_direction_do_not_count():
    oscillation = Oscillation(torch.tensor([0]))
    assert [bool(oscillation.step(torch.tensor([code]))) for code in (1, 2, 2, 3, 2, 2, 3)] == [
        False, False, False, False, True, False, True,
    ]  # fmt: skip


def test_eight_bit_codes_may_jump_across_the_whole_range():
    oscillation = Oscillation(torch.tensor([-128]))
    assert not oscillation.step(torch.tensor([127]))
    assert oscillation.step(torch.tensor([-128]))


@METHODS
def test_the_tracker_sees_the_codes_of_low_bit_weights(weight):
    model = net(weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    tracker = OscillationTracker(model)
    handle = tracker.attach(optimizer)
    train(model, optimizer, 30)
    handle.remove()
    train(model, optimizer, 2)
    report = tracker.report()
    assert tracker.steps == 30
    assert list(tracker.frequencies()) == ["2.weight"]
    assert report["scale_jitter"] > 0
    assert report["events"] >= 0
    total = tracker._states["2.weight"].total
    assert report["events"] == pytest.approx(100 * total.sum().item() / total.numel() / 30)
    above = tracker.frequencies()["2.weight"] > 0.005
    assert report["oscillating"] == pytest.approx(100 * above.float().mean().item())


def test_the_tracker_follows_the_query_key_product_and_holds_no_graph():
    model = vit()
    tracker = OscillationTracker(model)
    model(torch.randn(4, 1, 8, 8)).sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    tracker.update()
    assert tracker.frequencies()["blocks.0.attn.product"].shape == (256, 64)
    held = [tensor for state in tracker._states.values() for tensor in state.state_dict().values()]
    assert not any(tensor.requires_grad for tensor in [*held, *tracker._scales.values()])


def test_nothing_is_recorded_in_evaluation_mode():
    model = net().eval()
    tracker = OscillationTracker(model)
    freezing = IterativeFreezing(model, 10)
    tracker.update()
    freezing.step()
    assert tracker.steps == freezing.taken == 0


def test_the_tracker_resumes_exactly():
    model, x = net(), 0.5
    optimizer = torch.optim.SGD(model.parameters(), lr=x)
    tracker = OscillationTracker(model)
    train(model, optimizer, 5, after=tracker.update)
    saved = copy.deepcopy((model.state_dict(), tracker.state_dict()))
    train(model, optimizer, 5, after=tracker.update, seed=1)
    other = net()
    other.load_state_dict(saved[0])
    resumed = OscillationTracker(other)
    resumed.load_state_dict(saved[1])
    train(other, torch.optim.SGD(other.parameters(), lr=x), 5, after=resumed.update, seed=1)
    assert resumed.report() == tracker.report()
    assert torch.equal(resumed.frequencies()["2.weight"], tracker.frequencies()["2.weight"])


@METHODS
def test_occupancy_is_the_share_near_a_threshold(weight):
    model = net(weight)
    assert boundary_occupancy(model, 0.0) <= boundary_occupancy(model, 0.05) <= boundary_occupancy(model, 0.49) <= 100
    (site,) = low_bit_sites(model)
    units = site.latent() / site.quantizer.step(site.latent()) - site.quantizer.offset
    inner = torch.arange(-2, 1) + 0.5
    near = (units[..., None] - inner).abs().amin(-1) <= 0.05
    assert boundary_occupancy(model, 0.05) == pytest.approx(100 * near.float().mean().item())


@METHODS
def test_a_frozen_weight_keeps_its_code_follows_its_scale_and_gets_no_gradient(weight):
    model = net(weight)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    freezing = IterativeFreezing(model, 60, threshold=(0.015, 0.011), start=0.0, momentum=0.01)
    train(model, optimizer, 60, before=freezing.step)
    (site,) = low_bit_sites(model)
    frozen, codes = site.quantizer.frozen, site.quantizer.frozen_codes
    assert 0 < freezing.frozen() < 100
    assert freezing.frozen() == pytest.approx(100 * frozen.float().mean().item())
    model.zero_grad()
    model(torch.randn(4, 6)).square().sum().backward()
    assert site.parameter.grad[frozen].abs().max() == 0
    assert site.parameter.grad[~frozen].abs().max() > 0
    expected = (codes + site.quantizer.offset) * site.quantizer.step(site.latent())
    assert torch.equal(model[2].weight[frozen], expected[frozen])
    x = torch.randn(4, 6)
    before, integers = model.eval()(x), integer_weights(model)["2.weight"]
    assert torch.equal(fold_(model)(x), before)
    assert torch.equal(model[2].weight, integers.dequantize())


def test_freezing_resumes_exactly_also_for_evaluation_alone():
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    options = {"threshold": (0.015, 0.011), "start": 0.0}
    freezing = IterativeFreezing(model, 60, **options)
    train(model, optimizer, 40, before=freezing.step)
    saved = copy.deepcopy((model.state_dict(), freezing.state_dict()))
    x = torch.randn(4, 6)
    expected = model(x)
    restored = net()
    restored.load_state_dict(saved[0])
    assert torch.equal(restored(x), expected)
    train(model, optimizer, 10, before=freezing.step, seed=1)
    resumed = IterativeFreezing(restored, 60, **options)
    resumed.load_state_dict(saved[1])
    train(restored, torch.optim.SGD(restored.parameters(), lr=1.0), 10, before=resumed.step, seed=1)
    assert resumed.threshold == freezing.threshold
    assert all(torch.equal(left, right) for left, right in zip(
        model.state_dict().values(), restored.state_dict().values(), strict=True
    ))  # fmt: skip


def test_schedules_begin_late_and_follow_a_cosine():
    freezing, damp = IterativeFreezing(net(), 100), Dampening(net(), 100)
    seen = []
    for taken in (0, 24, 25, 62.5, 100, 120):
        freezing.taken = damp.taken = taken
        seen.append((round(freezing.threshold, 4), round(damp.weight, 4)))
    assert seen == [(0, 0), (0, 0), (0.1, 0), (0.0555, 0.05), (0.011, 0.1), (0.011, 0.1)]


def test_dampening_is_that_of_the_authors():
    w = GOLDEN["dampening/w"].clone().requires_grad_()
    quantizer = LSQWeight(w, 3)
    quantizer.scale.data = GOLDEN["dampening/s"]
    loss = 0.3 * dampening(quantizer, w, "sum")
    loss.backward()
    assert close(loss, GOLDEN["dampening/loss_weight0.3_b3"])
    assert close(w.grad, GOLDEN["dampening/grad_w"])
    assert quantizer.scale.grad is None
    assert close(dampening(quantizer, w, "row") * 9 * 0.3, loss)


def test_dampening_draws_weights_to_their_levels_also_in_the_product():
    model = vit()
    damp = Dampening(model, 1, start=0.0, aggregate="sum")
    damp.step()
    sites = {site.name: site for site in low_bit_sites(model)}
    distance = lambda: sum(dampening(s.quantizer, s.rows(), "sum").item() for s in sites.values())  # noqa: E731
    before = distance()
    damp().backward()
    assert model.blocks[0].attn.qkv.parametrizations.weight.original.grad[:64].abs().sum() > 0
    torch.optim.SGD(model.parameters(), lr=0.01).step()
    assert distance() < before
    fresh = Dampening(vit(), 1, start=0.0)
    fresh.load_state_dict(damp.state_dict())
    assert fresh.weight == damp.weight == 0.1


def test_what_is_out_of_range_is_refused():
    model = net()
    for call, message in (
        (lambda: OscillationTracker(model, momentum=0.0), "momentum must be above 0"),
        (lambda: IterativeFreezing(model, 0), "steps must be at least 1"),
        (lambda: IterativeFreezing(model, 10, start=1.0), "start must be"),
        (lambda: IterativeFreezing(model, 10, threshold=(0.01, 0.1)), "threshold must fall"),
        (lambda: IterativeFreezing(model, 10, momentum=0.02), "momentum must be below the last threshold"),
        (lambda: Dampening(model, 10, weight=-1.0), "weight must not be negative"),
        (lambda: Dampening(model, 10, aggregate="mean"), "aggregate 'mean' is not known"),
        (lambda: OscillationTracker(nn.Linear(2, 2)), "no quantized weight"),
        (lambda: boundary_occupancy(model, 0.5), "boundary must be"),
    ):
        with pytest.raises(UsageError, match=message):
            call()


def test_the_teacher_counts_as_in_the_authors_code():
    golden = {key[3:]: value for key, value in GOLDEN.items() if key.startswith("kd/")}
    teacher = golden["teacher_cls"].clone().requires_grad_()
    student = golden["student_cls"].clone().requires_grad_()
    assert close(distillation_loss((student, golden["student_dist"]), teacher, golden["y"]), golden["loss_two_heads"])
    loss = distillation_loss(student, teacher, golden["y"])
    loss.backward()
    assert close(loss, golden["loss_one_head"])
    assert teacher.grad is None
    mixed = nn.functional.one_hot(golden["y"], 7).double()
    assert close(distillation_loss(student, teacher, mixed), loss)
