"""``weightsmith merge``: the checkpoints of a training run into one."""

import contextlib
import importlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table

from weightsmith.average import (
    MergeReport,
    RunCheckpoint,
    Share,
    find_checkpoints,
    greedy_soup,
    merge_checkpoints,
    weigh_checkpoints,
)
from weightsmith.average.adapters import LoraMode
from weightsmith.average.checkpoints import as_checkpoints
from weightsmith.average.weights import Decay, Scheme
from weightsmith.core.display import markup
from weightsmith.core.errors import UsageError, WeightsmithWarning

_DTYPES = {"float64": torch.float64, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
_console = Console()


def merge(
    paths: tyro.conf.Positional[tuple[Path, ...]],
    /,
    out: Path | None = None,
    by: Annotated[str, tyro.conf.arg(metavar="loss|loss:last|steps|eval|eval:KEY")] = "loss",
    scheme: Scheme = "power",
    penalty: float = 1.0,
    last: int = 4,
    every: int = 1,
    steps: tuple[int, ...] = (),
    top: int | None = None,
    higher_is_better: bool = False,
    metrics: tuple[float, ...] = (),
    weights: tuple[float, ...] = (),
    decay: Decay | None = None,
    lora_mode: LoraMode = "svd",
    rank: int | None = None,
    base: Path | None = None,
    dtype: Literal["float64", "float32", "float16", "bfloat16"] | None = None,
    soup: Annotated[str | None, tyro.conf.arg(metavar="MODULE:FUNCTION")] = None,
    chunk_mb: float = 16,
    dry_run: bool = False,
    overwrite: bool = False,
    skip_bad: bool = False,
    allow_pickle: bool = False,
) -> int:
    """Merge the checkpoints of one training run, weighted by what the run has logged, or for a decay of its rate.

    Reads a Trainer's output folder, adapters or full models, and writes a folder that from_pretrained loads unchanged.

    Args:
        paths: A run folder, or its checkpoint folders.
        out: The folder to make.
        by: What weighs: the mean training loss since the checkpoint before, the last one logged, the step, the
            evaluation loss, or another evaluation metric.
        scheme: How metrics become weights; uniform ignores them.
        penalty: How sharply: 0 is uniform for power and linear, a temperature for softmax, the base for rank and ema.
        last: How many of the newest checkpoints.
        every: Take every n-th of them.
        steps: Take exactly these steps instead.
        top: Of those, only this many, the best by metric.
        higher_is_better: The metric is a score and no loss.
        metrics: The metric by hand, one number per checkpoint, oldest first.
        weights: The weights by hand, one number per checkpoint, oldest first; scaled to sum 1.
        decay: Of a run at a constant learning rate: weights whose average equals, to first order, this decay of the
            rate from the first of these checkpoints to the last.
        lora_mode: Adapters: best adapter of the average update, that update at full rank, average of the factors, or
            the update in the base model's weights. Bone adapters are averaged exactly, and dense puts them into the
            base.
        rank: Of svd; the checkpoints' own by default.
        base: Folder of the base model, for dense. A Bone adapter's checkpoint may hold it itself.
        dtype: Write this; the newest checkpoint's by default.
        soup: Greedy soup: your function (folder) -> score, higher is better, decides which checkpoints are averaged.
        chunk_mb: Memory for the buffers that full models are streamed through.
        dry_run: Print the weights and write nothing.
        overwrite: Replace what is at --out.
        skip_bad: Leave out checkpoints whose metric is not finite.
        allow_pickle: Also read .bin files.
    """
    if out is None and not dry_run:
        raise UsageError("--out names the folder to make (or give --dry-run)")
    weighing: dict[str, Any] = {
        "values": metrics or None,
        "weights": weights or None,
        "decay": decay,
        "scheme": scheme,
        "penalty": penalty,
        "top": top,
        "skip_bad": skip_bad,
        **_metric(by, higher_is_better),
    }
    if soup is not None and (metrics or weights or decay or top):
        raise UsageError(
            "--soup chooses by evaluations and averages equally: leave --metrics, --weights, --decay, --top"
        )
    with _warnings_as_notes():
        checkpoints = _checkpoints(paths, last, every, steps)
        if out is None or dry_run:
            if soup is not None:
                raise UsageError("--dry-run knows no weights of a --soup: they come from evaluations")
            _console.print(_table(weigh_checkpoints(checkpoints, **weighing)))
            return 0
        writing: dict[str, Any] = {
            "lora_mode": lora_mode,
            "rank": rank,
            "base": base,
            "dtype": _DTYPES[dtype] if dtype else None,
            "chunk_mb": chunk_mb,
            "overwrite": overwrite,
            "allow_pickle": allow_pickle,
        }
        if soup is not None:
            report = greedy_soup(checkpoints, out, _function(soup), **writing)
        elif lora_mode == "dense" and as_checkpoints(checkpoints)[-1].kind == "bone":
            from weightsmith.integrations.bone import merge_bone_checkpoints

            fitting = {name: writing[name] for name in ("base", "dtype", "overwrite")}
            report = merge_bone_checkpoints(checkpoints, out, **weighing, **fitting)
        else:
            report = merge_checkpoints(checkpoints, out, **weighing, **writing)
        _show(report)
    _console.print(f"\nMerged: {markup(report.out.resolve())}", soft_wrap=True, highlight=False)
    return 0


@contextlib.contextmanager
def _warnings_as_notes() -> Iterator[None]:
    """Print our warnings as lines of their own, without the file and line of source that Python adds."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", WeightsmithWarning)
        yield
    for warning in caught:
        if issubclass(warning.category, WeightsmithWarning):
            _console.print(f"[yellow]note:[/] {markup(str(warning.message))}", soft_wrap=True, highlight=False)
        else:
            warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


def _checkpoints(
    paths: Sequence[Path], last: int, every: int, steps: Sequence[int]
) -> Sequence[Path | str | RunCheckpoint]:
    if not paths:
        raise UsageError("give a run folder, or its checkpoint folders")
    is_run = len(paths) == 1 and paths[0].is_dir() and any(paths[0].glob("checkpoint-*"))
    if len(paths) > 1 or (not is_run and any(paths[0].glob("*.safetensors"))):
        return paths
    return find_checkpoints(paths[0], last=last, every=every, steps=steps or None)


def _metric(by: str, higher_is_better: bool) -> dict[str, str]:
    if by == "steps":
        return {"metric": "steps"}
    sources = {"loss": "since_previous", "loss:last": "last", "eval": "eval", "eval_loss": "eval"}
    if by not in sources and not by.startswith("eval:"):
        raise UsageError(f"--by must be loss, loss:last, steps, eval or eval:KEY, got {by!r}")
    return {"metric": "score" if higher_is_better else "loss", "source": sources.get(by, by)}


def _function(name: str) -> Callable[[Path], float]:
    module, colon, attribute = name.partition(":")
    try:
        found: Callable[[Path], float] | None = getattr(importlib.import_module(module), attribute) if colon else None
    except (ImportError, AttributeError) as error:
        raise UsageError(f"--soup {name!r} cannot be imported: {error}") from error
    if not callable(found):
        raise UsageError(f"--soup must be MODULE:FUNCTION, got {name!r}")
    return found


def _table(shares: Sequence[Share], distances: Sequence[float | None] | None = None) -> Table:
    table = Table(box=None, pad_edge=False)
    for heading in ("step", "metric", "weight", *(["distance from the newest"] if distances else [])):
        table.add_column(heading, justify="right")
    for index, share in enumerate(shares):
        value = "" if share.value is None else f"{share.value:.6g}"
        row = [str(share.checkpoint.step), value, f"{share.weight:.4f}"]
        if distances:
            away = distances[index]
            row.append("" if away is None else f"{away:.4g}")
        table.add_row(*row)
    return table


def _show(report: MergeReport) -> None:
    _console.print(_table(report.shares, report.distances))
    for what, losses in (("covariance gap", report.gaps), ("discarded by the rank", report.discarded)):
        if losses:
            worst = max(losses, key=losses.__getitem__)
            mean = sum(losses.values()) / len(losses)
            _console.print(f"{what}: mean {mean:.2%}, most {losses[worst]:.2%} ({markup(worst)})", highlight=False)
