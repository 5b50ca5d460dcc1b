"""Checkpoint folders in the safetensors layout that Hugging Face libraries read: streamed in, written atomically.

A folder holds ``model.safetensors``, or shards ``model-00001-of-00003.safetensors`` with an index
``model.safetensors.index.json`` that maps tensor names to shards. Tensors are read one at a time, so a checkpoint of
any size can be walked through in the memory of its largest tensor; read and written in pieces, in that of a piece.
"""

import json
import math
import os
import re
import shutil
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weightsmith.core.errors import UsageError, brief, near, reason
from weightsmith.core.files import check_plain_name, folder_atomically, say_where_link_leads, write_atomically
from weightsmith.core.json_files import parse_json, read_json

_NAME = "model"
_DEFAULT_SHARD_BYTES = 5 * 10**9
_MOST_NAMED = 5
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
WEIGHT_FILES = frozenset({".safetensors", ".bin", ".pt", ".pth", ".h5", ".msgpack", ".gguf", ".onnx"})
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_DTYPE_NAMES = {dtype: name for name, dtype in _DTYPES.items()}


@dataclass(frozen=True, slots=True)
class Stored:
    """Where a tensor lies in a safetensors file: enough to read any piece of it.

    Attributes:
        file: The file.
        dtype: Of its elements.
        shape: Its shape.
        start: Byte of the file at which its data begins.
    """

    file: Path
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    def read(self, into: Tensor, first: int = 0) -> None:
        """Fill ``into`` with consecutive elements, in row-major order, through no other memory.

        Args:
            into: ``(n,)``, contiguous, of this dtype, on the CPU.
            first: Element to begin with.

        Raises:
            UsageError: The file ends too early.
        """
        with self.file.open("rb") as file:
            file.seek(self.start + first * self.dtype.itemsize)
            if file.readinto(into.view(torch.uint8).numpy().data) != into.nbytes:
                raise UsageError(f"{self.file} is damaged: it ends too early")

    def map(self) -> Tensor:
        """The whole tensor as a view of the file, in pages of its own that are copied when they are written to."""
        data = numpy.memmap(self.file, mode="c", offset=self.start, shape=self.dtype.itemsize * math.prod(self.shape))
        return torch.from_numpy(data).view(self.dtype).view(self.shape)


