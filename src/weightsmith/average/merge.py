"""Merge the checkpoints of one training run into one folder that loads like any of them.

``theta = sum_i w_i theta_i``, the weights coming from metrics that the run has logged. Full models are averaged in
constant memory, LoRA adapters as the updates that they stand for. Nothing is trained, nothing needs to be evaluated.

Source: "Parameter-Efficient Checkpoint Merging via Metrics-Weighted Averaging" (arXiv 2504.18580). Uniform weights over
the latest checkpoints are LAWA (arXiv 2209.14981), over any, a uniform soup (arXiv 2203.05482).
"""

import json
import math
import warnings
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, get_args

import torch

from weightsmith.average.adapters import LoraMode
from weightsmith.average.checkpoints import (
    RunCheckpoint,
    as_checkpoints,
    checkpoint_losses,
    find_checkpoints,
    learning_rates,
    refuse_incomplete,
)
from weightsmith.average.report import MergeReport, Share
from weightsmith.average.sources import check_same_tensors, open_places
from weightsmith.average.state_dicts import normalized
from weightsmith.average.stream import Mean
from weightsmith.average.weights import Decay, Metric, Scheme, decay_weights, metric_weights
from weightsmith.average.writing import write_adapter, write_bone, write_model
from weightsmith.core.errors import UsageError, WeightsmithWarning, unknown
from weightsmith.core.files import check_target, folder_atomically, write_atomically

_Paths = Path | str | Sequence[Path | str | RunCheckpoint]


def weigh_checkpoints(
    checkpoints: _Paths,
    *,
    values: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    metric: Metric = "loss",
    source: str = "since_previous",
    scheme: Scheme = "power",
    penalty: float = 1.0,
    decay: Decay | None = None,
    top: int | None = None,
    skip_bad: bool = False,
) -> list[Share]:
    """Decide what each checkpoint contributes; no weight file is read.

    Args:
        checkpoints: A run folder (its last four are taken), or checkpoints of one run.
        values: The metric by hand, one number per checkpoint, oldest first.
        weights: The weights themselves; scaled to sum 1.
        metric: What weighs: ``"loss"`` and ``"score"`` are read from the run's log, ``"steps"`` from folder names.
        source: Which entry of the log, see `checkpoint_losses`.
        scheme: See `metric_weights`.
        penalty: See `metric_weights`.
        decay: Weigh by step so that the average equals a decay of the learning rate that was not trained, see
            `decay_weights`; metric, scheme and penalty are ignored.
        top: Take only this many, the best by metric.
        skip_bad: Leave out checkpoints whose metric is not finite.

    Returns:
        One share per checkpoint taken, oldest first.

    Raises:
        UsageError: There is no such checkpoint or log entry, or an argument is out of range.
    """
    given = {"values": values, "weights": weights, "decay": decay}
    ruling = [name for name, value in given.items() if value is not None]
    if len(ruling) > 1 or (top is not None and ruling in (["weights"], ["decay"])):
        raise UsageError(f"{' and '.join([*ruling, *(['top'] if top is not None else [])])} exclude each other")
    found = find_checkpoints(checkpoints) if isinstance(checkpoints, Path | str) else as_checkpoints(checkpoints)
    refuse_incomplete(found)
    if (values is not None or weights is not None) and not isinstance(checkpoints, Path | str):
        _refuse_reordered(checkpoints, found, "values" if weights is None else "weights")
    if metric == "score" and values is None and weights is None and decay is None and not _is_score(source):
        raise UsageError(
            f"metric 'score' takes values, or source='eval:<key>' of a metric that is no loss, got source {source!r}: "
            "of losses, which metric='loss' means, lower ones are better"
        )
    if decay is not None or weights is not None:
        steps = [checkpoint.step for checkpoint in found]
        shares = normalized(weights, len(found)) if decay is None else decay_weights(steps, decay).tolist()
        return [Share(checkpoint, None, share) for checkpoint, share in zip(found, shares, strict=True)]
    if values is not None and len(values) != len(found):
        raise UsageError(f"values must be {len(found)} numbers, one per checkpoint, got {len(values)}")
    if values is None and (len(found) == 1 or scheme in ("uniform", "ema")) and top is None:
        values = [checkpoint.step for checkpoint in found]  # the metric does not matter, so it need not be logged
    elif values is None:
        values = [c.step for c in found] if metric == "steps" else checkpoint_losses(found, source)
    known = list(zip(found, map(float, values), strict=True))
    bad = [(checkpoint, value) for checkpoint, value in known if not math.isfinite(value)]
    if bad and not skip_bad:
        raise UsageError(f"{metric} of {bad[0][0].path} is {bad[0][1]}; skip_bad=True (--skip-bad) leaves it out")
    known = [(checkpoint, value) for checkpoint, value in known if math.isfinite(value)]
    if top is not None:
        if top < 1:
            raise UsageError(f"top must be at least 1, got {top}")
        best = sorted(known, key=lambda pair: pair[1], reverse=metric != "loss")[:top]
        known = sorted(best, key=lambda pair: pair[0].step)
    computed = metric_weights([value for _, value in known], metric, scheme, penalty)
    return [Share(*pair, float(weight)) for pair, weight in zip(known, computed, strict=True)]


