"""The bit stream itself is tested with the goldens of StatsQ; here, what packing it costs."""

import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weightsmith.core.rounding import integer_range
from weightsmith.quantize.formats.pack import pack_rows, unpack_rows


class Peak(TorchDispatchMode):
    """The most bytes that tensors made inside have held at once."""

    def __init__(self):
        super().__init__()
        self.held, self.most, self.known = 0, 0, {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        inputs = {arg.untyped_storage().data_ptr() for arg in args if isinstance(arg, torch.Tensor)}
        if isinstance(result, torch.Tensor) and result.untyped_storage().data_ptr() not in inputs:
            size = result.untyped_storage().nbytes()
            self.held += size
            self.most = max(self.most, self.held)
            weakref.finalize(result, self.release, size)
        return result

    def release(self, size):
        self.held -= size


@pytest.mark.parametrize("bits", range(1, 9))
@pytest.mark.parametrize("signed", [True, False])
def test_packing_needs_at_most_twice_the_memory_of_the_codes(bits, signed):
    low, high = integer_range(bits, signed=signed)
    codes = torch.randint(low, high + 1, (64, 1030), dtype=torch.int8 if signed else torch.uint8)
    before = codes.clone()
    with Peak() as packing:
        packed = pack_rows(codes, bits, signed=signed)
    with Peak() as unpacking:
        again = unpack_rows(packed, bits, 1030, signed=signed)
    assert torch.equal(codes, before)
    assert torch.equal(again, codes)
    assert packed.nbytes <= packing.most <= 2 * codes.nbytes
    assert codes.nbytes <= unpacking.most <= 2 * codes.nbytes


def test_codes_are_not_written_to_even_where_they_are_bytes_already():
    codes = torch.zeros(1, 1, dtype=torch.uint8).expand(4, 8)
    assert pack_rows(codes, 4, signed=False).tolist() == [[0] * 4] * 4
    assert pack_rows(torch.zeros(3, 0, dtype=torch.int8), 3).shape == (3, 0)
