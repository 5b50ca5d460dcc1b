"""What is true of the forms whatever the numbers are."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.autograd import gradcheck
from torch.nn import functional as F

from weightsmith.adapt import bone_delta, bone_linear
from weightsmith.adapt.fused import block_sum

FORMS = ["row", "col", "free", "free1", "miss", "mini"]
each_form = pytest.mark.parametrize("form", FORMS)
close = {"rtol": 1e-9, "atol": 1e-9}
sizes = {
    "r": st.integers(1, 4),
    "down": st.integers(1, 4),
    "across": st.integers(1, 4),
    "tail": st.integers(0, 3),
    "seed": st.integers(0, 1000),
}


def draw(form, r, down, across, tail=0, seed=0):
    """Variant, weight, a block that fits, and an input with a batch of two dimensions."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    out, width = r * down, r * across + (tail if form in ("miss", "mini") else 0)
    shape = {
        "row": (across, r, r),
        "col": (down, r, r),
        "free": (2, 3, r, r),
        "free1": (1, 2, r, r),
        "miss": (r, out),
        "mini": (r, r),
    }[form]
    return form.rstrip("1"), normal(out, width), normal(*shape), normal(2, 3, width)


@each_form
@settings(max_examples=12, deadline=None)
@given(**sizes)
def test_both_implementations_multiply_with_the_weight_and_its_update(form, r, down, across, tail, seed):
    variant, weight, block, x = draw(form, r, down, across, tail, seed)
    bias = torch.arange(len(weight), dtype=torch.float64)
    expected = F.linear(x, weight + bone_delta(weight, block, variant), bias)
    for fused in (True, False):
        assert torch.allclose(bone_linear(x, weight, bias, block, variant, fused=fused), expected, **close)


@each_form
@settings(max_examples=8, deadline=None)
@given(**sizes)
def test_the_fused_backward_pass_gives_the_gradients_of_plain_operations(form, r, down, across, tail, seed):
    variant, weight, block, x = draw(form, r, down, across, tail, seed)
    bias = torch.zeros(len(weight), dtype=torch.float64)
    gradients = []
    for fused in (True, False):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, bias, block)]
        y = bone_linear(leaves[0], weight, leaves[1], leaves[2], variant, fused=fused)
        gradients.append(torch.autograd.grad(y.square().sum(), leaves))
    assert all(torch.allclose(left, right, **close) for left, right in zip(*gradients, strict=True))


@each_form
@settings(max_examples=8, deadline=None)
@given(**sizes)
def test_updates_are_linear_in_what_trains(form, r, down, across, tail, seed):
    variant, weight, block, _ = draw(form, r, down, across, tail, seed)
    other = torch.randn_like(block)
    mixed = bone_delta(weight, 0.3 * block - 2 * other, variant)
    assert torch.allclose(
        mixed, 0.3 * bone_delta(weight, block, variant) - 2 * bone_delta(weight, other, variant), **close
    )


@settings(max_examples=8, deadline=None)
@given(**sizes)
def test_miss_is_a_lora_whose_first_factor_is_a_pattern(r, down, across, tail, seed):
    _, weight, block, _ = draw("miss", r, down, across, tail, seed)
    pattern = torch.eye(r, dtype=torch.float64).repeat(1, weight.shape[1])[:, : weight.shape[1]]
    assert torch.allclose(bone_delta(weight, block, "miss"), block.T @ pattern, **close)


@settings(max_examples=8, deadline=None)
@given(**sizes)
def test_row_and_col_are_special_cases_of_free(r, down, across, tail, seed):
    for form, dim in (("row", 0), ("col", 1)):
        _, weight, block, _ = draw(form, r, down, across, tail, seed)
        assert torch.equal(bone_delta(weight, block, form), bone_delta(weight, block.unsqueeze(dim), "free"))


def test_a_mini_as_wide_as_the_output_is_miss():
    _, weight, block, _ = draw("miss", 3, 2, 2, 1)
    assert torch.equal(bone_delta(weight, block, "mini"), bone_delta(weight, block, "miss"))


@given(size=st.integers(1, 12), r=st.integers(1, 12))
def test_a_block_sum_adds_every_rth_entry(size, r):
    if r > size:
        return
    x = torch.arange(2.0 * size).view(2, size)
    assert torch.equal(block_sum(x, r), torch.stack([x[:, k::r].sum(1) for k in range(r)], 1))


@each_form
def test_gradients_agree_with_finite_differences(form):
    variant, weight, block, x = draw(form, 2, 2, 3, 1)
    gradcheck(
        lambda x, bias, block: bone_linear(x, weight, bias, block, variant),
        tuple(t.requires_grad_() for t in (x, torch.zeros(len(weight), dtype=torch.float64), block)),
    )


