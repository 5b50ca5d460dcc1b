"""Checkpoint files as tensors of which any piece can be read, whatever format they are in."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from weightsmith.average.checkpoints import RunCheckpoint, torch_files
from weightsmith.core.adapters import BONE_TENSORS, refuse_adapter_tensors
from weightsmith.core.checkpoint import Checkpoint
from weightsmith.core.errors import UsageError, brief
from weightsmith.core.json_files import read_json
from weightsmith.core.pickles import read_pickle, read_pickles

_QUANTIZED = ("qweight", "absmax", "quant_state", "SCB", "weight_packed")
_MOST = 5  # differences that an error lists


class Place(Protocol):
    """A tensor in a file."""

    @property
    def file(self) -> Path:
        """The file."""

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""

    def read(self, into: Tensor, first: int = 0) -> None:
        """Fill ``into (n,)`` with consecutive elements, from ``first`` on."""


@dataclass(frozen=True, slots=True)
class Pickled:
    """A tensor of a ``.bin`` file, mapped into memory."""

    file: Path
    tensor: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Of its elements."""
        return self.tensor.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        """Its shape."""
        return tuple(self.tensor.shape)

    def read(self, into: Tensor, first: int = 0) -> None:
        """Fill ``into (n,)`` with consecutive elements, from ``first`` on."""
        into.copy_(self.tensor.reshape(-1)[first : first + len(into)])


def whole(place: Place) -> Tensor:
    """Read a tensor, and make sure that it is finite."""
    flat = torch.empty(place.shape, dtype=place.dtype).view(-1)
    place.read(flat)
    return finite(flat.view(place.shape), place)


def finite(tensor: Tensor, place: Place, name: str = "") -> Tensor:
    """Pass a tensor on if it holds neither NaN nor infinity."""
    if tensor.is_floating_point() and not tensor.isfinite().all():
        raise UsageError(f"{name or 'a tensor'} in {place.file} holds NaN or infinity; leave that checkpoint out")
    return tensor


def narrowed(tensor: Tensor, dtype: torch.dtype, name: str) -> Tensor:
    """Cast finite values to the dtype that they are written as, or say that it cannot hold them."""
    cast = tensor.to(dtype)
    if cast.is_floating_point() and not cast.isfinite().all():
        largest = tensor.abs().max().item()
        raise UsageError(
            f"{name} does not fit into {dtype}: its largest value is {largest:.3g}, dtype must hold up to that"
        )
    return cast


def open_places(checkpoint: RunCheckpoint, *, allow_pickle: bool = False) -> dict[str, Place]:
    """Find a checkpoint's tensors, in the order of their data.

    Args:
        checkpoint: Its folder; PEFT adapters are looked for in ``adapter_model.*``, Bone adapters in
            ``bone.safetensors``, models in ``model*.safetensors``.
        allow_pickle: Also open ``.bin`` files, or a single ``.pt`` or ``.pth`` one, with
            ``torch.load(weights_only=True)``.

    Raises:
        UsageError: There are none, they are damaged, quantized, or pickled without ``allow_pickle``; or a whole model
            has an adapter beside its weights.
    """
    path = checkpoint.path
    if checkpoint.kind == "bone":
        return {**Checkpoint(path / BONE_TENSORS).stored()}
    stem = "adapter_model" if checkpoint.kind == "adapter" else "pytorch_model"
    safe = path / "adapter_model.safetensors" if checkpoint.kind == "adapter" else path
    safe_exists = safe.is_file() if checkpoint.kind == "adapter" else any(path.glob("*.safetensors"))
    if not safe_exists and any(path.glob(f"{stem}*.bin")):
        found = read_pickles(path, stem, allow_pickle=allow_pickle)
        places: dict[str, Place] = {name: Pickled(file, tensor) for name, (file, tensor) in found.items()}
    elif checkpoint.kind == "model" and not safe_exists and len(torch_files(path)) == 1:
        (file,) = torch_files(path)
        places = {name: Pickled(file, tensor) for name, tensor in read_pickle(file, allow_pickle=allow_pickle).items()}
    else:
        places = {**Checkpoint(safe).stored()}
        _refuse_quantized(checkpoint, places)
    if checkpoint.kind == "model":
        refuse_adapter_tensors(path, places)
    return places


def check_same_tensors(
    sources: Sequence[Mapping[str, Place]], *, mixed_dtypes: bool = False, free: Sequence[str] = ()
) -> None:
    """Make sure that all checkpoints hold the same tensors.

    Args:
        sources: One per checkpoint, oldest first; the newest is what the others are compared with.
        mixed_dtypes: Let floating-point dtypes differ.
        free: Names whose shapes may differ.

    Raises:
        UsageError: They do not; the message lists the first differences.
    """
    newest = sources[-1]
    for source in sources[:-1]:
        differing = sorted(source.keys() ^ newest.keys())
        found = [f"{brief(name)} is only in {'one' if name in source else 'the newest'}" for name in differing]
        for name in newest.keys() & source.keys():
            mine, theirs = source[name], newest[name]
            if mine.shape != theirs.shape and name not in free:
                found.append(f"{brief(name)} has shapes {mine.shape} and {theirs.shape}")
            if mine.dtype != theirs.dtype and not (
                mixed_dtypes and mine.dtype.is_floating_point and theirs.dtype.is_floating_point
            ):
                found.append(
                    f"{brief(name)} is {mine.dtype} and {theirs.dtype} (dtype= converts floating-point tensors)"
                )
        if found:
            files = f"{next(iter(source.values())).file} and {next(iter(newest.values())).file}" if source else "files"
            more = f"; and {len(found) - _MOST} more" if len(found) > _MOST else ""
            raise UsageError(f"{files} do not match: " + "; ".join(sorted(found)[:_MOST]) + more)


def _refuse_quantized(checkpoint: RunCheckpoint, places: Mapping[str, Place]) -> None:
    config = checkpoint.path / "config.json"
    quantized = config.is_file() and "quantization_config" in read_json(config) and checkpoint.kind == "model"
    marked = [
        name
        for name, place in places.items()
        if name.rpartition(".")[2] in _QUANTIZED or (place.dtype.is_floating_point and place.dtype.itemsize == 1)
    ]
    if quantized or marked:
        what = f" ({marked[0]})" if marked else ""
        raise UsageError(f"{checkpoint.path} is quantized{what}: codes cannot be averaged; merge before quantizing")