def merge_checkpoints(
    checkpoints: _Paths,
    out: Path | str,
    *,
    values: Sequence[float] | None = None,
    weights: Sequence[float] | None = None,
    metric: Metric = "loss",
    source: str = "since_previous",
    scheme: Scheme = "power",
    penalty: float = 1.0,
    decay: Decay | None = None,
    top: int | None = None,
    skip_bad: bool = False,
    lora_mode: LoraMode = "svd",
    rank: int | None = None,
    base: Path | str | None = None,
    dtype: torch.dtype | None = None,
    chunk_mb: float = 16,
    overwrite: bool = False,
    allow_pickle: bool = False,
) -> MergeReport:
    """Merge checkpoints of one run into a folder that ``from_pretrained`` loads unchanged.

    The folder appears whole or not at all. Configuration, tokenizer and shard layout are the newest checkpoint's.

    Args:
        checkpoints: A run folder (its last four are taken), or checkpoints: see `find_checkpoints`.
        out: The folder to make.
        values: See `weigh_checkpoints`, also for the next eight.
        weights: The weights themselves.
        metric: ``"loss"``, ``"steps"`` or ``"score"``.
        source: Which entry of the log.
        scheme: How metrics become weights.
        penalty: How sharply.
        decay: A decay of the learning rate that the average stands for, in place of a metric.
        top: Take only this many, the best by metric.
        skip_bad: Leave out checkpoints whose metric is not finite.
        lora_mode: ``"svd"``: the best adapter of ``rank`` for the average update. ``"cat"``: that update exactly, at
            the sum of all ranks. ``"factors"``: average A and B, which drops the covariance gap. ``"dense"``: the exact
            update in the base model's weights; a full model comes out.
        rank: Of ``"svd"``; ``None``: the checkpoints' own.
        base: Folder of the base model, for ``"dense"``.
        dtype: What floating-point tensors are written as; ``None``: the newest's, and then all must have it.
        chunk_mb: Memory for the buffers that full models are streamed through.
        overwrite: Replace what is at ``out``.
        allow_pickle: Also read ``.bin`` files, and a single ``.pt`` or ``.pth`` one that holds a state dict.

    Raises:
        UsageError: The checkpoints cannot be merged as asked; nothing has been written.

    Warns:
        WeightsmithWarning: The result needs attention; also in the report's ``notes``.
    """
    if lora_mode not in get_args(LoraMode):
        raise unknown("lora_mode", lora_mode, get_args(LoraMode))
    if rank is not None and rank < 1:
        raise UsageError(f"rank must be at least 1, got {rank}")
    if dtype not in (None, torch.float64, torch.float32, torch.float16, torch.bfloat16):
        raise UsageError(f"dtype must be float64, float32, float16 or bfloat16, got {dtype}")
    if not chunk_mb > 0:
        raise UsageError(f"chunk_mb must be above 0, got {chunk_mb}")
    shares = weigh_checkpoints(
        checkpoints,
        values=values,
        weights=weights,
        metric=metric,
        source=source,
        scheme=scheme,
        penalty=penalty,
        decay=decay,
        top=top,
        skip_bad=skip_bad,
    )
    chosen = [share.checkpoint for share in shares]
    target = Path(out)
    check_new_folder(target, [*(c.path for c in chosen), *([Path(base)] if base else [])], overwrite)
    refuse_incomplete(chosen, weights=True)
    if len({checkpoint.kind for checkpoint in chosen}) > 1:
        kinds = ", ".join(f"{c.path.name}: {c.kind}" for c in chosen)
        raise UsageError(f"checkpoints must be all adapters or all models, got {kinds}")
    adapters = chosen[0].kind == "adapter"
    if chosen[0].kind == "bone" and lora_mode == "dense":
        raise UsageError(
            "lora_mode 'dense' for Bone adapters is merge_bone_checkpoints of weightsmith.integrations.bone, or "
            "weightsmith merge --lora-mode dense; without it they are averaged, exactly, into one Bone adapter"
        )
    if adapters and lora_mode == "dense" and base is None:
        raise UsageError("lora_mode 'dense' needs the base model's folder as base (--base)")
    report = MergeReport(
        target,
        shares,
        [None] * len(shares),
        settings=_settings(weights, decay, metric, source, scheme, penalty) | {"rank": rank},
        lora_mode=lora_mode if adapters else None,
    )
    rates = learning_rates(chosen) if decay is not None else None
    if rates and rates[0] < 0.99 * rates[1]:
        report.notes.append(
            f"the learning rate was not constant between these checkpoints (from {rates[0]:.3g} to {rates[1]:.3g}): "
            "decay is meant for a constant one"
        )
    mean = Mean([share.weight for share in shares], dtype=dtype, chunk_mb=chunk_mb)
    places = [open_places(checkpoint, allow_pickle=allow_pickle) for checkpoint in chosen]
    with folder_atomically(target) as fresh:
        if chosen[0].kind == "bone":
            check_same_tensors(places, mixed_dtypes=dtype is not None)
            write_bone(fresh, chosen, places, mean)
        elif not adapters:
            check_same_tensors(places, mixed_dtypes=dtype is not None)
            write_model(fresh, chosen[-1].path, places, mean, dtype)
            if any(name.endswith("running_mean") for name in places[-1]):
                report.notes.append("batch norm's statistics were averaged; measure them anew: swa_utils.update_bn")
        else:
            write_adapter(
                fresh,
                report,
                places,
                mean,
                dtype,
                lora_mode,
                rank,
                Path(base) if base else None,
                chunk_mb,
                allow_pickle,
            )
        if mean.measured:
            report.distances[:] = mean.distances()
        write_atomically(fresh / "merge_report.json", json.dumps(asdict(report), indent=2, default=str) + "\n")
    for note in report.notes:
        warnings.warn(note, WeightsmithWarning, stacklevel=2)
    return report


