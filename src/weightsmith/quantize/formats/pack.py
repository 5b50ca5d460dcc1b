"""Rows of small integers as bytes: real 2-, 3- and 4-bit files.

Every row is a little-endian bit stream: code ``j`` takes bits ``j * bits`` to ``(j + 1) * bits - 1``, and bit ``i`` of
the stream is bit ``i mod 8`` of byte ``i // 8``. Signed codes are stored with ``2^(bits-1)`` added; rows are padded
with zeros.
"""

from collections.abc import Iterator
from math import gcd

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError
from weightsmith.core.rounding import integer_range
from weightsmith.quantize.grid import check_bits


def pack_rows(codes: Tensor, bits: int, *, signed: bool = True) -> Tensor:
    """Pack integer codes, row by row.

    Args:
        codes: ``(rows, ...)``, integers; the axes after the first are read as one.
        bits: Bit width, 1 to 8.
        signed: Whether codes are in ``[-2^(bits-1), 2^(bits-1) - 1]``, else in ``[0, 2^bits - 1]``.

    Returns:
        ``(rows, ceil(columns * bits / 8))``, uint8.

    Raises:
        UsageError: ``bits`` or a code is out of range.
    """
    check_bits(bits)
    low, high = integer_range(bits, signed=signed)
    words = codes.reshape(len(codes), -1)
    if words.numel() and not (low <= int(words.min()) and int(words.max()) <= high):
        raise UsageError(f"codes must be between {low} and {high}, got {int(words.min())} to {int(words.max())}")
    columns = words.shape[1]
    packed = torch.zeros(len(words), (columns * bits + 7) // 8, dtype=torch.uint8, device=codes.device)
    codes_each, bytes_each = _period(bits)
    for code, byte, shift in _places(bits):
        part = words[:, code::codes_each].to(torch.uint8, copy=True)
        part -= low  # a byte wraps around, as it should
        packed[:, byte::bytes_each][:, : part.shape[1]] |= _shift_(part, shift)
    return packed


def unpack_rows(packed: Tensor, bits: int, columns: int, *, signed: bool = True) -> Tensor:
    """Undo `pack_rows`.

    Args:
        packed: ``(rows, bytes)``, uint8.
        bits: Bit width, 1 to 8.
        columns: Codes per row.
        signed: As they were packed.

    Returns:
        ``(rows, columns)``; int8 when signed, else uint8.

    Raises:
        UsageError: ``bits`` is out of range, or a row does not have the bytes that ``columns`` codes need.
    """
    check_bits(bits)
    needed = (columns * bits + 7) // 8
    if packed.shape[1] != needed:
        raise UsageError(f"{columns} codes of {bits} bits take {needed} bytes per row, got {packed.shape[1]}")
    words = torch.zeros(len(packed), columns, dtype=torch.uint8, device=packed.device)
    codes_each, bytes_each = _period(bits)
    for code, byte, shift in _places(bits):
        part = words[:, code::codes_each]
        held = _shift_(packed[:, byte::bytes_each][:, : part.shape[1]].clone(), -shift)
        held &= (1 << bits) - 1
        part |= held
    if not signed:
        return words
    words -= 1 << (bits - 1)
    return words.view(torch.int8)


def _period(bits: int) -> tuple[int, int]:
    """After how many codes, which are how many bytes, the next code begins with a byte."""
    codes = 8 // gcd(8, bits)
    return codes, codes * bits // 8


def _places(bits: int) -> Iterator[tuple[int, int, int]]:
    """Which bytes of a period hold which of its codes, and how far left the code is shifted in the byte."""
    for code in range(_period(bits)[0]):
        first, last = code * bits // 8, ((code + 1) * bits - 1) // 8
        for byte in range(first, last + 1):
            yield code, byte, code * bits - 8 * byte


def _shift_(part: Tensor, left: int) -> Tensor:
    return part.bitwise_left_shift_(left) if left >= 0 else part.bitwise_right_shift_(-left)
