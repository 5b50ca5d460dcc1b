"""Full float32 while bounds are computed: TF32, bfloat16 products and autocast round more than a proof can bear."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: str) -> Iterator[None]:
    """Leave autocast, and whatever lets float32 products be rounded further; afterwards everything is as before.

    Args:
        device: Type of the device that bounds are computed on.
    """
    switches, exact = _switches()
    before = [(owner, name, getattr(owner, name)) for owner, name in switches]
    lowered = [(owner, name, value) for owner, name, value in before if value not in (exact, "none")]
    try:
        for owner, name, _ in lowered:
            setattr(owner, name, exact)
        if torch.is_autocast_enabled(device):
            with torch.autocast(device, enabled=False):
                yield
        else:
            yield
    finally:
        for owner, name, value in lowered:
            setattr(owner, name, value)


def _switches() -> tuple[list[tuple[Any, str]], Any]:
    """Where torch keeps the precision of products and convolutions, and the value that is exact."""
    backends: Any = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):
        places = (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)
        return [(place, "fp32_precision") for place in places], "ieee"
    return [(backends.cuda.matmul, "allow_tf32"), (backends.cudnn, "allow_tf32")], False  # before torch 2.9
