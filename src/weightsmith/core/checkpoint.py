"""Checkpoint folders in the safetensors layout that Hugging Face libraries read: streamed in, written atomically.

A folder holds ``model.safetensors``, or shards ``model-00001-of-00003.safetensors`` with an index
``model.safetensors.index.json`` that maps tensor names to shards. Tensors are read one at a time, so a checkpoint of
any size can be walked through in the memory of its largest tensor.
"""

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weightsmith.core.errors import UsageError, near
from weightsmith.core.files import folder_atomically, write_atomically

_NAME = "model"
_DEFAULT_SHARD_BYTES = 5 * 10**9


class Checkpoint(Mapping[str, Tensor]):
    """A checkpoint on disk as a read-only mapping from names to tensors; nothing is loaded until it is asked for.

    Args:
        path: A folder as described above, or one ``.safetensors`` file.

    Raises:
        UsageError: There is no checkpoint there, a shard is missing, or a file is damaged.

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
            return file.get_tensor(name)

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


def write_checkpoint(
    tensors: Mapping[str, Tensor] | Iterable[tuple[str, Tensor]],
    folder: Path | str,
    *,
    max_shard_bytes: int = _DEFAULT_SHARD_BYTES,
    files_from: Path | str | None = None,
) -> Path:
    """Write a checkpoint folder that appears whole or not at all; an existing one is replaced as a whole.

    Args:
        tensors: A state dict, or pairs that are made while they are written; one shard is held in memory.
            Tensors that share memory (tied weights) are written under every name.
        folder: The folder to make or replace.
        max_shard_bytes: Largest shard, in bytes of tensor data; a larger tensor gets a shard of its own.
        files_from: A folder whose other files (configuration, tokeniser) are copied along.

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
        if files_from is not None:
            _copy_others(Path(files_from), fresh)
        shards = [
            _save(fresh / f"{index}.part", shard) for index, shard in enumerate(_in_shards(pairs, max_shard_bytes))
        ]
        _name_shards(fresh, shards or [_save(fresh / "0.part", {})])
    return target


def _locate(path: Path) -> dict[str, Path]:
    if path.is_file():
        return _names(path)
    index = path / f"{_NAME}.safetensors.index.json"
    if index.is_file():
        try:
            weight_map: dict[str, str] = json.loads(index.read_text())["weight_map"]
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{index} is damaged: {error}") from error
        missing = sorted({shard for shard in weight_map.values() if not (path / shard).is_file()})
        if missing:
            raise UsageError(f"{path} lacks {', '.join(missing)}, which its index names")
        return {name: path / shard for name, shard in weight_map.items()}
    if not path.is_dir():
        raise UsageError(f"{path} is neither a folder nor a file")
    single = [path / f"{_NAME}.safetensors", *sorted(path.glob("*.safetensors"))]
    for candidate in single:
        if candidate.is_file():
            return _names(candidate)
    pickles = sorted(found.name for found in path.glob("*.bin"))
    hint = f"; convert {pickles[0]} first (load it, then save_pretrained writes safetensors)" if pickles else ""
    raise UsageError(f"{path} holds no .safetensors file{hint}")


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="pt")
    except SafetensorError as error:
        raise UsageError(f"{path} is damaged or no safetensors file: {error}") from error


def _names(path: Path) -> dict[str, Path]:
    with _open(path) as file:
        return dict.fromkeys(file.keys(), path)


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


def _copy_others(source: Path, target: Path) -> None:
    for path in source.iterdir():
        if path.is_file() and path.suffix not in {".safetensors", ".bin"} and not path.name.endswith(".index.json"):
            shutil.copy2(path, target / path.name)
