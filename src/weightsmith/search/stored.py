"""Files that a search leaves for its own resumption: read whole and undamaged, or refused in one line."""

import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from weightsmith.core.errors import UsageError, reason


@contextmanager
def reading(file: Path, what: str) -> Iterator[dict[str, Any]]:
    """Yield the content; whatever goes wrong within the block means that the file is damaged or foreign.

    Raises:
        UsageError: It is.
    """
    try:
        if (entry := zipfile.ZipFile(file).testzip()) is not None:  # torch does not compare checksums
            raise ValueError(f"{entry} is damaged")
        held = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(held, dict):
            raise TypeError(f"it holds a {type(held).__name__}")
        yield held
    except UsageError:
        raise
    except Exception as error:  # damaged pickles, and states that do not fit, fail in any way
        raise UsageError(f"{file} cannot be read as {what}: {reason(error)}; name another folder") from error
