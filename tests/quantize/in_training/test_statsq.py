import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from torch import nn
from torch.nn.utils import parametrize

from weightsmith.core.errors import UsageError
from weightsmith.quantize.formats.pack import pack_rows, unpack_rows
from weightsmith.quantize.in_training.cache import cached_weights
from weightsmith.quantize.in_training.statsq import StatsQ, statsq, statsq_codes

GOLDEN = load_file("tests/golden/ofq.safetensors")
BITS = pytest.mark.parametrize("bits", [2, 3, 4])


def close(left, right, atol=1e-9):
    return torch.allclose(left, right, rtol=0, atol=atol)


@BITS
@pytest.mark.parametrize("case", [0, 1])
def test_values_codes_scales_and_gradients_are_those_of_the_authors_code(bits, case):
    golden = {key: GOLDEN[f"statsq/b{bits}_{case}/{key}"] for key in ("w", "g", "out", "scale", "codes", "grad_w")}
    w = golden["w"].requires_grad_()
    out = statsq(w, bits)
    out.backward(golden["g"])
    codes, step = statsq_codes(w, bits)
    assert close(out, golden["out"])
    assert close(w.grad, golden["grad_w"])
    assert torch.equal(codes, golden["codes"])
    assert close(step * 2 ** (bits - 1), golden["scale"])


@BITS
def test_ties_go_to_the_even_integer(bits):
    assert close(statsq(GOLDEN[f"statsq/ties_b{bits}/w"], bits), GOLDEN[f"statsq/ties_b{bits}/out"])


def test_other_axes_can_be_kept():
    assert close(statsq(GOLDEN["statsq/3d_b3/w"], 3, keep_axis=1), GOLDEN["statsq/3d_b3/out"])
    assert close(statsq(GOLDEN["statsq/4d_b2/x"], 2, keep_axis=-2), GOLDEN["statsq/4d_b2/out"])
    assert close(statsq(GOLDEN["statsq/f32_b2/w"], 2), GOLDEN["statsq/f32_b2/out"], atol=1e-6)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(1, 8),
    st.integers(0, 2**31),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.float16]),
)
def test_every_value_is_its_code_on_the_grid_and_codes_are_in_range(bits, seed, dtype):
    w = torch.randn(3, 17, generator=torch.Generator().manual_seed(seed)).to(dtype)
    codes, step = statsq_codes(w, bits)
    half = 2 ** (bits - 1)
    assert codes.min() >= -half
    assert codes.max() <= half - 1
    assert torch.equal(statsq(w, bits), ((codes + 0.5) * step).to(dtype))


def test_one_bit_has_two_levels():
    w = torch.randn(4, 9)
    assert torch.allclose(statsq(w, 1).abs(), w.abs().mean(1, keepdim=True).expand_as(w))
    assert torch.equal(statsq(w, 1).sign(), torch.where(w > 0, 1.0, -1.0))


def test_clipped_weights_get_their_gradient_too():
    w = torch.tensor([[0.1, -0.1, 100.0]], requires_grad=True)
    statsq(w, 2).sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))


def test_a_row_of_zeros_stays_finite_and_trains():
    w = torch.zeros(2, 5, requires_grad=True)
    for bits in (2, 8):
        out = statsq(w, bits)
        assert out.isfinite().all()
        assert out.abs().max() < 1e-20
    out.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_row_that_is_not_finite_spoils_itself_only(value):
    w = torch.randn(3, 5)
    w[1, 2] = value
    out = statsq(w, 2)
    assert not out[1].isfinite().all()
    assert out[[0, 2]].isfinite().all()


def test_memory_format_and_strides_do_not_change_the_numbers():
    w = torch.randn(6, 4, 3, 3)
    assert torch.equal(statsq(w.to(memory_format=torch.channels_last), 3), statsq(w, 3))
    flat = torch.randn(5, 8)
    assert torch.equal(statsq(flat.t().contiguous().t(), 3), statsq(flat, 3))


@pytest.mark.parametrize("bits", [0, 9, 2.5])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(UsageError, match="between 1 and 8"):
        statsq(torch.ones(2, 2), bits)


