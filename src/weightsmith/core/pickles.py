"""Tensors out of ``.bin`` files, by one policy: only when asked for, plain tensors and nothing else, no expansion."""

import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, brief, reason
from weightsmith.core.files import check_plain_name, say_where_link_leads
from weightsmith.core.json_files import read_json

_MOST_TIMES = 8
"""Bytes of tensors per byte of the file: tied weights are stored once, and have up to about four names."""
_FREE_BYTES = 64 * 2**20


def read_pickle(file: Path, *, allow_pickle: bool) -> dict[str, Tensor]:
    """Read a state dict that ``torch.save`` has written; no code in it is run.

    Args:
        file: The file; new ones are mapped into memory, those of torch before 1.6 are read as a whole.
        allow_pickle: Whether the user has asked for such files to be read.

    Raises:
        UsageError: ``allow_pickle`` is false, or the file is damaged, or holds something else than tensors by name, or
            tensors that would take far more memory than the file (by strides of 0, or under many names).
    """
    if not allow_pickle:
        raise UsageError(f"{file} is a pickle; allow_pickle=True (--allow-pickle) reads plain tensors from it")
    if not file.is_file():
        raise UsageError(f"{file} is not a file")
    say_where_link_leads(file)
    try:
        zipped = _is_plain_zip(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:  # damaged pickles fail in any way
        raise UsageError(f"{file} cannot be read as plain tensors: {reason(error)}") from error
    _check_state(file, state)
    return {name: tensor.detach() for name, tensor in state.items()}  # parameters are pickled as such


def read_pickles(folder: Path, stem: str, *, allow_pickle: bool) -> dict[str, tuple[Path, Tensor]]:
    """Read a folder's ``<stem>.bin``, or the shards that ``<stem>.bin.index.json`` names.

    Args:
        folder: The folder.
        stem: ``"pytorch_model"`` or ``"adapter_model"``.
        allow_pickle: Whether the user has asked for such files to be read.

    Returns:
        Tensors with the files that they are in, by name.

    Raises:
        UsageError: See `read_pickle`; or the index does not fit the files, or there are none.
    """
    single, index = folder / f"{stem}.bin", folder / f"{stem}.bin.index.json"
    if single.is_file() or not index.is_file():
        if not single.exists():
            raise UsageError(f"{folder} holds neither {single.name} nor {index.name}")
        return {name: (single, tensor) for name, tensor in read_pickle(single, allow_pickle=allow_pickle).items()}
    weight_map: dict[str, str] = read_json(say_where_link_leads(index), {"weight_map": {str: str}})["weight_map"]
    files = {name: folder / check_plain_name(name, index) for name in weight_map.values()}
    held = {name: read_pickle(file, allow_pickle=allow_pickle) for name, file in files.items()}
    for name, file_name in weight_map.items():
        if name not in held[file_name]:
            raise UsageError(
                f"{index} says that {file_name} holds {brief(name)}, which it does not: the folder is damaged"
            )
    return {name: (files[file_name], held[file_name][name]) for name, file_name in weight_map.items()}


def _is_plain_zip(file: Path) -> bool:
    if not zipfile.is_zipfile(file):
        return False
    with zipfile.ZipFile(file) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise ValueError(f"{packed[0]} is compressed, which torch.save does not do")
    return True


def _check_state(file: Path, state: object) -> None:
    if not isinstance(state, Mapping):
        raise UsageError(f"{file} must hold tensors by name, got a {type(state).__name__}")
    total = 0
    for name, tensor in state.items():
        if not isinstance(name, str) or not isinstance(tensor, Tensor):
            raise UsageError(f"{file} must hold tensors by name, got {type(tensor).__name__} under {brief(name)}")
        if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
            raise UsageError(f"{brief(name)} in {file} must be a plain tensor, got {tensor.layout} on {tensor.device}")
        total += tensor.numel() * tensor.element_size()
        if total > _MOST_TIMES * file.stat().st_size + _FREE_BYTES:
            raise UsageError(
                f"the tensors in {file} would take more than {total >> 20} MiB, the file has "
                f"{file.stat().st_size >> 20}: it is damaged or made to fill the memory"
            )
