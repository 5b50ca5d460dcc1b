"""Masks as bits: eight positions a byte, in row-major order, the first one in the lowest bit."""

import math

import numpy as np
import torch
from torch import Tensor

from weightsmith.core.errors import UsageError


def pack_bits(mask: Tensor) -> Tensor:
    """Pack a boolean tensor of any shape into uint8, ``(ceil(numel / 8),)``."""
    return torch.from_numpy(np.packbits(mask.detach().cpu().bool().reshape(-1).numpy(), bitorder="little"))


def unpack_bits(packed: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Unpack into a boolean tensor.

    Raises:
        UsageError: The number of bytes does not fit the shape, or bits beyond its end are set.
    """
    count = math.prod(shape)  # of Python's integers: a damaged shape must not overflow into a small one
    if packed.dtype != torch.uint8 or packed.dim() != 1 or len(packed) != -(-count // 8):
        raise UsageError(
            f"a mask of shape {shape} takes {-(-count // 8)} bytes, got {packed.dtype} {tuple(packed.shape)}"
        )
    bits = np.unpackbits(packed.cpu().numpy(), bitorder="little")
    if bits[count:].any():
        raise UsageError(f"a mask of shape {shape} has bits set beyond its end: the file is damaged")
    return torch.from_numpy(bits[:count].astype(bool)).reshape(shape)
