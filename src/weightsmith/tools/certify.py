"""``weightsmith certify``: for how many examples of a data set a classifier's robustness is proved."""

import csv
import importlib
import inspect
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import tyro
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from weightsmith.certify import BoundOptions, VerifiedError, add_batchnorm_, verified_error
from weightsmith.certify.bounding import Method, Rounding
from weightsmith.core.display import markup
from weightsmith.core.errors import UsageError, reason, require
from weightsmith.core.files import check_target, file_atomically, write_atomically
from weightsmith.core.graph import UnsupportedOperation
from weightsmith.core.load import load_object
from weightsmith.lab.data.image_sets import load_images
from weightsmith.lab.data.images import Images
from weightsmith.lab.models import build_model
from weightsmith.lab.tasks.scoring import load_weights
from weightsmith.tools.onnx_network import read_onnx

_SUFFIXES = (".csv", ".parquet")


def certify(
    model: tyro.conf.Positional[str],
    /,
    *,
    data: str,
    eps: float,
    method: Method = "ibp",
    architecture: str = "",
    checkpoint: str = "",
    batchnorm: bool = False,
    data_dir: Path | None = None,
    split: Literal["test", "validation", "train"] = "test",
    examples: int | None = None,
    size: int | None = None,
    columns: tuple[str, ...] = (),
    subset: str = "",
    mean: tuple[float, ...] = (),
    std: tuple[float, ...] = (),
    normalize: Literal["no", "data"] = "no",
    attack_steps: int = 40,
    restarts: int = 1,
    rounding: Rounding = "nearest",
    precision: Literal["auto", "float32", "float64"] = "auto",
    batch_size: int = 128,
    device: str = "cpu",
    seed: int = 0,
    out: Annotated[Path | None, tyro.conf.arg(metavar="MARGINS.csv|MARGINS.parquet")] = None,
    console: tyro.conf.Suppress[Console | None] = None,
) -> int:
    """Print a classifier's standard, PGD and verified error on images whose pixels may change by eps.

    Verified means: for no change of the pixels by at most eps, within [0, 1], the label is another one. PGD is an
    attack: the true error over all such changes lies between the two.

    Args:
        model: A state dict (.safetensors or .pt, with --architecture), an .onnx file, or module:function or
            file.py:function that returns a network.
        data: Images: a name (digits, mnist, cifar10 ...), a file, a folder or a hub id.
        eps: Largest change of a pixel, where pixels lie between 0 and 1.
        method: How bounds are found, from cheap to tight (usually).
        architecture: Of a state dict: a name (cnn7, small_cnn, resnet18 ...) or module:function.
        checkpoint: A state dict for the network that module:function returns.
        batchnorm: Weights are of a network that CertifiedTraining put batch norm into.
        data_dir: Folder with data sets by name, searched first (or set WEIGHTSMITH_DATA).
        split: Which rows of the data.
        examples: Use this many rows; all by default.
        size: Side in pixels to resize to.
        columns: Names of the columns of images and of labels; usual names are found.
        subset: Configuration of a hub data set.
        mean: What the network expects to be subtracted from pixels, per channel.
        std: What it expects them to be divided by, per channel.
        normalize: data: the mean and deviation of the training pixels, as models get that weightsmith run trains.
        attack_steps: Steps of the attack; 0: none.
        restarts: Random starts of the attack.
        rounding: outward: compute in float64 and widen bounds by their rounding errors (ibp only).
        precision: What bounds are computed in; auto: float32, or float64 for such a network.
        batch_size: Examples at a time.
        device: Where to compute.
        seed: Of the attack's random starts.
        out: Write a row per example: label, prediction, smallest margin, whether it is verified, whether attacked.
        console: Where the table is printed.
    """
    console = console or Console()
    if out is not None:
        if out.suffix not in _SUFFIXES:
            raise UsageError(f"--out must end in .csv or .parquet, got {str(out)!r}")
        check_target(out, [Path(model)] if Path(model).exists() else [])
        if out.suffix == ".parquet":
            require("pyarrow", extra="hf", purpose="Parquet files (or give --out a name that ends in .csv)")
    if batch_size < 1:
        raise UsageError(f"--batch-size must be at least 1, got {batch_size}")
    if normalize == "data" and (mean or std):
        raise UsageError("--normalize data takes mean and std from the data: leave --mean and --std")
    images = load_images(
        data, test_examples=examples if split == "test" else None, size=size, columns=columns, subset_name=subset,
        data_dir=data_dir,
    )  # fmt: skip
    network = _network(model, architecture, checkpoint, batchnorm, images).to(device)
    shift, scale = _normalization(images, mean, std, normalize)
    found = verified_error(
        network,
        _batches(images, split, examples, batch_size, shift, scale),
        eps,
        method=method,
        lower=-shift / scale,
        upper=(1 - shift) / scale,
        std=scale.flatten(),
        attack_steps=attack_steps,
        restarts=restarts,
        generator=torch.Generator(device).manual_seed(seed),
        options=BoundOptions(rounding=rounding, dtype=None if precision == "auto" else getattr(torch, precision)),
    )
    if out is not None:
        _write(found, out)
    console.print(_table(found, data, split, eps))
    if out is not None:
        console.print(f"\nMargins: {markup(out.resolve())}", soft_wrap=True, highlight=False)
    return 0


