"""Prune the weights of a checkpoint folder: no model is built, and tensors are read as they are needed."""

import re
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from weightsmith.core.checkpoint import Checkpoint, Stored, copy_other_files, write_checkpoint
from weightsmith.core.errors import UsageError, WeightsmithWarning, near
from weightsmith.core.files import check_target, folder_atomically
from weightsmith.core.json_files import read_json
from weightsmith.core.pretrained import model_class
from weightsmith.core.weights import Layout, layouts, output_layers
from weightsmith.prune.report import PruneReport, TensorDensity
from weightsmith.prune.scoring import check_amount, check_min_density, pattern_sizes, scorer, semi_structured
from weightsmith.prune.sparse import save_sparse
from weightsmith.prune.targets import groups_of
from weightsmith.prune.thresholds import Ranked, prune_ranked

_EXPERT = re.compile(r"(^|\.)experts?\.\d+\.")
_PLAIN = Layout("weight", 0)
_FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def prune_folder(
    folder: Path | str,
    out: Path | str,
    amount: float = 0.9,
    *,
    scope: Literal["global", "layerwise"] | Sequence[str] = "global",
    names: Sequence[str] = (),
    pattern: Literal["2:4", "4:8"] | None = None,
    min_density: float = 0.005,
    sparse: Path | str | None = None,
    overwrite: bool = False,
) -> PruneReport:
    """Set the smallest weights of a checkpoint folder to zero, and write it anew.

    The new folder has the same tensors in the same precision, so that everything that loads the old one loads it.

    Args:
        folder: Holds safetensors files; other files are copied.
        out: The folder to make.
        amount: Share of the weights to remove.
        scope: See `weightsmith.prune.MagnitudePruner`.
        names: Globs over tensor names, of which a leading ``!`` excludes. By default the linear layers and convolutions
            of the model that ``config.json`` names, without embeddings and output layers; without such a file every
            floating-point tensor of two dimensions or more.
        pattern: Instead of ``amount``: 2 of every 4, or 4 of 8, neighbors stay.
        min_density: Every tensor keeps at least this share.
        sparse: Also write this file, in the format of `weightsmith.prune.save_sparse`.
        overwrite: Replace what is at ``out``.

    Returns:
        Densities by tensor.

    Raises:
        UsageError: The folder cannot be read, nothing is left to prune, ``out`` exists or is what is read, a weight is
            not finite, or an argument is out of range.
    """
    source, target = Path(folder), Path(out)
    amount = check_amount(amount)
    check_min_density(min_density)
    check_target(target, [source])
    if target.exists() and not overwrite:
        raise UsageError(f"out {str(target)!r} exists: give overwrite=True, or --overwrite, to replace it")
    if sparse is not None:
        check_target(Path(sparse), [source, target], argument="sparse")
        if Path(sparse).is_dir():
            raise UsageError(f"sparse {str(sparse)!r} is a folder: give the file to write")
    stored = Checkpoint(source).stored()
    known = _of_the_model(source, stored)
    chosen = choose(source, stored, names, known)
    axes = known.layouts if known is not None else {}
    left_out = {}
    if known is not None and all(glob.startswith("!") for glob in names):
        left_out = {
            name: "is no tensor of the model that config.json names: choose it by names="
            for name in _fitting(stored)
            if name not in chosen and name not in known.names
        }
    if left_out:
        warnings.warn(
            f"{len(left_out)} matrices are left as they are, as the model that config.json names has none of these "
            f"names: {', '.join(list(left_out)[:3])}; names= chooses them",
            WeightsmithWarning,
            stacklevel=2,
        )
    for name in chosen:
        weight = stored[name].map()
        if not (weight.float().sum().isfinite() or weight.isfinite().all()):
            raise UsageError(f"{name} holds NaN or infinite values: nothing has been written")
    masks = {name: mask for members in groups_of(chosen, _scope(scope)).values()
             for name, mask in _masks(stored, members, axes, amount, pattern, min_density)}  # fmt: skip

    def pruned() -> Iterator[tuple[str, Tensor]]:
        for name, place in stored.items():
            tensor = place.map()
            yield name, tensor * masks[name] if name in masks else tensor.clone()

    with folder_atomically(target) as fresh:
        part = write_checkpoint(pruned(), fresh / "part")
        for path in part.iterdir():
            path.replace(fresh / path.name)
        part.rmdir()
        copy_other_files(source, fresh)
    if sparse is not None:
        save_sparse(dict(Checkpoint(target)), sparse, masks=masks)
    densities = (_density(name, place, masks.get(name), axes.get(name)) for name, place in stored.items())
    return PruneReport(None, tuple(densities), left_out)


