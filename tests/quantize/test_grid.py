import copy
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.quantize import Grid, QuantizedWeight, quantized_weights
from weightsmith.quantize.after_training.rtn import RoundToNearest
from weightsmith.quantize.grid import write_quantized_


def weight(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


grids = st.builds(
    lambda bits, symmetric, granularity, search: Grid(
        bits, symmetric=symmetric, granularity=granularity, search=search
    ),
    st.integers(2, 8),
    st.booleans(),
    st.sampled_from(["channel", "tensor", 4]),
    st.sampled_from(["minmax", "shrink"]),
)


@given(
    grid=grids,
    seed=st.integers(0, 9),
    axis=st.sampled_from([0, 1]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16]),
)
@settings(max_examples=40, deadline=None)
def test_codes_are_in_range_and_dequantize_to_the_rounded_weight_bit_for_bit(grid, seed, axis, dtype):
    w = weight(8, 12, dtype=dtype, seed=seed)
    rounding = RoundToNearest(w, grid, axis=axis)
    found = rounding.quantized(w)
    low, high = grid.code_range
    assert found.codes.shape == w.shape
    assert found.codes.dtype == (torch.int8 if grid.symmetric else torch.uint8)
    assert low <= int(found.codes.min())
    assert int(found.codes.max()) <= high
    assert torch.equal(found.dequantize(dtype), rounding(w))
    assert found.matches(rounding(w))


def test_a_half_integer_grid_is_offset_by_half_a_step():
    codes = torch.tensor([[-2, -1, 0, 1]], dtype=torch.int8)
    half = QuantizedWeight(
        codes, torch.tensor([[0.5]]), torch.zeros(1, 1, dtype=torch.int8), 2, True, "channel", 0, 0.5
    )
    assert half.dequantize().tolist() == [[-0.75, -0.25, 0.25, 0.75]]
    assert half.matches(half.dequantize())


def test_size_counts_packed_codes_scales_and_zero_points():
    found = RoundToNearest(weight(8, 16), Grid(4, granularity=8)).quantized(weight(8, 16))
    assert found.group_size == 8
    assert found.nbytes == (8 * 16 + 8 * 2) * 4 // 8 + 2 * 8 * 2


def test_a_model_remembers_its_codes_through_copies_pickles_and_half_precision():
    layer = nn.Sequential(nn.Linear(12, 8))
    write_quantized_(layer[0], RoundToNearest(layer[0].weight, Grid(3)).quantized(layer[0].weight))
    codes = quantized_weights(layer)["0.weight"].codes
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), copy.deepcopy(layer).bfloat16()):
        assert torch.equal(quantized_weights(other)["0.weight"].codes, codes)
    assert list(layer.state_dict()) == ["0.weight", "0.bias"]


def test_a_weight_changed_since_is_named():
    layer = nn.Linear(12, 8)
    write_quantized_(layer, RoundToNearest(layer.weight, Grid(3)).quantized(layer.weight))
    layer.weight.data[2, 3] += 1
    with pytest.raises(UsageError, match="weight has been changed"):
        quantized_weights(layer)


@pytest.mark.parametrize("bits", [1, 9, 4.0, True])
def test_bits_out_of_range_are_refused(bits):
    with pytest.raises(UsageError, match="bits must be between 2 and 8"):
        Grid(bits)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"granularity": "row"}, "granularity 'row' is not known"),
        ({"granularity": 0}, "positive integer, got 0"),
        ({"search": "best"}, "search 'best' is not known"),
        ({"narrow": True}, "symmetric"),
    ],
)
def test_other_arguments_out_of_range_are_refused(options, message):
    with pytest.raises(UsageError, match=message):
        Grid(**options)


def test_a_group_size_must_divide_the_inputs_of_a_matrix():
    with pytest.raises(UsageError, match="granularity=5 does not divide the 12 inputs"):
        RoundToNearest(weight(8, 12), Grid(granularity=5))
    with pytest.raises(UsageError, match="groups the inputs of a matrix"):
        RoundToNearest(weight(8, 12, 3, 3), Grid(granularity=4))


def test_a_search_is_the_default_below_eight_bits_only():
    assert [Grid(bits).search for bits in (2, 7, 8)] == ["search", "search", "minmax"]
