"""Prune the weights of a checkpoint folder: no model is built, and tensors are read as they are needed."""

from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from weightsmith.core.checkpoint import Checkpoint, Stored, copy_other_files, write_checkpoint
from weightsmith.core.errors import UsageError, near
from weightsmith.core.files import check_target, folder_atomically
from weightsmith.core.json_files import read_json
from weightsmith.core.pretrained import model_class
from weightsmith.core.weights import layouts, output_layers
from weightsmith.prune.report import PruneReport, TensorDensity
from weightsmith.prune.scoring import check_amount, pattern_sizes, scorer, semi_structured
from weightsmith.prune.sparse import save_sparse
from weightsmith.prune.targets import groups_of
from weightsmith.prune.thresholds import Ranked, prune_ranked

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
    check_target(target, [source])
    if target.exists() and not overwrite:
        raise UsageError(f"out {str(target)!r} exists: give overwrite=True, or --overwrite, to replace it")
    if sparse is not None:
        check_target(Path(sparse), [source, target], argument="sparse")
        if Path(sparse).is_dir():
            raise UsageError(f"sparse {str(sparse)!r} is a folder: give the file to write")
    stored = Checkpoint(source).stored()
    chosen = choose(source, stored, names)
    for name in chosen:
        weight = stored[name].map()
        if not (weight.float().sum().isfinite() or weight.isfinite().all()):
            raise UsageError(f"{name} holds NaN or infinite values: nothing has been written")
    masks = {name: mask for members in groups_of(chosen, _scope(scope)).values()
             for name, mask in _masks(stored, members, amount, pattern, min_density)}  # fmt: skip

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
    return PruneReport(None, tuple(_density(name, place, masks.get(name)) for name, place in stored.items()))


def choose(folder: Path, stored: dict[str, Stored], globs: Sequence[str] = ()) -> list[str]:
    """Names of the tensors to prune.

    Raises:
        UsageError: There are none.
    """
    fitting = [
        n for n, place in stored.items() if place.dtype in _FLOATS and len(place.shape) > 1 and min(place.shape) > 0
    ]
    wanted = [glob for glob in globs if not glob.startswith("!")]
    unwanted = [glob[1:] for glob in globs if glob.startswith("!")]
    default = None if wanted else _of_the_model(folder, stored)
    found = [
        name
        for name in fitting
        if (any(fnmatchcase(name, glob) for glob in wanted) if wanted else default is None or name in default)
        and not any(fnmatchcase(name, glob) for glob in unwanted)
    ]
    if not found:
        raise UsageError(f"names {list(globs)} match no matrix of {folder}; {near((wanted or [''])[0], fitting)}")
    return found


def _of_the_model(folder: Path, stored: dict[str, Stored]) -> set[str] | None:
    """Matrices and kernels of the model that ``config.json`` names; ``None``: it names none that is known."""
    if not (folder / "config.json").is_file():
        return None
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
        f"{owner}.{layout.attribute}".lstrip(".")
        for owner, module in model.named_modules()
        if owner not in ends
        for layout in layouts(module)
    }
    # a checkpoint may hold the model without its head, under names without the first part
    bodies = {name.partition(".")[2] for name in found}
    return found if found & stored.keys() else (bodies if bodies & stored.keys() else None)


def _scope(scope: str | Sequence[str]) -> str | list[str]:
    return scope if isinstance(scope, str) else list(scope)


def _masks(
    stored: dict[str, Stored], members: list[str], amount: float, pattern: str | None, min_density: float
) -> Iterator[tuple[str, Tensor]]:
    weights = {name: stored[name].map() for name in members}
    if pattern is not None:
        keep, of = pattern_sizes(pattern)
        for name, weight in weights.items():
            try:
                yield name, semi_structured(weight, keep, of)
            except UsageError as error:
                raise UsageError(f"{name}: {error}; exclude it by a name with a leading !") from error
        return
    score = scorer("magnitude", 1.0, 0)
    ranked = [Ranked(weight, torch.ones(weight.shape, dtype=torch.bool), score) for weight in weights.values()]
    found = prune_ranked(ranked, amount, min_density=min_density) if amount else None
    yield from zip(members, found or [one.mask for one in ranked], strict=True)


def _density(name: str, place: Stored, mask: Tensor | None) -> TensorDensity:
    if mask is None:
        return TensorDensity(name, place.shape, int(np.prod(place.shape)), prunable=False)
    rows = mask.reshape(len(mask), -1)
    dead = len(rows) - int(np.count_nonzero(rows.numpy().any(1)))
    return TensorDensity(name, place.shape, int(mask.count_nonzero()), dead)
