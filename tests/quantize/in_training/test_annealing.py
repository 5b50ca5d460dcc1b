import copy
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from weightsmith.core.errors import UsageError
from weightsmith.lab.models import build_model
from weightsmith.quantize.in_training.annealing import ConfidenceGuidedAnnealing, near_threshold
from weightsmith.quantize.in_training.lsq import LSQWeight
from weightsmith.quantize.in_training.prepare import calibrate_, prepare_ofq_
from weightsmith.quantize.in_training.statsq import StatsQ

GOLDEN = load_file("tests/golden/ofq.safetensors")


def layer(bits=2, width=40, rows=16):
    torch.manual_seed(0)
    linear = nn.Linear(width, rows)
    parametrize.register_parametrization(linear, "weight", StatsQ(bits))
    return linear


def latent(linear):
    return linear.parametrizations.weight.original


def train(linear, optimizer, steps, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        optimizer.zero_grad()
        linear(torch.randn(8, linear.in_features, generator=generator)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.parametrize("boundary", [0.005, 0.05])
def test_who_may_train_is_who_may_in_the_authors_code(bits, boundary):
    case = f"cga/mask_b{bits}_br{boundary}"
    assert torch.equal(near_threshold(GOLDEN[f"{case}/w"], bits, boundary), GOLDEN[f"{case}/frozen"] == 0)


def test_six_steps_are_those_of_the_authors_code():
    bits, boundary, lr, decay = GOLDEN["cga/steps/hp"].tolist()
    linear = nn.Linear(24, 6, bias=False).double()
    with torch.no_grad():
        linear.weight.copy_(GOLDEN["cga/steps/w0"])
    parametrize.register_parametrization(linear, "weight", StatsQ(int(bits)))
    optimizer = torch.optim.AdamW(linear.parameters(), lr=lr, weight_decay=decay)
    annealing = ConfidenceGuidedAnnealing(linear, boundary)
    for step in range(6):
        frozen = GOLDEN[f"cga/steps/frozen{step}"].bool()
        latent(linear).grad = GOLDEN[f"cga/steps/g{step}"].clone()
        annealing.pre_step()
        assert torch.equal(latent(linear).grad == 0, frozen)
        optimizer.step()
        annealing.post_step()
        assert torch.allclose(latent(linear), GOLDEN[f"cga/steps/w{step + 1}"], rtol=0, atol=1e-9)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 6), st.floats(0, 0.49), st.integers(0, 2**31))
def test_a_weight_trains_just_when_it_is_near_an_inner_threshold(bits, boundary, seed):
    w = torch.randn(3, 40, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    units = w / (2 * w.abs().mean(1, keepdim=True)) * 2 ** (bits - 1)
    inner = torch.arange(-(2 ** (bits - 1)) + 1, 2 ** (bits - 1))
    distance = (units[..., None] - inner).abs().amin(-1)
    clear = (distance - boundary).abs() > 1e-9
    assert torch.equal(near_threshold(w, bits, boundary)[clear], (distance <= boundary)[clear])


def test_clipped_weights_are_frozen_although_their_code_is_at_a_half_integer():
    w = torch.cat([torch.full((1, 99), 0.1), torch.full((1, 1), 50.0)], 1)
    assert not near_threshold(w, 2, 0.4)[0, -1]


@pytest.mark.parametrize("boundary", [-0.1, 0.5, math.nan])
def test_a_boundary_that_frees_nothing_or_everything_is_refused(boundary):
    for call in (
        lambda: near_threshold(torch.ones(2, 2), 2, boundary),
        lambda: ConfidenceGuidedAnnealing(layer(), boundary),
    ):
        with pytest.raises(UsageError, match="boundary must be at least 0 and below"):
            call()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
        lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, foreach=True),
    ],
)
def test_frozen_weights_hold_still_against_momentum_and_decay_to_the_last_bit(make):
    linear = layer()
    optimizer = make(linear.parameters())
    train(linear, optimizer, 3)
    handles = ConfidenceGuidedAnnealing(linear, 0.05).attach(optimizer)
    for seed in range(4):
        before, bias = latent(linear).detach().clone(), linear.bias.detach().clone()
        may = near_threshold(before, 2, 0.05)
        train(linear, optimizer, 1, seed)
        assert torch.equal(latent(linear)[~may], before[~may])
        assert not torch.equal(latent(linear)[may], before[may])
        assert not torch.equal(linear.bias, bias)
    for handle in handles:
        handle.remove()
    before = latent(linear).detach().clone()
    train(linear, optimizer, 1)
    assert not torch.equal(latent(linear)[~may], before[~may])


def test_calling_both_halves_is_the_same_as_attaching():
    finals = []
    for attached in (True, False):
        linear = layer()
        optimizer = torch.optim.AdamW(linear.parameters(), lr=0.01)
        annealing = ConfidenceGuidedAnnealing(linear)
        if attached:
            annealing.attach(optimizer)
        generator = torch.Generator().manual_seed(0)
        for _ in range(3):
            optimizer.zero_grad()
            linear(torch.randn(8, 40, generator=generator)).square().mean().backward()
            if not attached:
                annealing.pre_step()
            optimizer.step()
            if not attached:
                annealing.post_step()
        finals.append(latent(linear).detach())
    assert torch.equal(*finals)


