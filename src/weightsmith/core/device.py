"""Where work is done when nobody names a device."""

import torch


def default_device() -> str:
    """``"cuda"`` where there is such a GPU, else ``"cpu"``; MPS and others only where they are asked for."""
    return "cuda" if torch.cuda.is_available() else "cpu"
