"""The average with a balance weight: the algebra, and what a training run can come up with."""

import copy
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightsmith.continual import DynamicEMA, balance_weight
from weightsmith.core.errors import UsageError, WeightsmithWarning

MODES = ["official", "paper", "fixed"]


def reference(p, star, grad, before, *, kappa=2.0, fallback=0.01):
    """A step of the authors' rule for one tensor, as they write it."""
    a, b = (p - star).abs().sum().item(), grad.abs().sum().item()
    c = (grad - before).abs().sum().item() if before is not None else 0.0
    alpha = kappa * (1 + b) / (a * c) if a * c else float("inf")
    if not 0 < alpha < 1:
        alpha = fallback
    return (1 - alpha) * star + alpha * p, alpha


def params(*shapes, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)) for shape in shapes]


def move(held, seed, scale=1.0):
    """Other values and gradients, as an optimizer would leave them."""
    generator = torch.Generator().manual_seed(seed)
    for p in held:
        p.data += scale * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)
        p.grad = torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype)


@given(st.integers(0, 10**6), st.floats(0.001, 100), st.floats(0.01, 50))
@settings(max_examples=25, deadline=None)
def test_fast_step_is_the_authors_rule(seed, kappa, scale):
    held = params((7, 5), (3,), (2, 2, 2), seed=seed)
    ema = DynamicEMA(held, kappa=kappa)
    stars, before = [p.detach().clone() for p in held], [None] * 3
    for step in range(4):
        move(held, seed + step, scale)
        ema.step()
        for i, p in enumerate(held):
            stars[i], alpha = reference(p.detach(), stars[i], p.grad, before[i], kappa=kappa)
            before[i] = p.grad.clone()
            torch.testing.assert_close(ema.average[str(i)], stars[i], rtol=1e-10, atol=1e-10)
            assert ema.last_alpha[str(i)] == pytest.approx(alpha, rel=1e-9)


@given(
    st.floats(0, 1e6), st.floats(0, 1e6), st.floats(0, 1e6), st.floats(1e-6, 1e3), st.floats(0, 0.999),
    st.sampled_from(MODES),
)  # fmt: skip
@settings(max_examples=200, deadline=None)
def test_weight_is_always_between_0_and_1(a, b, c, kappa, beta, mode):
    a, b, c = (torch.tensor([x], dtype=torch.float64) for x in (a, b, c))
    alpha = balance_weight(a, b, c, kappa=kappa, fallback_beta=beta, mode=mode).item()
    assert 0 < alpha <= 1
    if mode == "fixed":
        assert alpha == 1 - beta


@given(st.integers(0, 10**6), st.sampled_from(MODES))
@settings(max_examples=25, deadline=None)
def test_average_stays_within_what_the_parameters_were(seed, mode):
    held = params((4, 3), (5,), seed=seed)
    least, most = [p.detach().clone() for p in held], [p.detach().clone() for p in held]
    ema = DynamicEMA(held, mode)
    for step in range(5):
        move(held, seed + step)
        for i, p in enumerate(held):
            least[i], most[i] = torch.minimum(least[i], p.detach()), torch.maximum(most[i], p.detach())
        ema.step()
        for i in range(2):
            star = ema.average[str(i)]
            assert (star >= least[i] - 1e-9).all()
            assert (star <= most[i] + 1e-9).all()


def test_average_unrolls_into_a_weighted_sum():
    """Equation 21 of the paper."""
    (p,) = params((6,))
    ema, visited, alphas = DynamicEMA([p], kappa=0.5), [p.detach().clone()], []
    for step in range(6):
        move([p], step)
        ema.step()
        visited.append(p.detach().clone())
        alphas.append(ema.last_alpha["0"])
    betas = [1 - alpha for alpha in alphas]
    total = torch.tensor(betas).double().prod() * visited[0]
    for i, alpha in enumerate(alphas):
        total = total + alpha * torch.tensor(betas[i + 1 :]).double().prod() * visited[i + 1]
    torch.testing.assert_close(ema.average["0"], total, rtol=1e-6, atol=1e-6)