def test_plain_operations_can_be_differentiated_twice_and_give_the_weight_its_gradient():
    variant, weight, block, x = draw("row", 2, 2, 2)
    block.requires_grad_(), weight.requires_grad_()
    y = bone_linear(x, weight, None, block, variant)
    (first,) = torch.autograd.grad(y.square().sum(), block, create_graph=True)
    first.square().sum().backward()
    assert weight.grad.isfinite().all()
    assert block.grad.isfinite().all()


@each_form
@pytest.mark.parametrize("shape", [(), (0,), (0, 4), (1,), (2, 1, 3)])
def test_any_leading_shape_is_kept_even_an_empty_one(form, shape):
    variant, weight, block, _ = draw(form, 2, 3, 2, 1)
    x = torch.randn(*shape, weight.shape[1], dtype=torch.float64, requires_grad=True)
    y = bone_linear(x, weight, None, block.requires_grad_(), variant)
    assert y.shape == (*shape, len(weight))
    y.sum().backward()
    assert x.grad.shape == x.shape
    assert 0 not in shape or not block.grad.any()


@each_form
def test_a_transposed_weight_gives_the_same_result(form):
    variant, weight, block, x = draw(form, 2, 3, 2, 1)
    transposed = weight.T.contiguous().T
    for fused in (True, False):
        one, other = (bone_linear(x, w, None, block, variant, fused=fused) for w in (weight, transposed))
        assert torch.allclose(one, other, **close)


@each_form
def test_a_weight_larger_than_the_cache_is_worked_on_in_parts(form, monkeypatch):
    variant, weight, block, x = draw(form, 2, 5, 3, 1)
    x.requires_grad_(), block.requires_grad_()
    whole = torch.autograd.grad(bone_linear(x, weight, None, block, variant).sum(), (x, block))
    monkeypatch.setattr("weightsmith.adapt.fused._CACHED", 2 * 2 * weight.shape[1])
    parts = torch.autograd.grad(bone_linear(x, weight, None, block, variant).sum(), (x, block))
    assert all(torch.allclose(left, right, **close) for left, right in zip(whole, parts, strict=True))


@each_form
def test_half_precision_comes_out_as_it_went_in_and_near_the_exact_result(form):
    variant, weight, block, x = draw(form, 4, 4, 4)
    block = 0.1 * block
    expected = bone_linear(x, weight, None, block, variant)
    for adapter in (torch.float32, torch.bfloat16):
        for fused in (True, False):
            trained = block.to(adapter).requires_grad_()
            y = bone_linear(x.bfloat16(), weight.bfloat16(), None, trained, variant, fused=fused)
            y.sum().backward()
            assert y.dtype == torch.bfloat16
            assert trained.grad.dtype == adapter
            assert torch.allclose(y.double(), expected, rtol=0.05, atol=0.2)


@each_form
def test_autocast_computes_in_its_dtype_and_trains_in_float32(form):
    variant, weight, block, x = draw(form, 4, 4, 4)
    weight, x, block = weight.float(), x.float(), (0.1 * block).float().requires_grad_()
    for fused in (True, False):
        with torch.autocast("cpu", torch.bfloat16):
            y = bone_linear(x, weight, None, block, variant, fused=fused)
        assert y.dtype == torch.bfloat16
        (gradient,) = torch.autograd.grad(y.float().sum(), block)
        assert gradient.dtype == torch.float32
        assert torch.allclose(y.float(), bone_linear(x, weight, None, block, variant), rtol=0.05, atol=0.2)


@each_form
@pytest.mark.parametrize("fused", [True, pytest.param(False, marks=pytest.mark.slow)])
def test_it_compiles_without_a_graph_break(form, fused):
    variant, weight, block, x = draw(form, 2, 3, 2, 1)
    block.requires_grad_()
    torch._dynamo.reset()
    compiled = torch.compile(bone_linear, backend="aot_eager", fullgraph=True)
    y, expected = (f(x, weight, None, block, variant, fused=fused) for f in (compiled, bone_linear))
    assert torch.allclose(y, expected, **close)
    assert torch.allclose(*(torch.autograd.grad(out.square().sum(), block)[0] for out in (y, expected)), **close)


@pytest.mark.parametrize(
    ("variant", "shape", "most"), [("miss", (16, 64), 0.3), ("row", (4, 16, 16), 1), ("col", (4, 16, 16), 1)]
)
def test_the_backward_pass_keeps_less_than_the_weight(variant, shape, most):
    # in units of the input's size; a weight here is as large as the input
    x, weight = torch.randn(64, 64, requires_grad=True), torch.randn(64, 64)
    block = torch.zeros(shape, requires_grad=True)
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in (weight.data_ptr(), block.data_ptr()):
            kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = bone_linear(x, weight, None, block, variant)
    assert y.requires_grad
    assert sum(kept.values()) <= most * x.numel()