@dataclass(frozen=True, slots=True)
class Known:
    """The model that ``config.json`` names: its matrices and kernels to prune, and the names of all its tensors."""

    layouts: dict[str, Layout]
    names: frozenset[str]


def _fitting(stored: dict[str, Stored]) -> list[str]:
    return [
        n for n, place in stored.items() if place.dtype in _FLOATS and len(place.shape) > 1 and min(place.shape) > 0
    ]


def choose(folder: Path, stored: dict[str, Stored], globs: Sequence[str], known: Known | None) -> list[str]:
    """Names of the tensors to prune.

    Raises:
        UsageError: There are none.
    """
    fitting = _fitting(stored)
    wanted = [glob for glob in globs if not glob.startswith("!")]
    unwanted = [glob[1:] for glob in globs if glob.startswith("!")]
    # experts are stored one by one and stacked when they are loaded, under other names
    default = (
        None if known is None else {*known.layouts, *(n for n in fitting if n not in known.names and _EXPERT.search(n))}
    )
    found = [
        name
        for name in fitting
        if (any(fnmatchcase(name, glob) for glob in wanted) if wanted else default is None or name in default)
        and not any(fnmatchcase(name, glob) for glob in unwanted)
    ]
    if not found:
        raise UsageError(f"names {list(globs)} match no matrix of {folder}; {near((wanted or [''])[0], fitting)}")
    return found


def _of_the_model(folder: Path, stored: dict[str, Stored]) -> Known | None:
    """What ``config.json`` says of a folder's tensors; ``None``, and a warning: it names no model that is known."""
    if not (folder / "config.json").is_file():
        return None
    known = _built(folder, stored)
    if known is None:
        warnings.warn(
            f"{folder}/config.json names no model that can be built here: every matrix is taken for a layer's, "
            "embeddings and output layers too; names= chooses",
            WeightsmithWarning,
            stacklevel=3,
        )
    return known


def _built(folder: Path, stored: dict[str, Stored]) -> Known | None:
    try:
        import transformers
    except ModuleNotFoundError:
        return None
    architectures = read_json(folder / "config.json").get("architectures")
    if not architectures:
        return None
    try:
        cls: Any = model_class(folder, architectures)
        config = transformers.AutoConfig.from_pretrained(folder)
        with torch.device("meta"):
            model = cls(config)
    except Exception:  # code of the folder's own, or a class that is not built from its configuration alone
        return None
    ends = set(output_layers(model))
    found = {
        f"{owner}.{layout.attribute}".lstrip("."): layout
        for owner, module in model.named_modules()
        if owner not in ends
        for layout in layouts(module)
    }
    # a checkpoint may hold the model without its head, under names without the first part
    bodies = {name.partition(".")[2]: layout for name, layout in found.items()}
    names = frozenset(model.state_dict())
    if found.keys() & stored.keys():
        return Known(found, names)
    if bodies.keys() & stored.keys():
        return Known(bodies, frozenset(name.partition(".")[2] for name in names))
    return None


def _scope(scope: str | Sequence[str]) -> str | list[str]:
    return scope if isinstance(scope, str) else list(scope)


def _masks(
    stored: dict[str, Stored],
    members: list[str],
    axes: Mapping[str, Layout],
    amount: float,
    pattern: str | None,
    min_density: float,
) -> Iterator[tuple[str, Tensor]]:
    weights = {name: stored[name].map() for name in members}
    if pattern is not None:
        keep, of = pattern_sizes(pattern)
        for name, weight in weights.items():
            try:
                layout = axes.get(name, _PLAIN)
                yield name, semi_structured(weight, keep, of, axis=layout.axis, stacked=layout.stacked)
            except UsageError as error:
                raise UsageError(f"{name}: {error}; exclude it by a name with a leading !") from error
        return
    score = scorer("magnitude", 1.0, 0)
    ranked = [Ranked(weight, torch.ones(weight.shape, dtype=torch.bool), score) for weight in weights.values()]
    found = prune_ranked(ranked, amount, min_density=min_density) if amount else None
    yield from zip(members, found or [one.mask for one in ranked], strict=True)


def _density(name: str, place: Stored, mask: Tensor | None, layout: Layout | None) -> TensorDensity:
    if mask is None:
        return TensorDensity(name, place.shape, int(np.prod(place.shape)), prunable=False)
    axis = (layout or _PLAIN).axis
    rows = mask.movedim(axis, 0).reshape(mask.shape[axis], -1)
    dead = len(rows) - int(np.count_nonzero(rows.numpy().any(1)))
    return TensorDensity(name, place.shape, int(mask.count_nonzero()), dead)