def test_saving_and_loading_continues_as_if_nothing_had_happened():
    def start():
        linear = layer()
        optimizer = torch.optim.AdamW(linear.parameters(), lr=0.01)
        annealing = ConfidenceGuidedAnnealing(linear, 0.02)
        annealing.attach(optimizer)
        return linear, optimizer, annealing

    objects = start()
    train(*objects[:2], 3)
    saved = copy.deepcopy([one.state_dict() for one in objects])
    train(*objects[:2], 3, seed=1)
    resumed = start()
    for one, state in zip(resumed, saved, strict=True):
        one.load_state_dict(state)
    train(*resumed[:2], 3, seed=1)
    assert torch.equal(latent(objects[0]), latent(resumed[0]))


def test_a_weight_that_is_frozen_or_has_no_gradient_is_left_out():
    model = nn.Sequential(layer(), nn.Linear(16, 4))
    latent(model[0]).requires_grad_(False)
    parametrize.register_parametrization(model[1], "weight", StatsQ(2))
    annealing = ConfidenceGuidedAnnealing(model)
    annealing.pre_step()
    annealing.post_step()
    model[1](torch.randn(2, 16)).sum().backward()
    annealing.pre_step()
    assert latent(model[0]).grad is None
    assert (latent(model[1]).grad == 0).any()


def test_a_tied_weight_is_masked_once():
    quantizer, one, two = StatsQ(2), nn.Linear(6, 6), nn.Linear(6, 6)
    two.weight = one.weight
    for linear in (one, two):
        parametrize.register_parametrization(linear, "weight", quantizer)
    assert len(ConfidenceGuidedAnnealing(nn.Sequential(one, two))._sites) == 1


def test_a_skipped_step_is_no_harm():
    linear = layer()
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.01)
    annealing = ConfidenceGuidedAnnealing(linear)
    linear(torch.randn(2, 40)).sum().backward()
    before = latent(linear).detach().clone()
    annealing.pre_step()
    annealing.post_step()
    annealing.post_step()
    assert torch.equal(latent(linear), before)
    optimizer.step()
    assert not torch.equal(latent(linear), before)


def test_half_precision_and_transposed_layers_anneal_too():
    for module in (nn.Linear(8, 6).bfloat16(), nn.ConvTranspose2d(4, 6, 3)):
        parametrize.register_parametrization(module, "weight", StatsQ(2, 1 if module.weight.dim() == 4 else 0))
        optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
        ConfidenceGuidedAnnealing(module).attach(optimizer)
        shape = (2, 8) if module.weight.dim() == 2 else (2, 4, 5, 5)
        module(torch.randn(shape).to(module.weight.dtype)).square().mean().backward()
        before = latent(module).detach().clone()
        optimizer.step()
        assert (latent(module) == before).float().mean() > 0.8


def vit():
    torch.manual_seed(0)
    model = build_model("vit_tiny", channels=1, size=8, classes=10)
    return calibrate_(prepare_ofq_(model), torch.randn(4, 1, 8, 8))


def test_the_ends_and_the_query_key_weights_train_freely():
    model = vit()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ConfidenceGuidedAnnealing(model).attach(optimizer)
    model(torch.randn(4, 1, 8, 8)).square().mean().backward()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer.step()
    moved = {name: (p != before[name]).float().mean().item() for name, p in model.named_parameters()}
    qkv = latent(model.blocks[1].attn.qkv) != before["blocks.1.attn.qkv.parametrizations.weight.original"]
    assert qkv[:128].float().mean() > 0.5
    assert qkv[128:].float().mean() < 0.1
    assert moved["blocks.1.mlp.fc1.parametrizations.weight.original"] < 0.1
    assert moved["head.parametrizations.weight.original"] > 0.5


def test_the_gradient_of_the_product_can_be_masked():
    model = vit()
    x = torch.randn(4, 1, 8, 8)
    attention = model.blocks[0].attn
    wq, wk = attention.query_key_weights()
    product = attention.product.latent(wq, wk).detach().requires_grad_()
    annealing = ConfidenceGuidedAnnealing(model, 0.05, qk="mask")
    attention.product.quantizer(product).sum().backward()
    assert torch.equal(product.grad != 0, near_threshold(product.detach(), 2, 0.05))
    model(x).sum().backward()
    annealing.close()
    assert attention.product.quantizer.boundary is None
    with pytest.raises(UsageError, match="qk 'none' is not known"):
        ConfidenceGuidedAnnealing(model, qk="none")


def test_a_model_without_statistical_scales_is_refused():
    linear = nn.Linear(4, 4)
    parametrize.register_parametrization(linear, "weight", LSQWeight(linear.weight, 2))
    with pytest.raises(UsageError, match="no StatsQ weight"):
        ConfidenceGuidedAnnealing(linear)


def test_a_gradient_scaler_does_not_disturb():
    finals = []
    for scaled in (False, True):
        linear = layer()
        optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
        scaler = torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**10)
        ConfidenceGuidedAnnealing(linear, 0.05).attach(optimizer)
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            optimizer.zero_grad()
            scaler.scale(linear(torch.randn(8, 40, generator=generator)).square().mean()).backward()
            scaler.step(optimizer)
            scaler.update()
        finals.append(latent(linear).detach())
    assert torch.allclose(*finals, atol=1e-7)