def test_an_axis_that_is_not_there_is_refused():
    with pytest.raises(UsageError, match="keep_axis"):
        statsq(torch.ones(2, 2), 2, keep_axis=2)


def test_it_compiles_into_one_graph():
    torch._dynamo.reset()
    w = torch.randn(4, 6, requires_grad=True)
    compiled = torch.compile(lambda w: statsq(w, 2), backend="aot_eager", fullgraph=True)
    out = compiled(w)
    out.sum().backward()
    assert torch.equal(out, statsq(w, 2))
    assert torch.equal(w.grad, torch.ones_like(w))


def layer(bits=2):
    torch.manual_seed(0)
    linear = nn.Linear(6, 4)
    parametrize.register_parametrization(linear, "weight", StatsQ(bits))
    return linear


@pytest.mark.parametrize("how", [{"foreach": False}, {"foreach": True}, {"fused": True}])
def test_the_weight_follows_every_kind_of_optimizer_step(how):
    linear = layer()
    optimizer = torch.optim.AdamW(linear.parameters(), lr=0.5, **how)
    for _ in range(3):
        with cached_weights(linear):
            linear(torch.randn(5, 6)).square().sum().backward()
        optimizer.step()
        assert torch.equal(linear.weight, statsq(linear.parametrizations.weight.original, 2))


def test_a_block_of_cached_weights_quantizes_once_and_ends():
    linear = layer()
    with cached_weights(linear):
        first, second = linear.weight, linear.weight
        assert first.data_ptr() == second.data_ptr()
        expected = first.detach().clone()
        with torch.no_grad():
            second.zero_()
        assert torch.equal(linear.weight, expected)
        with torch.no_grad():
            linear.parametrizations.weight.original.mul_(-3)
        assert torch.allclose(linear.weight, -3 * expected)
    with torch.no_grad():
        linear.parametrizations.weight.original.data.mul_(2)
    assert torch.allclose(linear.weight, -6 * expected)
    with torch.inference_mode(), cached_weights(linear):
        assert torch.allclose(linear.weight, -6 * expected)


def test_gradients_accumulate_through_cached_weights():
    linear = layer()
    x = torch.randn(5, 6)
    with cached_weights(linear):
        for _ in range(2):
            linear(x).sum().backward()
    assert torch.allclose(linear.parametrizations.weight.original.grad, 2 * x.sum(0).expand(4, 6))


def test_under_autocast_the_grid_is_computed_in_float32():
    linear = layer()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(linear.weight, statsq(linear.parametrizations.weight.original, 2))
        assert linear(torch.randn(2, 6)).dtype == torch.bfloat16


@BITS
def test_packed_rows_are_the_documented_bytes(bits):
    codes, packed = GOLDEN[f"pack/b{bits}/codes"], GOLDEN[f"pack/b{bits}/packed"]
    assert torch.equal(pack_rows(codes, bits), packed)
    assert torch.equal(unpack_rows(packed, bits, codes.shape[1]), codes)
    odd, scale = GOLDEN[f"pack/b{bits}/odd_int"], GOLDEN[f"pack/b{bits}/odd_scale"]
    assert torch.equal(2 * codes + 1, odd)
    assert close(statsq(GOLDEN[f"statsq/b{bits}_0/w"], bits), odd * scale)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 8), st.integers(1, 4), st.integers(1, 23), st.booleans(), st.integers(0, 2**31))
def test_packing_loses_nothing(bits, rows, columns, signed, seed):
    low = -(2 ** (bits - 1)) if signed else 0
    codes = torch.randint(low, low + 2**bits, (rows, columns), generator=torch.Generator().manual_seed(seed))
    packed = pack_rows(codes, bits, signed=signed)
    assert packed.shape == (rows, -(-columns * bits // 8))
    assert torch.equal(
        unpack_rows(packed, bits, columns, signed=signed), codes.to(torch.int8 if signed else torch.uint8)
    )


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(UsageError, match="between -2 and 1"):
        pack_rows(torch.tensor([[2]]), 2)
    with pytest.raises(UsageError, match="take 2 bytes"):
        unpack_rows(torch.zeros(1, 1, dtype=torch.uint8), 2, 5)


def test_no_warning_comes_from_ordinary_use():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        statsq(torch.randn(3, 3), 2)
