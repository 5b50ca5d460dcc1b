"""The checkpoints that a Hugging Face ``Trainer`` leaves behind, and the losses that it has logged.

A run folder holds ``checkpoint-<step>/`` folders; the newest one's ``trainer_state.json`` holds the run's whole log.
"""

import re
import warnings
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from weightsmith.core.adapters import BONE_CONFIG
from weightsmith.core.errors import UsageError, WeightsmithWarning, near, unknown
from weightsmith.core.json_stream import stream_json

Kind = Literal["adapter", "bone", "model"]
_FOLDER = re.compile(r"^checkpoint-(\d+)$")
_STATE = "trainer_state.json"
_NO_WEIGHTS = ("optimizer", "scheduler", "scaler", "rng_state")
_HISTORY = "log_history"


@dataclass(frozen=True, slots=True)
class RunCheckpoint:
    """One saved state of a model.

    Attributes:
        path: Its folder.
        step: Optimizer steps taken, or its position when the folder's name does not tell.
        kind: ``"adapter"`` (a PEFT folder), ``"bone"`` (a folder of ``save_bone``) or ``"model"`` (all weights).
    """

    path: Path
    step: int
    kind: Kind


def find_checkpoints(
    run_dir: Path | str, last: int | None = 4, every: int = 1, steps: Sequence[int] | None = None
) -> list[RunCheckpoint]:
    """Find the checkpoints of one training run, oldest first.

    Args:
        run_dir: The run's output folder.
        last: How many of the newest; ``None``: all.
        every: Take every n-th, counted back from the newest.
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
    return [RunCheckpoint(found[step], step, _kind(found[step])) for step in chosen]


def as_checkpoints(paths: Sequence[Path | str | RunCheckpoint]) -> list[RunCheckpoint]:
    """Describe checkpoint folders that are given one by one, oldest first where their names tell steps."""
    checkpoints: list[RunCheckpoint] = []
    named: list[Path] = []
    unnamed: list[Path] = []
    for position, item in enumerate(paths):
        if isinstance(item, RunCheckpoint):
            checkpoints.append(item)
            continue
        path = Path(item)
        if not path.is_dir():
            raise UsageError(f"checkpoint {path} is not a folder")
        match = _FOLDER.match(path.resolve().name)
        (named if match else unnamed).append(path)
        checkpoints.append(RunCheckpoint(path, int(match[1]) if match else position, _kind(path)))
    if not checkpoints:
        raise UsageError("checkpoints must not be empty")
    if named and unnamed:  # positions and steps do not compare
        raise UsageError(
            f"checkpoints must all be named checkpoint-<step>, or none of them: {unnamed[0]} is not, {named[0]} is"
        )
    return sorted(checkpoints, key=lambda checkpoint: checkpoint.step)


def refuse_incomplete(checkpoints: Sequence[RunCheckpoint], *, weights: bool = False) -> None:
    """Refuse checkpoints that a run has not finished saving.

    Args:
        checkpoints: Of one run, oldest first.
        weights: Look for weight files too.

    Raises:
        UsageError: One lacks what an older one has: the Trainer's state, which is written last, or the Bone adapter;
            or it has no weights.
    """
    for index, checkpoint in enumerate(checkpoints):
        path, older = checkpoint.path, checkpoints[:index]
        missing = None
        if (
            weights
            and not any(any(path.glob(pattern)) for pattern in ("*.safetensors", "*.bin"))
            and not (checkpoint.kind == "model" and torch_files(path))
        ):
            missing = "no weights"
        elif checkpoint.kind == "model" and older and all(other.kind == "bone" for other in older):
            missing = f"no {BONE_CONFIG}, which the older ones have"
        elif not (path / _STATE).is_file() and any((other.path / _STATE).is_file() for other in older):
            missing = f"no {_STATE}, which the Trainer writes last"
        if missing:
            steps = [other.step for other in checkpoints if other is not checkpoint]
            without = f", or leave it out: steps={steps} (--steps {' '.join(map(str, steps))})" if steps else ""
            raise UsageError(
                f"{path} is incomplete: it has {missing}. The run was probably stopped while it saved this checkpoint: "
                f"remove the folder{without}"
            )


def checkpoint_losses(checkpoints: Sequence[RunCheckpoint], source: str = "since_previous") -> list[float]:
    """Read from the run's log how good each checkpoint is.

    Args:
        checkpoints: Of one run, oldest first.
        source: ``"since_previous"``: mean training loss of the steps since the checkpoint folder before it, each log
            entry weighted by the steps that it covers; entries that began earlier count whole. Where there is none, as
            ``"last"``. ``"last"``: the last training loss logged up to its step. ``"eval"``: the evaluation loss at its
            step; ``"eval:<key>"``: another evaluation metric, for example ``"eval:accuracy"``. A resumed run logs
            steps again: the last entry of each step counts.

    Returns:
        One number per checkpoint; it may be ``nan`` where the log says so.

    Raises:
        UsageError: The log is missing or damaged, or has no such entry for a checkpoint.
    """
    if source not in ("since_previous", "last", "eval") and not source.startswith("eval:"):
        raise unknown("source", source, ["since_previous", "last", "eval", "eval:<key>"])
    runs = {checkpoint.path.parent: checkpoint for checkpoint in checkpoints}  # the newest of each
    if len(runs) > 1 and all(_has_log(newest) for newest in runs.values()):
        # checkpoints of several runs, whose losses are in logs of their own
        found: dict[Path, float] = {}
        for run in runs:
            own = [checkpoint for checkpoint in checkpoints if checkpoint.path.parent == run]
            found |= dict(zip((c.path for c in own), checkpoint_losses(own, source), strict=True))
        return [found[checkpoint.path] for checkpoint in checkpoints]
    path = _log(checkpoints[-1])
    if source.startswith("eval"):
        key = "eval_" + (source.partition(":")[2] or "loss").removeprefix("eval_")
        return _evaluations(path, checkpoints, key)
    entries = _Losses(path)
    if source == "last":
        return [_last(entries, checkpoint) for checkpoint in checkpoints]
    return [_since_previous(entries, checkpoint) for checkpoint in checkpoints]


def learning_rates(checkpoints: Sequence[RunCheckpoint]) -> tuple[float, float] | None:
    """Read the smallest and the largest learning rate that was logged between the first checkpoint and the last.

    Args:
        checkpoints: Of one run, oldest first.

    Returns:
        ``None`` where nothing is logged.
    """
    first, last = checkpoints[0].step, checkpoints[-1].step
    if not _has_log(checkpoints[-1]):
        return None
    entries = stream_json(_log(checkpoints[-1]), _HISTORY, {"step": int, "learning_rate?": float})
    rates = [e["learning_rate"] for e in entries if "learning_rate" in e and first < e["step"] <= last]
    return (min(rates), max(rates)) if rates else None


def torch_files(path: Path) -> list[Path]:
    """What ``torch.save`` may have written a model to, beside the files of a ``Trainer`` that hold none."""
    found = [file for suffix in ("*.pt", "*.pth") for file in sorted(path.glob(suffix))]
    return [file for file in found if not file.name.startswith(_NO_WEIGHTS)]


def _steps(run: Path) -> dict[int, Path]:
    matches = ((_FOLDER.match(path.name), path) for path in run.iterdir() if path.is_dir())
    return dict(sorted((int(match[1]), path) for match, path in matches if match))


def _kind(path: Path) -> Kind:
    if (path / "adapter_config.json").is_file():
        return "adapter"
    return "bone" if (path / BONE_CONFIG).is_file() else "model"


def _has_log(newest: RunCheckpoint) -> bool:
    return any((place / _STATE).is_file() for place in (newest.path, newest.path.parent))


def _log(newest: RunCheckpoint) -> Path:
    candidates = [newest.path / _STATE, newest.path.parent / _STATE]
    path = next((candidate for candidate in candidates if candidate.is_file()), None)
    if path is None:
        raise UsageError(f"{newest.path} has no {_STATE}: give the values by hand, or weigh by steps")
    return path


class _Losses:
    """The training losses of a log, which may be larger than memory: 16 bytes per entry.

    A run that was resumed from an older checkpoint logs steps again: the last entry of each step counts.
    """

    def __init__(self, path: Path) -> None:
        steps, losses = array("q"), array("d")
        for entry in stream_json(path, _HISTORY, {"step": int, "loss?": float}):
            if "loss" in entry:
                steps.append(entry["step"])
                losses.append(entry["loss"])
        self._steps, last = np.unique(np.array(steps, dtype=np.int64)[::-1], return_index=True)
        self._losses = np.array(losses)[::-1][last]

    def __iter__(self) -> Iterator[tuple[int, float]]:
        return zip(map(int, self._steps), map(float, self._losses), strict=True)


def _evaluations(path: Path, checkpoints: Sequence[RunCheckpoint], key: str) -> list[float]:
    steps = {checkpoint.step for checkpoint in checkpoints}
    values: dict[int, float] = {}
    known: set[str] = set()
    for entry in stream_json(path, _HISTORY, {"step": int, f"{key}?": float}):
        known.update(name for name in entry if name.startswith("eval_"))
        if key in entry and entry["step"] in steps:
            values[entry["step"]] = float(entry[key])
    for checkpoint in checkpoints:
        if checkpoint.step not in values:
            often = "evaluate as often as you save, or weigh by training loss"
            hint = often if key in known else near(key, sorted(known))
            raise UsageError(f"the log has no {key} at step {checkpoint.step} ({checkpoint.path.name}); {hint}")
    return [values[checkpoint.step] for checkpoint in checkpoints]


def _last(entries: _Losses, checkpoint: RunCheckpoint) -> float:
    last = None
    for step, loss in entries:
        last = loss if step <= checkpoint.step else last
    if last is None:
        raise UsageError(f"the log has no training loss up to step {checkpoint.step} ({checkpoint.path.name})")
    return last


def _since_previous(entries: _Losses, checkpoint: RunCheckpoint) -> float:
    previous = max((step for step in _steps(checkpoint.path.parent) if step < checkpoint.step), default=0)
    total = covered = 0.0
    logged = 0
    for step, loss in entries:
        if previous < step <= checkpoint.step:
            total, covered = total + loss * (step - logged), covered + (step - logged)
        logged = step
    return total / covered if covered else _last(entries, checkpoint)
