"""Write a merged folder: of models, of LoRA adapters, of Bone adapters."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from weightsmith.average.adapters import LoraMode, open_adapters
from weightsmith.average.checkpoints import RunCheckpoint
from weightsmith.average.dense import Dense, cast_, merged_by_peft
from weightsmith.average.report import MergeReport
from weightsmith.average.sources import Place, check_same_tensors, open_places
from weightsmith.average.stream import Mean
from weightsmith.core.adapters import BONE_CONFIG, BONE_TENSORS
from weightsmith.core.checkpoint import copy_other_files, write_pieces
from weightsmith.core.errors import UsageError
from weightsmith.core.files import write_atomically
from weightsmith.core.json_files import read_json

RUN_FILES = frozenset({"trainer_state.json", "merge_report.json"})
_SINGLE = "model.safetensors"
_LARGE_GAP = 0.1


class _Source(Protocol):
    def dtype_of(self, place: Place, /) -> torch.dtype: ...

    def pieces(self, name: str, places: Sequence[Place]) -> Iterable[Tensor]: ...


def write_model(
    fresh: Path, newest: Path, places: Sequence[Mapping[str, Place]], source: _Source, dtype: torch.dtype | None
) -> None:
    """Write every tensor of the newest checkpoint into the file, and in the order, that it has there."""
    by_file: dict[str, list[str]] = {}
    for name, place in places[-1].items():
        by_file.setdefault(_safe(place.file.name), []).append(name)
    total = 0
    for file, names in by_file.items():
        layout = {name: (source.dtype_of(places[-1][name]), places[-1][name].shape) for name in names}
        parts = (piece for name in names for piece in source.pieces(name, [found[name] for found in places]))
        write_pieces(fresh / file, layout, parts)
        total += sum(kind.itemsize * math.prod(shape) for kind, shape in layout.values())
    copy_other_files(newest, fresh, but=RUN_FILES)
    if dtype is not None and (config := fresh / "config.json").is_file():
        _set_dtype(config, dtype)
    if by_file.keys() != {_SINGLE}:
        weight_map = {name: file for file, names in by_file.items() for name in names}
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        write_atomically(fresh / f"{_SINGLE}.index.json", json.dumps(index, indent=2) + "\n")


def write_bone(fresh: Path, chosen: Sequence[RunCheckpoint], places: Sequence[Mapping[str, Place]], mean: Mean) -> None:
    """Average Bone adapters as they are: every form is linear in its tensors."""
    configs = [read_json(checkpoint.path / BONE_CONFIG, {"variant": str}) for checkpoint in chosen]
    for checkpoint, config in zip(chosen, configs, strict=True):
        if config["variant"] != configs[-1]["variant"]:
            raise UsageError(
                f"{checkpoint.path} and {chosen[-1].path} differ in variant: {config['variant']!r} and "
                f"{configs[-1]['variant']!r}"
            )
    newest = places[-1]
    # wide dtypes first keeps every tensor aligned in the file
    names = sorted(newest, key=lambda name: (-mean.dtype_of(newest[name]).itemsize, name))
    layout = {name: (mean.dtype_of(newest[name]), newest[name].shape) for name in names}
    parts = (piece for name in names for piece in mean.pieces(name, [found[name] for found in places]))
    write_pieces(fresh / BONE_TENSORS, layout, parts)
    copy_other_files(chosen[-1].path, fresh, but=RUN_FILES)
    for name in ("config.json", "generation_config.json"):
        (fresh / name).unlink(missing_ok=True)  # this folder is no model


def write_adapter(
    fresh: Path,
    report: MergeReport,
    places: list[dict[str, Place]],
    mean: Mean,
    dtype: torch.dtype | None,
    mode: LoraMode,
    rank: int | None,
    base: Path | None,
    chunk_mb: float,
    allow_pickle: bool,
) -> None:
    """Average LoRA adapters as ``mode`` says; what it loses is written into the report."""
    chosen, shares = [s.checkpoint for s in report.shares], [s.weight for s in report.shares]
    adapters, caveat = open_adapters(chosen, places, mode)
    if caveat:
        report.notes.append(caveat)
    free = [name for pair in adapters.pairs.values() for name in (pair.a, pair.b)] if mode != "factors" else []
    check_same_tensors(places, mixed_dtypes=dtype is not None, free=free)
    for name in free:
        found = [tensors[name] for tensors in places]
        if all(place.shape == found[-1].shape for place in found):
            mean.measure(name, found)
    if mode == "dense":
        assert base is not None
        if adapters.pairs:
            stored = open_places(RunCheckpoint(base, 0, "model"), allow_pickle=allow_pickle)
            write_model(fresh, base, [stored], Dense(stored, adapters, shares, mean, chunk_mb), dtype)
        else:
            copy_other_files(base, fresh, but=RUN_FILES)
            model = merged_by_peft(base, chosen, shares, allow_pickle=allow_pickle)
            cast_(model, dtype or model.dtype).save_pretrained(fresh)
        return
    r = adapters.rank(mode, rank) if adapters.pairs else 0
    layout = adapters.layout(mode, r, mean)
    write_pieces(fresh / "adapter_model.safetensors", layout, adapters.pieces(layout, mode, r, shares, mean))
    copy_other_files(chosen[-1].path, fresh, but=RUN_FILES)
    write_atomically(fresh / "adapter_config.json", json.dumps(adapters.merged_config(mode, r), indent=2) + "\n")
    report.discarded.update(adapters.discarded)
    if mode == "factors":
        report.gaps.update(adapters.gaps(shares))
        worst = max(report.gaps, key=report.gaps.__getitem__, default=None)
        if worst is not None and report.gaps[worst] > _LARGE_GAP:
            report.notes.append(
                f"averaging factors loses {report.gaps[worst]:.0%} of the update of {worst}: these adapters are too "
                "different; lora_mode 'svd' or 'cat' keeps it"
            )


def _set_dtype(config: Path, dtype: torch.dtype) -> None:
    content = read_json(config)
    key = "torch_dtype" if "torch_dtype" in content else "dtype"
    write_atomically(config, json.dumps({**content, key: str(dtype).removeprefix("torch.")}, indent=2) + "\n")


def _safe(name: str) -> str:
    """The safetensors name of a weight file or an index."""
    if name.endswith((".pt", ".pth")):
        return _SINGLE
    return name.replace("pytorch_model", "model").replace(".bin", ".safetensors")