def _is_score(source: str) -> bool:
    return source.startswith("eval:") and source.removeprefix("eval:").removeprefix("eval_") != "loss"


def _refuse_reordered(
    given: Sequence[Path | str | RunCheckpoint], found: Sequence[RunCheckpoint], argument: str
) -> None:
    """Refuse numbers by hand for checkpoints that were not given in the order in which they are averaged."""
    asked = [item.path if isinstance(item, RunCheckpoint) else Path(item) for item in given]
    used = [checkpoint.path for checkpoint in found]
    if asked != used:
        raise UsageError(
            f"{argument} go with checkpoints that are given oldest first, by the steps in their names: "
            f"{', '.join(map(str, used))}"
        )


def _settings(weights: object, decay: str | None, *by_metric: object) -> dict[str, Any]:
    if weights is not None:
        return {"weights": "given"}
    if decay is not None:
        return {"decay": decay}
    return dict(zip(("metric", "source", "scheme", "penalty"), by_metric, strict=True))


def check_new_folder(target: Path, sources: Sequence[Path], overwrite: bool) -> None:
    """Make sure that a merged folder may be written.

    Raises:
        UsageError: Something is in its place, or it would replace what is read.
    """
    check_target(target, sources)
    for path in (target, *target.parents):
        if path.exists() and not path.is_dir():
            raise UsageError(f"out must be a folder, got {target}: {path} is a file")
    if target.exists() and not overwrite:
        raise UsageError(f"out {target} exists; overwrite=True (--overwrite) replaces it")
