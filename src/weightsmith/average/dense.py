"""Averages of adapters, added to the base model's weights: a full model comes out."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightsmith.average.adapters import Adapters, Pair, base_name
from weightsmith.average.checkpoints import RunCheckpoint
from weightsmith.average.sources import Place, narrowed, open_places, whole
from weightsmith.average.stream import Mean
from weightsmith.core.errors import UsageError, near, reason, require
from weightsmith.core.json_files import read_json
from weightsmith.core.patterns import compile_pattern
from weightsmith.core.pretrained import load_pretrained, model_class


class Dense:
    """The base model's tensors plus ``sum_i w_i s_i B_i A_i``, piece by piece.

    Args:
        base: The base model's tensors.
        adapters: Plain LoRA adapters; whole modules and biases that were saved with them replace the base's.
        shares: Weights of sum 1, oldest first.
        mean: Averages those.
        chunk_mb: Memory for the rows of one piece.

    Raises:
        UsageError: The base model lacks a tensor that the adapters change.
    """

    def __init__(
        self, base: Mapping[str, Place], adapters: Adapters, shares: Sequence[float], mean: Mean, chunk_mb: float
    ) -> None:
        self._base, self._adapters, self._shares, self._mean = base, adapters, shares, mean
        self._elements = max(1, int(chunk_mb * 2**20) // 16)
        self._updates = {f"{pair.module}.weight": pair for pair in adapters.pairs.values()}
        self._biases = {f"{p.module}.bias": p for p in adapters.pairs.values() if p.bias in adapters.places[-1]}
        factors = {name for pair in adapters.pairs.values() for name in (pair.a, pair.b, pair.bias)}
        saved = {base_name(name): name for name in adapters.places[-1] if name not in factors}
        # PEFT saves a frozen embedding along with its update: the base model has that already
        self._replaced = {name: key for name, key in saved.items() if name not in self._updates}
        for name in (*self._updates, *self._biases, *self._replaced):
            if name not in base:
                raise UsageError(
                    f"the base model has no tensor {name!r}, which the adapters change; {near(name, base)}"
                )

    def dtype_of(self, place: Place) -> torch.dtype:
        """What a tensor is written as."""
        return self._mean.dtype_of(place)

    def pieces(self, name: str, places: Sequence[Place]) -> Iterator[Tensor]:
        """Give the merged model's tensor ``name`` piece by piece."""
        (place,) = places
        if name in self._replaced:
            key = self._replaced[name]
            for piece in self._mean.pieces(key, [found[key] for found in self._adapters.places]):
                yield narrowed(piece, self.dtype_of(place), name)
        elif name in self._updates:
            yield from self._updated(name, place, self._updates[name])
        elif name in self._biases:
            sums = whole(place).float() + self._adapters.bias(self._biases[name], self._shares)
            yield narrowed(sums, self.dtype_of(place), name)
        else:
            yield from Mean([1.0], dtype=self.dtype_of(place), chunk_mb=16 * self._elements / 2**20).pieces(
                name, [place]
            )

    def _updated(self, name: str, place: Place, pair: Pair) -> Iterator[Tensor]:
        a, b = self._adapters.product(pair, self._shares)
        if pair.embedding or self._adapters.configs[-1].get("fan_in_fan_out"):
            a, b = b.T, a.T  # these weights are stored as (in, out)
        if (b.shape[0], a.shape[1]) != (place.shape[0], math.prod(place.shape[1:])):
            raise UsageError(
                f"{pair.module} has updates of shape {(b.shape[0], a.shape[1])} for weights of shape {place.shape}"
            )
        width = a.shape[1]
        rows = max(1, self._elements // width)
        for first in range(0, len(b), rows):
            some = b[first : first + rows]
            weights = torch.empty(len(some) * width, dtype=place.dtype)
            place.read(weights, first * width)
            sums = torch.addmm(weights.view(-1, width).to(a.dtype), some, a)
            yield narrowed(sums, self.dtype_of(place), name)


def merged_by_peft(
    base: Path, checkpoints: Sequence[RunCheckpoint], shares: Sequence[float], *, allow_pickle: bool = False
) -> Any:
    """Average the models that adapters of any kind make of the base model; PEFT merges each of them.

    Args:
        base: Folder of the base model.
        checkpoints: Adapter folders.
        shares: Weights of sum 1.
        allow_pickle: Also read ``.bin`` files.

    Returns:
        A ``transformers`` model.
    """
    peft = require("peft", extra="hf", purpose="dense averages of adapters other than plain LoRA")
    transformers = require("transformers", extra="hf", purpose="dense averages of adapters other than plain LoRA")
    open_places(RunCheckpoint(base, 0, "model"), allow_pickle=allow_pickle)  # before transformers follows any index
    names = read_json(base / "config.json").get("architectures")
    loader = model_class(base, names) if names else transformers.AutoModel
    total: dict[str, Tensor] = {}
    for checkpoint, share in zip(checkpoints, shares, strict=True):
        open_places(checkpoint, allow_pickle=allow_pickle)
        model = load_pretrained(loader, base)
        try:
            config = peft.PeftConfig.from_pretrained(checkpoint.path)
            _spell_out_(config, [name for name, _ in model.named_modules()], checkpoint.path / "adapter_config.json")
            model = peft.PeftModel.from_pretrained(model, checkpoint.path, config=config).merge_and_unload()
        except (UsageError, ImportError, MemoryError):
            raise
        except Exception as error:  # what a damaged folder leads to in there can be anything
            raise UsageError(f"PEFT cannot load {checkpoint.path}: {reason(error)}") from error
        for name, tensor in model.state_dict().items():
            if tensor.is_floating_point():
                wide = tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32))
                total[name] = total[name].add_(wide, alpha=share) if name in total else wide * share
    model.load_state_dict(total, strict=False)
    return model


def cast_(model: Any, dtype: torch.dtype) -> Any:
    """Cast a model whose values are finite, in place, or say that the dtype cannot hold them."""
    largest = {name: tensor.abs().max() for name, tensor in model.state_dict().items() if tensor.numel()}
    for name, value in largest.items():
        if value.is_floating_point():
            narrowed(value, dtype, name)
    return model.to(dtype)


def _spell_out_(config: Any, modules: Sequence[str], where: Path) -> None:
    """Replace patterns by names, so that PEFT does not match untrusted patterns, which can take forever."""
    for key in ("target_modules", "exclude_modules"):
        pattern = getattr(config, key, None)
        if isinstance(pattern, str) and pattern != "all-linear":
            matches = compile_pattern(pattern, f"{key} in {where}")
            setattr(config, key, {name for name in modules if matches(name)})
    for key in ("rank_pattern", "alpha_pattern"):
        spelled: dict[str, Any] = {}
        for pattern, value in (getattr(config, key, None) or {}).items():
            matches = compile_pattern(rf"(.*\.)?({pattern})", f"{key} in {where}")
            for name in modules:
                if matches(name):
                    spelled.setdefault(f"^{re.escape(name)}", value)
        if hasattr(config, key):
            setattr(config, key, spelled)
