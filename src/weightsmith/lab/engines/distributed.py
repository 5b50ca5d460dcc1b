"""Several processes that do every job together, started by ``torchrun`` or ``accelerate launch``."""

import os


def is_distributed() -> bool:
    """Whether this process is one of several that were started together."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def is_leader() -> bool:
    """Whether this process writes and prints."""
    return int(os.environ.get("RANK", "0")) == 0
