"""The checkpoints that a Hugging Face ``Trainer`` leaves behind, and the losses that it has logged.

A run folder holds ``checkpoint-<step>/`` folders; the newest one's ``trainer_state.json`` holds the run's whole log.
"""

import json
import re
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from weightsmith.core.errors import UsageError, WeightsmithWarning, near, unknown

Kind = Literal["adapter", "model"]
_FOLDER = re.compile(r"^checkpoint-(\d+)$")
_STATE = "trainer_state.json"


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One saved state of a model.

    Attributes:
        path: Its folder.
        step: Optimiser steps taken, or its position when the folder's name does not tell.
        kind: ``"adapter"`` (a PEFT folder) or ``"model"`` (all weights).
    """

    path: Path
    step: int
    kind: Kind


def find_checkpoints(
    run_dir: Path | str, last: int | None = 4, every: int = 1, steps: Sequence[int] | None = None
) -> list[Checkpoint]:
    """Find the checkpoints of one training run, oldest first.

    Args:
        run_dir: The run's output folder.
        last: How many of the newest; ``None``: all.
        every: Take each ``every``-th, counted back from the newest.
        steps: Take exactly these instead.

    Raises:
        UsageError: There are none, or not the ``steps`` asked for.

    Warns:
        WeightsmithWarning: There are fewer than ``last``.
    """
    run = Path(run_dir)
    if last is not None and last < 1:
        raise UsageError(f"last must be at least 1, got {last}")
    if every < 1:
        raise UsageError(f"every must be at least 1, got {every}")
    if not run.is_dir():
        raise UsageError(f"run folder {run} does not exist")
    found = _steps(run)
    if not found:
        raise UsageError(f"{run} holds no checkpoint-<step> folder; give the Trainer's output_dir")
    if steps is not None:
        missing = sorted(set(steps) - found.keys())
        if missing:
            raise UsageError(f"{run} has no checkpoint of step {missing[0]}; there are {', '.join(map(str, found))}")
        chosen = sorted(set(steps))
    else:
        strided = list(found)[::-1][::every]
        if last is not None and len(strided) < last:
            warnings.warn(
                f"{run} has {len(strided)} such checkpoints, fewer than the last {last}; all of them are taken",
                WeightsmithWarning,
                stacklevel=2,
            )
        chosen = strided[:last][::-1]
    return [Checkpoint(found[step], step, _kind(found[step])) for step in chosen]


def as_checkpoints(paths: Sequence[Path | str | Checkpoint]) -> list[Checkpoint]:
    """Describe checkpoint folders that are given one by one, oldest first where their names tell steps."""
    checkpoints = []
    for position, item in enumerate(paths):
        if isinstance(item, Checkpoint):
            checkpoints.append(item)
            continue
        path = Path(item)
        if not path.is_dir():
            raise UsageError(f"checkpoint {path} is not a folder")
        match = _FOLDER.match(path.resolve().name)
        checkpoints.append(Checkpoint(path, int(match[1]) if match else position, _kind(path)))
    if not checkpoints:
        raise UsageError("checkpoints must not be empty")
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)


def checkpoint_losses(checkpoints: Sequence[Checkpoint], source: str = "since_previous") -> list[float]:
    """Read from the run's log how good each checkpoint is.

    Args:
        checkpoints: Of one run, oldest first.
        source: ``"since_previous"``: mean training loss of the steps since the checkpoint folder before it, each log
            entry weighted by the steps that it covers; entries that began earlier count whole. Where there is none, as
            ``"last"``. ``"last"``: the last training loss logged up to its step. ``"eval"``: the evaluation loss at its
            step; ``"eval:<key>"``: another evaluation metric, for example ``"eval:accuracy"``.

    Returns:
        One number per checkpoint; it may be ``nan`` where the log says so.

    Raises:
        UsageError: The log is missing or damaged, or has no such entry for a checkpoint.
    """
    if source not in ("since_previous", "last", "eval") and not source.startswith("eval:"):
        raise unknown("source", source, ["since_previous", "last", "eval", "eval:<key>"])
    log = _history(checkpoints[-1])
    if source.startswith("eval"):
        key = "eval_" + (source.partition(":")[2] or "loss").removeprefix("eval_")
        return [_evaluation(log, checkpoint, key) for checkpoint in checkpoints]
    entries = [(int(entry["step"]), float(entry["loss"])) for entry in log if "loss" in entry]
    if source == "last":
        return [_last(entries, checkpoint) for checkpoint in checkpoints]
    return [_since_previous(entries, checkpoint) for checkpoint in checkpoints]


def _steps(run: Path) -> dict[int, Path]:
    matches = ((_FOLDER.match(path.name), path) for path in run.iterdir() if path.is_dir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def _kind(path: Path) -> Kind:
    return "adapter" if (path / "adapter_config.json").is_file() else "model"


def _history(newest: Checkpoint) -> list[dict[str, Any]]:
    candidates = [newest.path / _STATE, newest.path.parent / _STATE]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise UsageError(f"{newest.path} has no {_STATE}: give the values by hand, or weigh by steps")
    try:
        log = json.loads(path.read_text())["log_history"]
        if not all(isinstance(entry["step"], int) for entry in log):
            raise TypeError("an entry has no step")
    except (ValueError, KeyError, TypeError) as error:
        raise UsageError(f"{path} is damaged: {type(error).__name__}: {error}") from error
    return log


def _evaluation(log: list[dict[str, Any]], checkpoint: Checkpoint, key: str) -> float:
    for entry in reversed(log):
        if key in entry and entry["step"] == checkpoint.step:
            return float(entry[key])
    known = {name for entry in log for name in entry if name.startswith("eval_")}
    hint = near(key, sorted(known)) if key not in known else "evaluate as often as you save, or weigh by training loss"
    raise UsageError(f"the log has no {key} at step {checkpoint.step} ({checkpoint.path.name}); {hint}")


def _last(entries: list[tuple[int, float]], checkpoint: Checkpoint) -> float:
    losses = [loss for step, loss in entries if step <= checkpoint.step]
    if not losses:
        raise UsageError(f"the log has no training loss up to step {checkpoint.step} ({checkpoint.path.name})")
    return losses[-1]


def _since_previous(entries: list[tuple[int, float]], checkpoint: Checkpoint) -> float:
    previous = max((step for step in _steps(checkpoint.path.parent) if step < checkpoint.step), default=0)
    total = covered = 0.0
    logged = 0
    for step, loss in entries:
        if previous < step <= checkpoint.step:
            total, covered = total + loss * (step - logged), covered + (step - logged)
        logged = step
    return total / covered if covered else _last(entries, checkpoint)