def test_first_step_uses_the_fallback():
    held = params((4,))
    for mode in MODES:
        ema = DynamicEMA(held, mode, fallback_beta=0.9)
        move(held, 0)
        ema.step()
        assert ema.last_alpha == pytest.approx({"0": 0.1})
        assert ema.fallback_fraction == 1.0


def test_after_first_step_starts_where_the_first_step_ends():
    held = params((4,))
    ema = DynamicEMA(held, init="after_first_step")
    move(held, 0)
    ema.step()
    torch.testing.assert_close(ema.average["0"], held[0].detach(), rtol=0, atol=1e-15)


@pytest.mark.parametrize("mode", ["official", "paper"])
def test_no_distance_or_a_repeated_gradient_uses_the_fallback(mode):
    held = params((4,), (3,))
    ema = DynamicEMA(held, mode)
    move(held, 0)
    ema.step()
    held[0].data.copy_(ema.average["0"])
    held[0].grad = torch.ones_like(held[0])
    held[1].data += 1  # and its gradient repeats
    ema.step()
    assert ema.last_alpha == pytest.approx({"0": 0.01, "1": 0.01})
    assert all(tensor.isfinite().all() for tensor in ema.average.values())


@pytest.mark.parametrize("where", ["parameter", "gradient"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("mode", MODES)
def test_what_is_not_finite_leaves_its_average_and_warns_once(where, value, mode):
    held = params((4,), (3,))
    ema = DynamicEMA(held, mode, kappa=0.5)
    move(held, 0)
    ema.step()
    before, steps = copy.deepcopy(ema.state_dict()["tensors"]["0"]), []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for step in (1, 2):
            other = ema.average["1"].clone()
            kept = held[0].detach().clone()
            move(held, step)
            (held[0].data if where == "parameter" else held[0].grad)[1] = value
            ema.step()
            steps.append(torch.equal(ema.average["1"], other))
            held[0].data.copy_(kept)
    after = ema.state_dict()["tensors"]["0"]
    assert ["0 or its gradient is not finite" in str(w.message) for w in caught] == [True]
    assert torch.equal(after["average"], before["average"])
    assert mode == "fixed" or torch.equal(after["gradient"], before["gradient"])
    assert ema.skipped == {"0": 2}
    assert ema.last_alpha["0"] == 0
    assert not any(steps)  # the other tensor went on


def test_strict_raises_on_what_is_not_finite_and_changes_nothing():
    held = params((4,))
    ema = DynamicEMA(held, strict=True)
    move(held, 0)
    ema.step()
    before = ema.average["0"].clone()
    held[0].grad[0] = float("nan")
    with pytest.raises(RuntimeError, match="not finite"):
        ema.step()
    assert torch.equal(ema.average["0"], before)
    assert ema.step_count == 1


def test_a_parameter_without_gradient_uses_the_fallback_and_keeps_the_earlier_one():
    held = params((4,), (3,))
    ema = DynamicEMA(held, kappa=0.01)
    move(held, 0)
    ema.step()
    first = held[0].grad.clone()
    move(held, 1)
    held[0].grad = None
    star = ema.average["0"].clone()
    ema.step()
    assert ema.last_alpha["0"] == pytest.approx(0.01)
    torch.testing.assert_close(ema.average["0"], 0.99 * star + 0.01 * held[0].detach())
    star = ema.average["0"].clone()
    move(held, 2)
    ema.step()
    expected, _ = reference(held[0].detach(), star, held[0].grad, first, kappa=0.01)
    torch.testing.assert_close(ema.average["0"], expected)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("mode", ["official", "paper"])
def test_a_step_after_zero_grad_is_an_error(set_to_none, mode):
    model = nn.Linear(3, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema = DynamicEMA(model, mode)
    with pytest.raises(RuntimeError, match="on_optimizer_step"):
        for _ in range(20):
            model(torch.randn(4, 3)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            ema.step()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_averaged_in_float32(dtype):
    (p,) = params((64,), dtype=dtype)
    ema = DynamicEMA([p], "fixed", fallback_beta=0.999)
    start = p.detach().float()
    p.data += 1
    moved = p.detach().float()
    p.grad = torch.ones_like(p)
    for _ in range(3):
        ema.step()
    assert ema.average["0"].dtype == torch.float32
    torch.testing.assert_close(ema.average["0"], moved - 0.999**3 * (moved - start), rtol=1e-5, atol=1e-6)
    ema.copy_to_model()
    assert p.dtype == dtype


def test_half_precision_takes_norms_in_float32():
    held = params((40, 40), dtype=torch.bfloat16)
    wide = [nn.Parameter(p.detach().float()) for p in held]
    emas = [DynamicEMA(held), DynamicEMA(wide)]
    for step in range(3):
        move(held, step)
        wide[0].data.copy_(held[0].detach())
        wide[0].grad = held[0].grad.float()
        for ema in emas:
            ema.step()
    assert emas[0].last_alpha == emas[1].last_alpha
    assert torch.equal(emas[0].average["0"], emas[1].average["0"])


def test_a_parameter_that_joins_starts_from_its_value_and_a_frozen_one_stays():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].requires_grad_(False)
    ema = DynamicEMA(model)
    move([p for p in model.parameters() if p.requires_grad], 0)
    ema.step()
    model[1].requires_grad_(True)
    model[0].requires_grad_(False)
    kept = ema.average["0.weight"].clone()
    start = model[1].weight.detach().clone()
    model[1].weight.grad = torch.ones_like(model[1].weight)
    model[0].weight.data += 5
    ema.step()
    assert torch.equal(ema.average["1.weight"], start)
    assert torch.equal(ema.average["0.weight"], kept)
    assert ema.last_alpha["0.weight"] == 0


def test_tied_parameters_are_averaged_once():
    model = nn.ModuleDict({"a": nn.Linear(3, 3, bias=False), "b": nn.Linear(3, 3, bias=False)})
    model["b"].weight = nn.Parameter(model["a"].weight.data)  # another parameter on the same storage
    assert list(DynamicEMA(model).average) == ["a.weight"]


@pytest.mark.parametrize(("mode", "advice"), [("official", "a smaller kappa than 2,"), ("paper", "official")])
def test_a_large_median_weight_warns_once(mode, advice):
    held = params((20,))
    ema = DynamicEMA(held, mode)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WeightsmithWarning)
        for step in range(40):
            move(held, step, scale=0.3)
            ema.step()
    assert [advice in str(w.message) for w in caught] == [True]


def test_swapped_gives_the_live_weights_back_also_after_an_error():
    model = nn.BatchNorm1d(4)
    ema = DynamicEMA(model)
    move(list(model.parameters()), 0)
    ema.step()
    live = copy.deepcopy(model.state_dict())
    with pytest.raises(KeyError), ema.swapped():
        torch.testing.assert_close(model.weight.detach(), ema.average["weight"])
        with pytest.raises(UsageError, match="exchanged"):
            ema.step()
        with pytest.raises(UsageError, match="exchanged"):
            ema.swap()
        raise KeyError
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, live[name])
    with pytest.raises(UsageError, match="nothing to restore"):
        ema.restore()


def test_buffers_stay_live():
    model = nn.BatchNorm1d(4)
    ema = DynamicEMA(model)
    model(torch.randn(8, 4)).square().sum().backward()
    running = model.running_mean.clone()
    ema.step()
    assert ema.copy_to_model() is model
    assert torch.equal(model.running_mean, running)


@pytest.mark.filterwarnings("ignore:the median averaging weight")
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("at", [1, 3, 19])
def test_saved_and_loaded_goes_on_as_if_never_stopped(mode, at):
    held, twin = params((4, 3), (5,)), params((4, 3), (5,))
    one, other = DynamicEMA(held, mode, kappa=0.1), DynamicEMA(twin, mode, kappa=0.1)
    for step in range(at):
        move(held, step)
        one.step()
    for p, q in zip(held, twin, strict=True):
        q.data.copy_(p.detach())
    other.load_state_dict(copy.deepcopy(one.state_dict()))
    for step in range(at, at + 3):
        move(held, step)
        move(twin, step)
        one.step()
        other.step()
    assert all(torch.equal(one.average[name], other.average[name]) for name in one.average)
    assert one.last_alpha == other.last_alpha
    assert (one.step_count, one.fallback_fraction) == (other.step_count, other.fallback_fraction)


def test_a_state_of_something_else_is_refused_and_changes_nothing():
    ema = DynamicEMA(params((4,)))
    before = ema.average["0"].clone()
    for other in (DynamicEMA(params((4,)), "paper"), DynamicEMA(params((5,))), DynamicEMA(params((4,), (4,)))):
        with pytest.raises(UsageError, match="state"):
            ema.load_state_dict(other.state_dict())
    assert torch.equal(ema.average["0"], before)


def test_attach_counts_the_steps_of_an_optimizer():
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    ema = DynamicEMA(model, kappa=0.01)
    handle = ema.attach(optimizer)
    for _ in range(2):
        model(torch.randn(4, 3)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    handle.remove()
    model(torch.randn(4, 3)).square().mean().backward()
    optimizer.step()
    assert ema.step_count == 2


def test_state_on_the_cpu_is_the_same():
    held = params((4, 3))
    one, other = DynamicEMA(held), DynamicEMA(held, offload="cpu")
    for step in range(3):
        move(held, step)
        one.step()
        other.step()
    assert torch.equal(one.average["0"], other.average["0"])


def test_many_parts_are_as_one():
    """Parameters beyond the size of a buffer, channels-last kernels, and sizes of one."""
    held = params((600, 700), (300, 400), (1,), (8, 4, 3, 3))
    held[3].data = held[3].data.to(memory_format=torch.channels_last)
    ema = DynamicEMA(held, kappa=50)
    stars = [p.detach().clone() for p in held]
    before = [None] * 4
    for step in range(3):
        move(held, step)
        ema.step()
        for i, p in enumerate(held):
            stars[i], _ = reference(p.detach(), stars[i], p.grad, before[i], kappa=50)
            before[i] = p.grad.clone()
            torch.testing.assert_close(ema.average[str(i)], stars[i], rtol=1e-9, atol=1e-9)


def test_state_is_two_copies_and_one_for_a_fixed_average():
    held = params((100, 10), dtype=torch.float32)
    assert DynamicEMA(held).nbytes == DynamicEMA(held, "paper").nbytes == 2 * 4000
    assert DynamicEMA(held, "fixed").nbytes == 4000


class _Sharded(nn.Parameter):
    placements = ()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"mode": "offical"}, UsageError, "official"),
        ({"kappa": 0.0}, UsageError, "kappa must be above 0, got 0.0"),
        ({"kappa": float("nan")}, UsageError, "kappa"),
        ({"fallback_beta": 1.0}, UsageError, "fallback_beta must be at least 0 and below 1"),
        ({"fallback_beta": -0.1}, UsageError, "fallback_beta"),
        ({"init": "end"}, UsageError, "init"),
        ({"offload": "disk"}, UsageError, "offload"),
        ({"dtype": torch.bfloat16}, UsageError, "16 bits does not move"),
        ({"params": []}, UsageError, "no trainable parameter"),
        ({"params": [nn.Parameter(torch.ones(2), requires_grad=False)]}, UsageError, "no trainable parameter"),
        ({"params": ["weight"]}, TypeError, "got str"),
        ({"params": nn.Linear(2, 2, device="meta")}, UsageError, "no values yet"),
        ({"params": [_Sharded(torch.ones(2))]}, UsageError, "sharded"),
    ],
)
def test_bad_arguments_are_refused(arguments, error, message):
    with pytest.raises(error, match=message):
        DynamicEMA(**({"params": params((2,))} | arguments))
