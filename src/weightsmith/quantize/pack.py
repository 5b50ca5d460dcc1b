"""Rows of small integers as bytes: real 2-, 3- and 4-bit files.

Every row is a little-endian bit stream: code ``j`` takes bits ``j * bits`` to ``(j + 1) * bits - 1``, and bit ``i`` of
the stream is bit ``i mod 8`` of byte ``i // 8``. Signed codes are stored with ``2^(bits-1)`` added; rows are padded
with zeros.
"""

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError
from weightsmith.core.rounding import integer_range
from weightsmith.quantize.weight_quantizer import check_bits


def pack_rows(codes: Tensor, bits: int, *, signed: bool = True) -> Tensor:
    """Pack integer codes, row by row.

    Args:
        codes: ``(rows, ...)``, integers; the axes after the first are read as one.
        bits: Word length, 1 to 8.
        signed: Whether codes are in ``[-2^(bits-1), 2^(bits-1) - 1]``, else in ``[0, 2^bits - 1]``.

    Returns:
        ``(rows, ceil(columns * bits / 8))``, uint8.

    Raises:
        UsageError: ``bits`` or a code is out of range.
    """
    check_bits(bits)
    low, high = integer_range(bits, signed=signed)
    words = codes.reshape(len(codes), -1).to(torch.int16)
    if words.numel() and not (low <= int(words.min()) and int(words.max()) <= high):
        raise UsageError(f"codes must be between {low} and {high}, got {int(words.min())} to {int(words.max())}")
    stream = ((words - low)[:, :, None] >> torch.arange(bits, device=codes.device)) & 1
    stream = torch.nn.functional.pad(stream.flatten(1), (0, -words.shape[1] * bits % 8))
    return (stream.unflatten(1, (-1, 8)) << torch.arange(8, device=codes.device)).sum(2).to(torch.uint8)


def unpack_rows(packed: Tensor, bits: int, columns: int, *, signed: bool = True) -> Tensor:
    """Undo `pack_rows`.

    Args:
        packed: ``(rows, bytes)``, uint8.
        bits: Word length, 1 to 8.
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
    stream = (packed.to(torch.int16)[:, :, None] >> torch.arange(8, device=packed.device)) & 1
    words = stream.flatten(1)[:, : columns * bits].unflatten(1, (columns, bits))
    codes = (words << torch.arange(bits, device=packed.device)).sum(2) + integer_range(bits, signed=signed)[0]
    return codes.to(torch.int8 if signed else torch.uint8)
