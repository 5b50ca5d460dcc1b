"""``weightsmith prune``: the smallest weights of a checkpoint folder set to zero."""

from pathlib import Path
from typing import Annotated, Literal

import tyro
from rich.console import Console
from rich.table import Table

from weightsmith.core.display import markup
from weightsmith.core.errors import UsageError
from weightsmith.prune import PruneReport
from weightsmith.prune.folders import prune_folder

_console = Console()


def prune(
    checkpoint: tyro.conf.Positional[Path],
    /,
    out: Path | None = None,
    sparsity: float = 0.9,
    scope: Annotated[tuple[str, ...], tyro.conf.arg(metavar="global|layerwise|GLOB...")] = ("global",),
    names: Annotated[tuple[str, ...], tyro.conf.arg(metavar="GLOB...")] = (),
    pattern: Literal["2:4", "4:8"] | None = None,
    min_density: float = 0.005,
    sparse: Path | None = None,
    overwrite: bool = False,
) -> int:
    """Set the smallest weights of a checkpoint folder to zero, and write a folder that loads like the old one.

    Nothing gets faster by that, and the folder stays as large: zeros are stored and multiplied like other numbers.
    --sparse writes a file that is smaller; serving engines do not read it. Quality falls until what is left has been
    trained again (weightsmith.prune.iterate).

    Args:
        checkpoint: A folder with safetensors files, or one such file.
        out: The folder to make.
        sparsity: Share of the weights to remove.
        scope: What shares a threshold: global, layerwise, or globs over tensor names, a group each.
        names: Tensors to prune, as globs; a leading ! excludes. By default the layers of the model that config.json
            names, without embeddings and output layers.
        pattern: Instead of --sparsity: keep 2 of every 4, or 4 of 8, neighbors along the inputs.
        min_density: Every tensor keeps at least this share, so that no layer is emptied.
        sparse: Also write this file of bits and values; weightsmith.prune.load_sparse reads it.
        overwrite: Replace what is at --out.
    """
    if out is None:
        raise UsageError("--out names the folder to make")
    if not scope:
        raise UsageError("--scope needs global, layerwise or globs")
    named: str | tuple[str, ...] = scope[0] if scope[0] in ("global", "layerwise") and len(scope) == 1 else scope
    report = prune_folder(
        checkpoint, out, sparsity, scope=named, names=names, pattern=pattern,
        min_density=min_density, sparse=sparse, overwrite=overwrite,
    )  # fmt: skip
    _console.print(_table(report))
    _console.print(
        f"{report.density:.2%} of the pruned tensors' weights are left, {report.density_of_all:.2%} of all parameters."
    )
    _console.print(f"Pruned: {markup(out.resolve())}", soft_wrap=True, highlight=False)
    if sparse is not None:
        size, dense = sparse.stat().st_size, sum(path.stat().st_size for path in out.glob("*.safetensors"))
        _console.print(f"Sparse file: {markup(sparse.resolve())}, {size / 2**20:.1f} MiB of {dense / 2**20:.1f} MiB",
                       soft_wrap=True, highlight=False)  # fmt: skip
    return 0


def _table(report: PruneReport) -> Table:
    table = Table(title="What is left")
    for heading in ("tensor", "shape", "density", "dead rows"):
        table.add_column(heading, justify="left" if heading == "tensor" else "right")
    for tensor in report.tensors:
        if tensor.prunable:
            shape = " x ".join(map(str, tensor.shape))
            table.add_row(markup(tensor.name), shape, f"{tensor.density:.2%}", str(tensor.dead_rows))
    return table
