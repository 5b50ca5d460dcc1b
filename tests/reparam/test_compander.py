import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.testing import assert_close

from weightsmith.core.errors import WeightsmithWarning
from weightsmith.reparam import WeightCompander, compand_

FUNCTIONS = ("arctan", "arcsinh", "erf")
EXACT = {"rtol": 1e-12, "atol": 1e-12}
SINGLE = {"rtol": 2e-6, "atol": 2e-6}
scales = st.floats(0.2, 3.0)
functions = st.sampled_from(FUNCTIONS)


def numbers(low: float, high: float) -> st.SearchStrategy[torch.Tensor]:
    floats = st.floats(low, high, allow_subnormal=False)
    return st.lists(floats, min_size=1, max_size=8).map(lambda values: torch.tensor(values, dtype=torch.float64))


@pytest.mark.parametrize("case", ["fwd_arctan_0", "fwd_arctan_1", "fwd_arcsinh_2", "fwd_erf_3"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_forward_and_backward_match_the_reference(golden, case, dtype) -> None:
    tensors, setting = golden(case)
    tolerance = EXACT if dtype == torch.float64 else SINGLE
    compander = WeightCompander(setting["a"], setting["b"], setting["fn"], learnable=True).to(dtype)
    expected = {name: value.to(dtype) for name, value in tensors.items()}
    v = expected["v"].clone().requires_grad_()
    w = compander(v)
    w.backward(expected["grad_w"])
    assert_close(w.detach(), expected["w"], **tolerance)
    assert_close(compander.derivative(v), expected["dpsi"], **tolerance)
    assert_close(v.grad, expected["grad_v"], **tolerance)
    assert_close(compander.a.grad, expected["grad_a"], **tolerance)
    assert_close(compander.b.grad, expected["grad_b"], **tolerance)


@pytest.mark.parametrize("case", ["init_arctan_0", "init_arctan_1", "init_arcsinh_2", "init_erf_3"])
def test_the_start_matches_the_reference(golden, case) -> None:
    tensors, setting = golden(case)
    compander = WeightCompander(setting["a"], setting["b"], setting["fn"])
    tolerance = 1e-10 if setting["max_fraction_of_bound"] == 0.99 else 1e-12
    assert_close(compander.right_inverse(tensors["w"]), tensors["v"], rtol=tolerance, atol=1e-12)


def test_two_weights_that_share_a_pair_sum_its_gradients(golden) -> None:
    tensors, setting = golden("coarse")
    compander = WeightCompander(setting["a"], setting["b"], learnable=True)
    for index in (0, 1):
        v = tensors[f"v{index}"].clone().requires_grad_()
        w = compander(v)
        w.backward(tensors[f"grad_w{index}"])
        assert_close(w.detach(), tensors[f"w{index}"], **EXACT)
        assert_close(v.grad, tensors[f"grad_v{index}"], **EXACT)
    assert_close(compander.a.grad, tensors["grad_a"], **EXACT)
    assert_close(compander.b.grad, tensors["grad_b"], **EXACT)


def test_extreme_numbers_stay_finite(golden) -> None:
    tensors, setting = golden("extreme")
    compander = WeightCompander(setting["a"], setting["b"], setting["fn"])
    assert_close(compander(tensors["v"]), tensors["w"], **EXACT)
    assert_close(compander.derivative(tensors["v"]), tensors["dpsi"], **EXACT)


def test_infinities_reach_the_bound_and_nan_is_not_masked() -> None:
    compander = WeightCompander(0.7, 0.7)
    w = compander(torch.tensor([math.inf, -math.inf, math.nan]))
    assert_close(w[:2], torch.tensor([1.0, -1.0]) * 0.7 * math.pi / 2)
    assert w[2].isnan()


def test_assigning_a_shrunken_weight_is_exact_decoupled_decay(golden) -> None:
    tensors, setting = golden("decay")
    layer = nn.Linear(5, 4, dtype=torch.float64)
    compand_(layer, setting["a"], setting["b"])
    layer.parametrizations.weight.original.data.copy_(tensors["v"])
    with torch.no_grad():
        layer.weight = (1 - setting["lr"] * setting["weight_decay"]) * layer.weight
    assert_close(layer.parametrizations.weight.original.detach(), tensors["v_after"], **EXACT)


@given(functions, scales, scales, numbers(-3, 3))
def test_inverse_then_forward_is_the_identity(fn, a, b, u) -> None:
    compander = WeightCompander(a, b, fn)
    w = 0.45 * a * u / 1.5
    assert_close(compander(compander.right_inverse(w)), w, rtol=1e-11, atol=1e-12)


@given(functions, scales, scales, numbers(-50, 50))
def test_weights_are_odd_and_bounded_and_slopes_fall_away_from_zero(fn, a, b, v) -> None:
    compander = WeightCompander(a, b, fn)
    w, slope = compander(v), compander.derivative(v)
    assert_close(compander(-v), -w, rtol=0, atol=0)
    assert (w.abs() <= compander.bound).all()
    assert ((slope >= 0) & (slope <= (a / b) * (2 / math.sqrt(math.pi)) * (1 + 1e-12))).all()
    assert (compander.derivative(1.5 * v) <= slope).all()


@given(scales, scales, numbers(-5, 5))
def test_the_slope_of_arctan_is_a_cosine_of_the_weight(a, b, v) -> None:
    compander = WeightCompander(a, b)
    assert_close(compander.derivative(v), (a / b) * torch.cos(compander(v) / a).square(), rtol=1e-9, atol=1e-12)


@given(functions, scales, scales, numbers(-3, 3))
def test_gradients_of_the_pair_follow_from_those_of_the_weight(fn, a, b, v) -> None:
    compander = WeightCompander(a, b, fn, learnable=True)
    v = v.requires_grad_()
    grad_w = torch.linspace(-1, 2, len(v), dtype=torch.float64)
    compander(v).backward(grad_w)
    u, slope = v.detach() / b, compander.derivative(v)
    assert_close(v.grad, grad_w * slope)
    assert_close(compander.a.grad, (grad_w * compander.curve.value(u)).sum(), rtol=1e-9, atol=1e-9)
    assert_close(compander.b.grad, -(grad_w * slope * u).sum(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("fn", FUNCTIONS)
def test_first_and_second_derivatives_pass_finite_differences(fn) -> None:
    compander = WeightCompander(0.6, 0.9, fn, learnable=True)
    v = torch.randn(5, dtype=torch.float64, requires_grad=True)

    def weight(v: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(compander, {"a": a, "b": b}, v)

    inputs = (v, compander.a, compander.b)
    assert gradcheck(weight, inputs)
    assert gradgradcheck(weight, inputs)


def test_function_transforms_see_through_it() -> None:
    compander = WeightCompander(0.6, 0.9)
    v = torch.randn(3, 4)
    slopes = torch.func.vmap(torch.func.grad(lambda row: compander(row).sum()))(v)
    assert_close(slopes, compander.derivative(v))


@pytest.mark.parametrize("learnable", [False, True])
def test_the_compiled_path_matches_the_eager_one(learnable, monkeypatch) -> None:
    v = torch.randn(6, 4)
    results = []
    for compiling in (False, True):
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda compiling=compiling: compiling)
        compander = WeightCompander(0.7, 0.6, learnable=learnable).float()
        leaf = v.clone().requires_grad_()
        w = compander(leaf)
        w.square().sum().backward()
        results.append([w.detach(), leaf.grad, *(p.grad for p in compander.parameters())])
    assert_close(results[0], results[1])


@pytest.mark.parametrize("positive", [False, True])
def test_a_compiled_model_matches_its_eager_self(positive) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(144, 5))
    compand_(model, learnable=True, positive=positive)
    x = torch.randn(2, 3, 8, 8)
    expected = model(x)
    compiled = torch.compile(copy.deepcopy(model), backend="aot_eager", fullgraph=True)
    y = compiled(x)
    assert_close(y, expected)
    y.sum().backward()
    expected.sum().backward()
    assert_close([p.grad for p in compiled.parameters()], [p.grad for p in model.parameters()])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype) -> None:
    compander = WeightCompander(0.7, 0.9, learnable=True).float()
    v = torch.randn(50, dtype=dtype, requires_grad=True)
    w = compander(v)
    w.sum().backward()
    assert w.dtype == v.grad.dtype == dtype
    assert compander.right_inverse(w).dtype == dtype
    assert_close(w, (0.7 * torch.atan(v.detach().float() / 0.9)).to(dtype), rtol=0, atol=0)
    assert_close(v.grad, compander.derivative(v).to(dtype), rtol=0, atol=0)


def test_memory_format_is_preserved_both_ways() -> None:
    w = torch.rand(4, 3, 5, 5).to(memory_format=torch.channels_last)
    compander = WeightCompander()
    v = compander.right_inverse(w).requires_grad_()
    out = compander(v)
    out.backward(torch.ones_like(w))
    assert v.stride() == out.stride() == v.grad.stride() == w.stride()
    assert compander(w.transpose(0, 1)).stride() == w.transpose(0, 1).stride()


def test_only_v_is_kept_for_the_backward_pass_of_a_fixed_pair() -> None:
    kept = []
    v = torch.randn(100, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        WeightCompander().float()(v)
    assert [t.data_ptr() for t in kept if t.numel() > 1] == [v.data_ptr()]


@pytest.mark.parametrize("name", ["a", "b"])
@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf])
def test_a_pair_that_is_not_positive_and_finite_is_refused(name, value) -> None:
    with pytest.raises(ValueError, match=f"{name} must be finite and above 0, got {value}"):
        WeightCompander(**{name: value})


def test_weights_past_the_pole_are_refused_with_the_smallest_sufficient_a() -> None:
    w = torch.tensor([0.9, -0.1])
    with pytest.raises(ValueError, match=r"max \|w\| = 0.9.*smallest sufficient a is 0.573\b"):
        WeightCompander(0.5, 0.5).right_inverse(w)
    assert_close(WeightCompander(0.573, 0.5)(WeightCompander(0.573, 0.5).right_inverse(w)), w)


@given(st.sampled_from(["arctan", "erf"]), st.floats(0.01, 100))
def test_the_a_that_the_message_names_is_sufficient(fn, peak) -> None:
    w = torch.tensor([peak])
    with pytest.raises(ValueError) as refused:
        WeightCompander(1e-4, 1.0, fn).right_inverse(w)
    a = float(str(refused.value).split("sufficient a is ")[1].split(";")[0])
    assert WeightCompander(a, 1.0, fn).right_inverse(w).isfinite().all()
    with pytest.raises(ValueError, match="sufficient"):
        WeightCompander(a * 0.998, 1.0, fn).right_inverse(w)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_weight_within_rounding_of_the_bound_does_not_jump_to_the_other_branch(dtype) -> None:
    bound = torch.tensor(math.pi / 2, dtype=dtype)
    compander = WeightCompander(1.0, 1.0)
    for w in (bound, torch.nextafter(bound, bound * 0)):
        with pytest.raises(ValueError, match="sufficient"):
            compander.right_inverse(w)
    assert compander.right_inverse(bound * (1 - 1e-5)) > 0


def test_clipping_clamps_to_95_percent_of_the_bound_and_counts() -> None:
    compander = WeightCompander(0.5, 0.5, overflow="clip")
    with pytest.warns(WeightsmithWarning, match="2 of 3 in weight"):
        v = compander.right_inverse(torch.tensor([0.9, -5.0, 0.1]))
    limit = 0.95 * 0.5 * math.pi / 2
    assert_close(compander(v), torch.tensor([limit, -limit, 0.1]))


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("overflow", ["error", "clip"])
def test_weights_that_are_not_finite_are_refused(value, overflow) -> None:
    with pytest.raises(ValueError, match="NaN or infinite"):
        WeightCompander(overflow=overflow).right_inverse(torch.tensor([value]))


def test_an_unbounded_curve_refuses_what_its_inverse_overflows_on() -> None:
    with pytest.raises(ValueError, match="use a larger a"):
        WeightCompander(0.01, 1.0, "arcsinh").right_inverse(torch.tensor([9.0]))


def test_zero_constant_and_empty_weights_are_fine() -> None:
    compander = WeightCompander(0.7, 0.35)
    for w in (torch.zeros(3), torch.full((2, 2), 0.3), torch.empty(0, 4)):
        assert_close(compander(compander.right_inverse(w)), w)
    assert_close(compander.derivative(torch.zeros(1)), torch.tensor([2.0]))


def test_a_positive_pair_starts_where_asked_and_stays_above_zero() -> None:
    compander = WeightCompander(0.5, 1.0, learnable=True, positive=True)
    assert_close(compander.a.detach(), torch.tensor(0.5, dtype=torch.float64), **EXACT)
    for raw in compander.parameters():
        raw.data.fill_(-30.0)
    assert float(compander.a.detach()) > 0
    compander.assert_valid()


def test_contradictory_options_are_refused() -> None:
    with pytest.raises(ValueError, match="positive=True needs learnable=True"):
        WeightCompander(positive=True)
    with pytest.raises(ValueError, match="overflow 'ignore' is not known"):
        WeightCompander(overflow="ignore")
