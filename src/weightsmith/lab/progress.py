"""A training run in flight: how far it is, saved now and then, so that a kill costs seconds."""

import io
import logging
import random
import time
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from weightsmith.core.errors import UsageError
from weightsmith.core.files import file_atomically
from weightsmith.lab.identity import differing

_log = logging.getLogger(__name__)
_SHARE = 20  # a checkpoint is written at most every twenty times what writing the last one took


def seed_everything(seed: int) -> None:
    """Seed the global generators of Python, NumPy and torch on every device.

    Args:
        seed: At least 0.
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


@contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Seed the global generators on the CPU within the block; afterwards they are as before."""
    kept = random.getstate(), np.random.get_state(), torch.get_rng_state()
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed % 2**63)
    try:
        yield
    finally:
        random.setstate(kept[0])
        np.random.set_state(kept[1])
        torch.set_rng_state(kept[2])


class Progress:
    """What changes while a model trains, and its file.

    Args:
        folder: Holds ``fit.pt``; ``None``: nothing is saved.
        asked: The settings of the run, compared when it resumes.
        parts: What has a state beside the generators; ``None`` values are left out.
        seconds: Least time between two checkpoints.
        writes: Whether this process writes.

    Attributes:
        step: Steps taken.
        rows: What was recorded.
        diverged: The loss was not finite.

    Raises:
        UsageError: The folder holds the checkpoint of another run, or the state of a hook cannot be read back.
    """

    def __init__(
        self, folder: Path | None, asked: Mapping[str, Any], parts: Mapping[str, Any], *, seconds: float, writes: bool
    ) -> None:
        self._file = None if folder is None else folder / "fit.pt"
        self._asked, self._parts = dict(asked), {name: part for name, part in parts.items() if part is not None}
        self._seconds, self._writes = seconds, writes
        self._last, self._took = time.monotonic(), 0.0
        self.step, self.diverged = 0, False
        self.rows: list[dict[str, float]] = []
        self._loss_sum, self._since = 0.0, 0
        if self._file is None:
            return
        for name, part in self._parts.items():
            if name.startswith("hook"):
                _check_readable(name, part.state_dict())
        if self._file.is_file():
            self._resume(self._file)

    def count(self, loss: float) -> None:
        """One more step, and its loss."""
        self.step += 1
        self._loss_sum += loss
        self._since += 1

    def mean_loss(self) -> float:
        """Mean loss since this was last asked."""
        mean = self._loss_sum / self._since
        self._loss_sum, self._since = 0.0, 0
        return mean

    def save_if_due(self) -> None:
        """Save when it is time to."""
        if self._file is not None and time.monotonic() - self._last >= max(self._seconds, _SHARE * self._took):
            self.save()

    def save(self) -> None:
        """Write the checkpoint; it appears whole."""
        if self._file is None or not self._writes:
            return
        start = time.monotonic()
        names = ("step", "diverged", "rows", "_loss_sum", "_since")
        own = {name: getattr(self, name) for name in names}
        states = {name: part.state_dict() for name, part in self._parts.items()}
        with file_atomically(self._file) as fresh:
            torch.save({"asked": self._asked, "own": own, "states": states, "random": _generators()}, fresh)
        self._last = time.monotonic()
        self._took = self._last - start

    def _resume(self, file: Path) -> None:
        try:
            if (entry := zipfile.ZipFile(file).testzip()) is not None:  # torch does not compare checksums
                raise ValueError(f"{entry} is damaged")
            saved = torch.load(file, map_location="cpu", weights_only=True)
            asked, own, states = dict(saved["asked"]), dict(saved["own"]), dict(saved["states"])
        except Exception as error:  # cut off or foreign: what it held is trained again
            _log.warning("%s cannot be read (%s): training starts over", file, type(error).__name__)
            if self._writes:
                file.unlink(missing_ok=True)
            return
        if asked != self._asked:
            raise UsageError(
                f"folder {file.parent} holds another training run, with another "
                f"{', '.join(differing(asked, self._asked))}: give each call of fit a folder of its own, or remove it"
            )
        for name, value in own.items():
            setattr(self, name, value)
        for name, part in self._parts.items():
            part.load_state_dict(states[name])
        _restore(saved["random"])


def _check_readable(name: str, state: Any) -> None:
    buffer = io.BytesIO()
    try:
        torch.save(state, buffer)
        buffer.seek(0)
        torch.load(buffer, weights_only=True)
    except Exception as error:
        raise UsageError(
            f"the state of {name} must be tensors, numbers, strings, lists and dicts, so that it can be read back "
            f"({str(error).strip().splitlines()[0]})"
        ) from error


def _generators() -> dict[str, Any]:
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    version, words, after = random.getstate()
    return {
        "python": [version, list(words), after],
        "numpy": [kind, torch.from_numpy(np.asarray(keys).astype(np.int64)), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def _restore(states: Mapping[str, Any]) -> None:
    version, words, after = states["python"]
    random.setstate((version, tuple(words), after))
    kind, keys, position, has_gauss, gauss = states["numpy"]
    np.random.set_state((kind, keys.numpy().astype(np.uint32), position, has_gauss, gauss))
    torch.set_rng_state(states["torch"])
    if torch.cuda.is_available() and states["cuda"]:
        torch.cuda.set_rng_state_all(states["cuda"])