def _network(model: str, architecture: str, checkpoint: str, batchnorm: bool, images: Images) -> nn.Module:
    shape: dict[str, Any] = {"channels": images.channels, "size": images.size, "classes": images.classes}
    path = Path(model)
    if path.suffix == ".onnx":
        return _from_onnx(path)
    if path.exists() and ":" not in model:
        if not architecture:
            raise UsageError(
                f"model {model!r} is a file of weights: --architecture names the network that they belong to"
            )
        return _loaded(build_model(architecture, **shape), model, batchnorm, images)
    if architecture:
        raise UsageError(f"model {model!r}: there is no such file; --architecture goes with a state dict")
    if ":" in model:
        made = load_object(model, "model")
        if callable(made) and not isinstance(made, nn.Module):
            takes = inspect.signature(made).parameters
            made = made(**{name: value for name, value in shape.items() if name in takes})
        if not isinstance(made, nn.Module):
            raise UsageError(f"model {model!r} must be or return a torch.nn.Module, got {type(made).__name__}")
        return _loaded(made, checkpoint, batchnorm, images)
    raise UsageError(f"model {model!r} is neither a file nor module:function; a state dict also needs --architecture")


def _loaded(network: nn.Module, weights: str, batchnorm: bool, images: Images) -> nn.Module:
    if batchnorm:
        add_batchnorm_(network, torch.zeros(2, images.channels, images.size, images.size))
    return load_weights(network, weights)


def _from_onnx(path: Path) -> nn.Module:
    if not path.is_file():
        raise UsageError(f"model {str(path)!r}: there is no such file")
    try:
        return read_onnx(path)
    except UnsupportedOperation as error:
        try:
            onnx2torch: Any = importlib.import_module("onnx2torch")
            network: nn.Module = onnx2torch.convert(str(path))
        except ModuleNotFoundError:
            more = "pip install onnx2torch (it brings torchvision) may read it"
        except Exception as other:  # an operator that it does not know either
            more = f"onnx2torch cannot convert it either ({reason(other)})"
        else:
            return network
        raise UsageError(
            f"model {str(path)!r} has {error}, which is not read here: {more}; or give the network as module:function, "
            "or a state dict with --architecture"
        ) from error


def _normalization(images: Images, mean: tuple[float, ...], std: tuple[float, ...], kind: str) -> tuple[Tensor, Tensor]:
    """Mean and deviation ``(C, 1, 1)``."""
    if kind == "data":
        mean, std = images.mean, images.std
    for name, values in (("mean", mean), ("std", std)):
        if len(values) not in (0, 1, images.channels):
            raise UsageError(f"--{name} must be one number per channel, {images.channels}, got {len(values)}")
    if any(value <= 0 for value in std):
        raise UsageError(f"--std must be above 0, got {std}")
    shift = torch.tensor(mean or (0.0,)).expand(images.channels).view(-1, 1, 1)
    scale = torch.tensor(std or (1.0,)).expand(images.channels).view(-1, 1, 1)
    return shift, scale


def _batches(
    images: Images, split: str, examples: int | None, batch_size: int, shift: Tensor, scale: Tensor
) -> Iterator[tuple[Tensor, Tensor]]:
    part = getattr(images, split)
    count = len(part) if examples is None else min(examples, len(part))
    for at in torch.arange(count).split(batch_size):
        pixels = part.read(part.rows[at], None).float() / 255
        yield (pixels - shift) / scale, part.labels[at]


def _table(found: VerifiedError, data: str, split: str, eps: float) -> Table:
    count = len(found.certificates.labels)
    table = Table(title=f"{count:,} {split} images of {data}, eps {eps:g}", title_justify="left", box=None)
    table.add_column("error")
    table.add_column("%", justify="right")
    table.add_column("standard error", justify="right")
    rows: list[tuple[str, float | None]] = [
        ("standard", found.standard),
        ("PGD", found.attacked),
        (f"verified ({found.certificates.method})", float(found)),
    ]
    for name, value in rows:
        spread = 0.0 if value is None else (value * (1 - value) / count) ** 0.5
        shown = ("not run", "") if value is None else (f"{100 * value:.2f}", f"{100 * spread:.2f}")
        table.add_row(name, *shown)
    certificates = found.certificates
    if certificates.rounding == "outward":
        how = "rounding errors are included in the bounds"
    else:
        how = f"margins up to {certificates.tolerance.max().item():.1e} are left to rounding errors"
    table.caption, table.caption_justify = how, "left"
    return table


def _write(found: VerifiedError, out: Path) -> None:
    table = found.certificates
    columns: dict[str, list[Any]] = {
        "example": list(range(len(table.labels))),
        "label": table.labels.tolist(),
        "prediction": table.predictions.tolist(),
        "margin": table.margins.tolist(),
        "tolerance": table.tolerance.tolist(),
        "verified": table.verified.tolist(),
        "attacked": table.attacked.tolist(),
    }
    if out.suffix == ".csv":
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(zip(*columns.values(), strict=True))
        write_atomically(out, text.getvalue())
        return
    import pyarrow
    from pyarrow import parquet

    with file_atomically(out) as fresh:
        parquet.write_table(pyarrow.table(columns), fresh)