class Checkpoint(Mapping[str, Tensor]):
    """A checkpoint on disk as a read-only mapping from names to tensors; nothing is loaded until it is asked for.

    Args:
        path: A folder as described above, or one ``.safetensors`` file.

    Raises:
        UsageError: There is no checkpoint there, a file is damaged or missing, an index names files in other folders or
            tensors that its files do not hold.

    Warns:
        WeightsmithWarning: A file is a link out of its folder (those of the Hugging Face hub's cache are expected).

    Example:
        >>> for name, tensor in Checkpoint("my-model").items():  # doctest: +SKIP
        ...     print(name, tuple(tensor.shape))
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        self._shard = _locate(self.path)

    def __getitem__(self, name: str) -> Tensor:
        if name not in self._shard:
            raise KeyError(f"{name!r} is not in {self.path}; {near(name, self._shard)}")
        with _open(self._shard[name]) as file:
            try:
                tensor: Tensor = file.get_tensor(name)
                return tensor
            except (SafetensorError, RuntimeError, TypeError, ValueError) as error:  # of a dtype that torch lacks, say
                raise UsageError(f"{brief(name)} in {self._shard[name]} cannot be read: {reason(error)}") from error

    def __iter__(self) -> Iterator[str]:
        return iter(self._shard)

    def __len__(self) -> int:
        return len(self._shard)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Shapes by name, from the headers alone."""
        shapes: dict[str, tuple[int, ...]] = {}
        for shard in dict.fromkeys(self._shard.values()):
            with _open(shard) as file:
                shapes |= {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        return {name: shapes[name] for name in self}

    def stored(self) -> dict[str, Stored]:
        """Where each tensor lies, in the order of the data: file by file, from the headers alone.

        Raises:
            UsageError: A tensor has a dtype that is not known here.
        """
        found: dict[str, Stored] = {}
        for shard in dict.fromkeys(self._shard.values()):
            found |= {name: place for name, place in _places(shard).items() if self._shard.get(name) == shard}
        return found


def write_checkpoint(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    folder: Path | str,
    *,
    max_shard_bytes: int = _DEFAULT_SHARD_BYTES,
) -> Path:
    """Write a checkpoint folder that appears whole or not at all; an existing one is replaced as a whole.

    Args:
        tensors: A state dict, or pairs that are made while they are written; one shard is held in memory.
            Tensors that share memory (tied weights) are written under every name.
        folder: The folder to make or replace.
        max_shard_bytes: Largest shard, in bytes of tensor data; a larger tensor gets a shard of its own.

    Returns:
        ``folder``.

    Raises:
        ValueError: A name comes twice, or ``max_shard_bytes`` is not positive.
        OSError: It cannot be written or the disk is full; what was at ``folder`` is as it was.
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be positive, got {max_shard_bytes}")
    target = Path(folder)
    pairs = tensors.items() if isinstance(tensors, Mapping) else tensors
    with folder_atomically(target) as fresh:
        shards = [
            _save(fresh / f"{index}.part", shard) for index, shard in enumerate(_in_shards(pairs, max_shard_bytes))
        ]
        _name_shards(fresh, shards or [_save(fresh / "0.part", {})])
    return target


def write_pieces(
    path: Path, layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]], pieces: Iterable[Tensor]
) -> None:
    """Write one safetensors file piece by piece, in the memory of a piece, and see it onto the disk.

    Args:
        path: The file to write; make it inside `weightsmith.core.files.folder_atomically`.
        layout: Dtype and shape by name, in the order of the data.
        pieces: The tensors' elements in that order, in row-major order, cut anywhere; contiguous, on the CPU.

    Raises:
        ValueError: The pieces do not add up to the layout.
        OSError: It cannot be written or the disk is full.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, (dtype, shape) in layout.items():
        begin, end = end, end + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": _DTYPE_NAMES[dtype], "shape": list(shape), "data_offsets": [begin, end]}
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)  # data must begin at a multiple of 8
    written = 0
    with path.open("wb") as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for piece in pieces:
            written += file.write(piece.reshape(-1).view(torch.uint8).numpy().data)
        if written != end:
            raise ValueError(f"pieces must hold {end} bytes, as the layout says, got {written}")
        file.flush()
        os.fsync(file.fileno())


def copy_other_files(source: Path, target: Path, *, but: Collection[str] = ()) -> None:
    """Copy what is neither weights nor in ``target`` yet: configuration, tokenizer, processor, license.

    Args:
        source: A model's folder.
        target: An existing folder.
        but: Names of files to leave out.
    """
    for path in source.iterdir():
        skip = path.suffix in WEIGHT_FILES or path.name.endswith(".index.json") or path.name in but
        if path.is_file() and not skip and not (target / path.name).exists():
            shutil.copyfile(say_where_link_leads(path), target / path.name)


def _locate(path: Path) -> dict[str, Path]:
    if path.is_file():
        return _names(path)
    index, single = path / f"{_NAME}.safetensors.index.json", path / f"{_NAME}.safetensors"
    if single.is_file():  # before an index, which an earlier save in shards may have left: as from_pretrained does
        return _names(single)
    if index.is_file():
        return _indexed(index)
    if not path.is_dir():
        raise UsageError(f"{path} is neither a folder nor a file")
    found = sorted(path.glob("*.safetensors"))
    if found:
        if _SHARD.search(found[0].name):
            raise UsageError(f"{path} holds {found[0].name}, which is a part of a model, and no {index.name}")
        if len(found) > 1:
            names = ", ".join(file.name for file in found[:_MOST_NAMED])
            raise UsageError(
                f"{path} holds {names}: which of them is the model? Name it {single.name}, or give the file"
            )
        return _names(found[0])
    pickles = sorted(found.name for found in path.glob("*.bin"))
    hint = f"; convert {pickles[0]} first (load it, then save_pretrained writes safetensors)" if pickles else ""
    raise UsageError(f"{path} holds no .safetensors file{hint}")


