"""Bone adapters under Hugging Face's ``Trainer``: their checkpoints, and what comes of merging them."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from weightsmith.adapt import load_bone, save_bone, unload_bone_
from weightsmith.adapt.folders import Format
from weightsmith.adapt.registry import config_of, is_sharded
from weightsmith.average import MergeReport, RunCheckpoint, find_checkpoints, merge_checkpoints
from weightsmith.average.checkpoints import as_checkpoints
from weightsmith.average.dense import cast_
from weightsmith.average.merge import check_new_folder
from weightsmith.average.writing import RUN_FILES
from weightsmith.core.adapters import BONE_CONFIG, BONE_MERGED
from weightsmith.core.checkpoint import Checkpoint, copy_other_files
from weightsmith.core.errors import UsageError, require
from weightsmith.core.files import folder_atomically, temporary_folder, write_atomically
from weightsmith.core.json_files import read_json
from weightsmith.core.pretrained import load_pretrained, model_class

transformers: Any = require("transformers", extra="hf", purpose="Bone adapters under a Trainer")


class BoneCheckpointCallback(transformers.TrainerCallback):
    """Write the adapter into every checkpoint folder, beside the whole model that ``Trainer`` saves there.

    That whole model is for resuming: ``from_pretrained`` would drop the adapter from it. With the adapter's own files,
    ``weightsmith merge`` averages the checkpoints, and ``load_bone`` reads each of them.

    Args:
        adapter_name: Which adapter.
        format: See `weightsmith.adapt.save_bone`; ``"native"`` holds every form.

    Example:
        >>> model = apply_bone_(model, BoneConfig(r=64, variant="row"))  # doctest: +SKIP
        >>> trainer = Trainer(model, args, callbacks=[BoneCheckpointCallback()])  # doctest: +SKIP
    """

    def __init__(self, adapter_name: str = "default", format: Format = "native") -> None:
        self.adapter_name, self.format = adapter_name, format

    def on_train_begin(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Fail before the training and not after it."""
        config_of(model, self.adapter_name)

    def on_save(self, args: Any, state: Any, *_: Any, model: Any = None, **__: Any) -> None:
        """The checkpoint has been written."""
        if state.is_world_process_zero or is_sharded(model):
            folder = Path(args.output_dir, f"checkpoint-{state.global_step}")
            save_bone(model, folder, format=self.format, adapter_name=self.adapter_name)


def merge_bone_checkpoints(
    checkpoints: Path | str | Sequence[Path | str | RunCheckpoint],
    out: Path | str,
    *,
    base: Path | str | None = None,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    **options: Any,
) -> MergeReport:
    """Average Bone adapters and put the result into the base model's weights: a plain model comes out.

    The average is exact, because every form is linear in its tensors.

    Args:
        checkpoints: A run folder (its last four are taken), or folders of `BoneCheckpointCallback` or
            ``save_bone``.
        out: The folder to make; ``from_pretrained`` loads it.
        base: Folder of the base model; ``None``: the newest checkpoint, where ``Trainer`` has saved it along.
        dtype: What floating-point tensors are written as; ``None``: as in ``base``.
        overwrite: Replace what is at ``out``.
        **options: How checkpoints weigh, see `weightsmith.average.weigh_checkpoints`.

    Raises:
        UsageError: The checkpoints cannot be merged as asked; nothing has been written.
    """
    found = find_checkpoints(checkpoints) if isinstance(checkpoints, Path | str) else as_checkpoints(checkpoints)
    target, home = Path(out), Path(base) if base else found[-1].path
    check_new_folder(target, [*(checkpoint.path for checkpoint in found), home], overwrite)
    if not (home / "config.json").is_file():
        raise UsageError(f"{home} holds no model: give the base model's folder as base (--base)")
    with temporary_folder(target) as scratch:
        report = merge_checkpoints(found, scratch / "adapter", **options)
        model = _base_model(home)
        unload_bone_(load_bone(model, scratch / "adapter"), merge=True)
        if dtype is not None:
            cast_(model, dtype)
        report = replace(report, out=target, settings={**report.settings, "base": str(home)})
        with folder_atomically(target) as fresh:
            for source in (scratch / "adapter", home):
                copy_other_files(source, fresh, but=RUN_FILES)
            (fresh / BONE_CONFIG).unlink()
            model.save_pretrained(fresh)
            write_atomically(fresh / "merge_report.json", json.dumps(asdict(report), indent=2, default=str) + "\n")
    return report


def _base_model(folder: Path) -> Any:
    """Load a base; of a checkpoint that holds the adapter as well, ``transformers`` leaves that out."""
    names = Checkpoint(folder)
    if merged := [name for name in names if f".{BONE_MERGED}." in f".{name}"]:
        raise UsageError(f"{folder} has adapters in its weights already ({merged[0]}): give the base model as base")
    with _without_warnings():
        loader = model_class(folder, read_json(folder / "config.json").get("architectures"))
        return load_pretrained(loader, folder, dtype="auto", use_safetensors=True)


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    verbosity = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()
    try:
        yield
    finally:
        transformers.logging.set_verbosity(verbosity)
