"""Full float32 while bounds are computed: TF32, bfloat16 products and autocast round more than a proof can bear."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch


@contextmanager
def full_precision(device: str) -> Iterator[None]:
    """Leave autocast, and whatever lets float32 products be rounded further; afterwards everything is as before.

    Args:
        device: Type of the device that bounds are computed on.
    """
    with ExitStack() as stack:
        for owner, name, value, exact in _switches(device):
            if value not in (exact, "none"):
                _set(owner, name, exact)
                stack.callback(_set, owner, name, value)
        if torch.is_autocast_enabled(device):
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


def _switches(device: str) -> list[tuple[Any, str, Any, Any]]:
    """Where torch keeps the precision of products and convolutions: owner, name, present value, exact value.

    Torch 2.9 has a second way to say it, and raises where the older one is read after the newer one was used.
    """
    backends: Any = torch.backends
    found: list[tuple[Any, str, Any, Any]] = []
    try:
        found.append((torch, "float32_matmul_precision", torch.get_float32_matmul_precision(), "highest"))
    except RuntimeError:
        found += _newer(backends.cuda.matmul, backends.mkldnn.matmul)
    if device == "cuda":
        try:
            found.append((backends.cudnn, "allow_tf32", backends.cudnn.allow_tf32, False))
        except RuntimeError:
            found += _newer(backends.cudnn.conv, backends.cudnn.rnn)
    convolutions = getattr(backends.mkldnn, "conv", None)
    return found + (_newer(convolutions) if hasattr(convolutions, "fp32_precision") else [])


def _newer(*places: Any) -> list[tuple[Any, str, Any, Any]]:
    return [(place, "fp32_precision", place.fp32_precision, "ieee") for place in places]


def _set(owner: Any, name: str, value: Any) -> None:
    if owner is torch:
        torch.set_float32_matmul_precision(value)
    else:
        setattr(owner, name, value)
