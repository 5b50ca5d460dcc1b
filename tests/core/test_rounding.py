import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from weightsmith.core.rounding import integer_range, round_ste

floats = st.floats(-(2.0**100), 2.0**100, width=32, allow_subnormal=False)


@given(st.lists(floats, min_size=1, max_size=20))
def test_rounding_is_exact_and_its_gradient_that_of_the_identity(values):
    x = torch.tensor(values, requires_grad=True)
    y = round_ste(x)
    assert torch.equal(y, x.round())
    y.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))


def test_straight_through_rounding_compiles_to_the_same():
    x = torch.randn(64)
    assert torch.equal(torch.compile(round_ste, backend="eager")(x), round_ste(x))


@pytest.mark.parametrize(
    ("bits", "signed", "expected"), [(4, True, (-8, 7)), (4, False, (0, 15)), (1, True, (-1, 0)), (8, False, (0, 255))]
)
def test_integer_range(bits, signed, expected):
    assert integer_range(bits, signed=signed) == expected


@pytest.mark.parametrize("bits", [0, 17, -1])
def test_a_word_length_out_of_range_is_refused(bits):
    with pytest.raises(ValueError, match=f"bits must be between 1 and 16, got {bits}"):
        integer_range(bits, signed=True)