def _indexed(index: Path) -> dict[str, Path]:
    weight_map: dict[str, str] = read_json(say_where_link_leads(index), {"weight_map": {str: str}})["weight_map"]
    shards = {shard: index.parent / check_plain_name(shard, index) for shard in weight_map.values()}
    missing = sorted(name for name, shard in shards.items() if not shard.is_file())
    if missing:
        raise UsageError(f"{index.parent} lacks {', '.join(missing[:_MOST_NAMED])}, which its index names")
    held = {name: _names(shard) for name, shard in shards.items()}
    for name, shard in weight_map.items():
        if name not in held[shard]:
            raise UsageError(f"{index} says that {shard} holds {brief(name)}, which it does not: the folder is damaged")
    return {name: shards[shard] for name, shard in weight_map.items()}


def _open(path: Path) -> safe_open:
    if not path.is_file():
        raise UsageError(f"{path} must be a file")
    try:
        return safe_open(say_where_link_leads(path), framework="pt")
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged or no safetensors file: {reason(error)}") from error


def _names(path: Path) -> dict[str, Path]:
    with _open(path) as file:
        return dict.fromkeys(file.keys(), path)


def _places(path: Path) -> dict[str, Stored]:
    _names(path)  # whether the file is whole is checked there
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = parse_json(file.read(size), path, {str: dict})
    header.pop("__metadata__", None)
    places = {}
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"][0]):
        if entry["dtype"] not in _DTYPES:
            raise UsageError(f"{brief(name)} in {path} has dtype {entry['dtype']}; known: {', '.join(_DTYPES)}")
        if max(entry["shape"], default=0) >= 2**48:  # possible where another size is 0
            raise UsageError(f"{brief(name)} in {path} has shape {brief(entry['shape'])}, which is too large")
        start = 8 + size + entry["data_offsets"][0]
        places[name] = Stored(path, _DTYPES[entry["dtype"]], tuple(entry["shape"]), start)
    return places


def _in_shards(pairs: Iterable[tuple[str, Tensor]], most: int) -> Iterator[dict[str, Tensor]]:
    shard: dict[str, Tensor] = {}
    seen: set[str] = set()
    size = 0
    for name, tensor in pairs:
        if name in seen:
            raise ValueError(f"tensor {name!r} comes twice")
        seen.add(name)
        if shard and size + tensor.nbytes > most:
            yield shard
            shard, size = {}, 0
        shard[name] = tensor
        size += tensor.nbytes
    if shard:
        yield shard


def _save(path: Path, shard: dict[str, Tensor]) -> tuple[Path, dict[str, int]]:
    unshared: dict[str, Tensor] = {}
    owners: set[int] = set()
    for name, tensor in shard.items():
        storage = tensor.untyped_storage().data_ptr()
        unshared[name] = tensor.detach().clone() if storage in owners else tensor.detach().contiguous()
        owners.add(storage)
    save_file(unshared, path, metadata={"format": "pt"})
    return path, {name: tensor.nbytes for name, tensor in shard.items()}


def _name_shards(folder: Path, shards: list[tuple[Path, dict[str, int]]]) -> None:
    if len(shards) == 1:
        shards[0][0].rename(folder / f"{_NAME}.safetensors")
        return
    weight_map: dict[str, str] = {}
    for index, (path, sizes) in enumerate(shards, start=1):
        name = f"{_NAME}-{index:05d}-of-{len(shards):05d}.safetensors"
        path.rename(folder / name)
        weight_map |= dict.fromkeys(sizes, name)
    total = sum(sum(sizes.values()) for _, sizes in shards)
    index_file = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_atomically(folder / f"{_NAME}.safetensors.index.json", json.dumps(index_file, indent=2) + "\n")
