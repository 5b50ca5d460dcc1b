"""PEFT adapter folders: which of their tensors belong together, how they scale, and their exact averages.

Plain tensors (IA3 vectors, MiSS blocks, biases, whole modules, prompts) are averaged as they are. The two factors of a
LoRA module are averaged together, as the update that they stand for.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith.average.checkpoints import RunCheckpoint
from weightsmith.average.low_rank import best_of_rank, covariance_gap, stacked
from weightsmith.average.sources import Place, narrowed, whole
from weightsmith.average.stream import Mean
from weightsmith.core.errors import UsageError, brief, reason
from weightsmith.core.json_files import read_json
from weightsmith.core.patterns import compile_pattern

LoraMode = Literal["svd", "cat", "factors", "dense"]
Config = dict[str, Any]

_FACTOR = re.compile(r"^(.+)\.lora_(embedding_)?(A|B)(\.weight)?$")
_LINEAR = frozenset(
    {"IA3", "MISS", "BONE", "LN_TUNING", "PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"}
    | {"TRAINABLE_TOKENS"}
)
"""Adapters whose effect is their tensors themselves: their plain average is exact."""
_FROM_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations that also change the base weights, by the adapter's rank and scaling."""
_NOT_DENSE = ("layer_replication", "alora_invocation_tokens")
"""Settings by which an adapter's modules are not those of the base model's files, or do not always act."""
_SAME = (
    "target_parameters",
    *_NOT_DENSE,
    "peft_type",
    "base_model_name_or_path",
    "target_modules",
    "use_dora",
    "fan_in_fan_out",
    "bias",
    "lora_bias",
)
_CONFIG = {
    "peft_type?": (str, None),
    "lora_alpha?": float,
    "alpha_pattern?": ({str: float}, None),
    "rank_pattern?": ({str: int}, None),
    "target_modules?": ([str], str, None),
}
_SCALING = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora")


@dataclass(frozen=True, slots=True)
class Pair:
    """The two factors of one LoRA module.

    Attributes:
        module: Its name in the base model.
        a: Name of the tensor ``A (r, in)``, ``(r, in, kernel...)`` or, of an embedding, ``(r, rows)``.
        b: Name of the tensor ``B (out, r)``, ``(out, r, 1, ...)`` or, of an embedding, ``(width, r)``.
        embedding: Whether it adapts an embedding.
    """

    module: str
    a: str
    b: str
    embedding: bool

    @property
    def bias(self) -> str:
        """Name of the tensor ``(out,)`` that adapters with ``lora_bias`` have as well."""
        return self.b.removesuffix("weight") + "bias"


@dataclass(frozen=True, slots=True)
class Adapters:
    """The adapters of several checkpoints, oldest first, found to have equal configurations.

    Attributes:
        configs: ``adapter_config.json`` of each.
        places: Tensors of each, by name.
        pairs: LoRA modules, by the name of their ``A``.
        discarded: Filled by `pieces`: share of a module's update that its rank cannot hold.
    """

    configs: list[Config]
    places: list[dict[str, Place]]
    pairs: dict[str, Pair]
    discarded: dict[str, float] = field(default_factory=dict)

    def scale(self, index: int, pair: Pair) -> float:
        """What checkpoint ``index`` multiplies a module's ``B A`` by: ``alpha / r``, or ``alpha / sqrt(r)``."""
        config, rank = self.configs[index], self.places[index][pair.a].shape[0]
        patterns: Mapping[str, float] = config.get("alpha_pattern") or {}
        where = f"alpha_pattern in {self.places[index][pair.a].file.parent / 'adapter_config.json'}"
        matches = (a for key, a in patterns.items() if compile_pattern(rf"(.*\.)?({key})", where)(pair.module))
        alpha = next(matches, config.get("lora_alpha", 8))
        if not math.isfinite(alpha):
            raise UsageError(f"{where} and lora_alpha must be finite, got {alpha} for {brief(pair.module)}")
        return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)

    def factors(self, pair: Pair) -> tuple[list[Tensor], list[Tensor]]:
        """Read a module's factors as matrices ``(r_i, in)`` and ``(out, r_i)``, in float32 at least."""
        a = [_wide(whole(places[pair.a])).flatten(1) for places in self.places]
        b = [_wide(whole(places[pair.b])).flatten(1) for places in self.places]
        return a, b

    def product(self, pair: Pair, shares: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Write a module's average update exactly, as ``A (R, in)`` and ``B (out, R)`` with scaling 1."""
        a, b = self.factors(pair)
        return stacked(a, b, [share * self.scale(index, pair) for index, share in enumerate(shares)])

    def gaps(self, shares: Sequence[float]) -> dict[str, float]:
        """Measure per module what averaging the factors loses, see `covariance_gap`."""
        return {pair.module: covariance_gap(*self.factors(pair), shares) for pair in self.pairs.values()}

    def rank(self, mode: LoraMode, rank: int | None) -> int:
        """The rank of the merged adapter: the same for all modules, so that its configuration is plain."""
        ranks = [[places[pair.a].shape[0] for places in self.places] for pair in self.pairs.values()]
        return max(sum(of_one) for of_one in ranks) if mode == "cat" else rank or max(max(of_one) for of_one in ranks)

    def layout(self, mode: LoraMode, rank: int, mean: Mean) -> dict[str, tuple[torch.dtype, tuple[int, ...]]]:
        """Dtypes and shapes of the merged adapter, a module's factors next to each other, wide dtypes first."""
        newest = self.places[-1]
        seconds = {pair.b for pair in self.pairs.values()}
        layout = {}
        # wide dtypes first keeps every tensor aligned in the file
        for name in sorted(newest.keys() - seconds, key=lambda name: (-mean.dtype_of(newest[name]).itemsize, name)):
            dtype, shape = mean.dtype_of(newest[name]), newest[name].shape
            pair = self.pairs.get(name)
            if pair is None:
                layout[name] = (dtype, shape)
                continue
            up = newest[pair.b].shape
            layout[pair.a] = (dtype, (rank, *shape[1:]) if mode != "factors" else shape)
            layout[pair.b] = (dtype, (up[0], rank, *up[2:]) if mode != "factors" else up)
        return layout

    def pieces(
        self,
        layout: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        mode: LoraMode,
        rank: int,
        shares: Sequence[float],
        mean: Mean,
    ) -> Iterator[Tensor]:
        """Average tensor by tensor in the order of the layout; a LoRA module gives its two factors at once."""
        exact = mode != "factors"
        seconds = {pair.b for pair in self.pairs.values()} if exact else set()
        biases = {pair.bias: pair for pair in self.pairs.values()} if exact else {}
        for name, (dtype, _) in layout.items():
            if name in seconds:
                continue
            pair = self.pairs.get(name) if exact else None
            if pair is not None:
                a, b = self.product(pair, shares)
                if mode == "svd":
                    try:
                        a, b, self.discarded[pair.module] = best_of_rank(a, b, rank)
                    except torch.linalg.LinAlgError as error:  # type: ignore[attr-defined]
                        raise UsageError(f"the update of {brief(pair.module)} is too large: {reason(error)}") from error
                short = rank - len(a)
                yield narrowed(torch.nn.functional.pad(a, (0, 0, 0, short)), dtype, pair.a).contiguous()
                yield narrowed(torch.nn.functional.pad(b, (0, short)), dtype, pair.b).contiguous()
            elif name in biases:
                yield narrowed(self.bias(biases[name], shares), dtype, name)
            else:
                yield from mean.pieces(name, [places[name] for places in self.places])

    def bias(self, pair: Pair, shares: Sequence[float]) -> Tensor:
        """Average what a module adds to the bias, ``sum_i w_i s_i b_i``, with scaling 1."""
        scaled = [
            _wide(whole(places[pair.bias])) * (share * self.scale(index, pair))
            for index, (places, share) in enumerate(zip(self.places, shares, strict=True))
        ]
        return torch.stack(scaled).sum(0)

    def merged_config(self, mode: LoraMode, rank: int) -> Config:
        """``adapter_config.json`` of the merged adapter."""
        newest = self.configs[-1]
        if mode == "factors" or not self.pairs:
            return newest
        plain = {"r": rank, "lora_alpha": rank, "use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
        return {**newest, **plain}


def open_adapters(
    checkpoints: Sequence[RunCheckpoint], places: list[dict[str, Place]], mode: LoraMode
) -> tuple[Adapters, str | None]:
    """Find what adapters consist of, and refuse what cannot be averaged in this mode.

    Args:
        checkpoints: Adapter folders, oldest first.
        places: Their tensors.
        mode: How LoRA modules will be averaged.

    Returns:
        The adapters, and a caveat that the user should read, or ``None``.

    Raises:
        UsageError: Their configurations differ, or this kind of adapter does not allow the mode.
    """
    configs = [read_json(checkpoint.path / "adapter_config.json", _CONFIG) for checkpoint in checkpoints]
    _check_configs(checkpoints, configs, _SAME + (_SCALING if mode == "factors" else ()))
    newest = configs[-1]
    kind = str(newest.get("peft_type"))
    on_parameters = bool(newest.get("target_parameters"))  # whose factors are stacks, an expert after the other
    plain_lora = kind == "LORA" and not newest.get("use_dora") and not on_parameters
    caveat = None
    if kind == "LORA" and mode == "dense" and (found_key := next(filter(newest.get, _NOT_DENSE), None)):
        raise UsageError(f"lora_mode 'dense' cannot merge adapters with {found_key}: take 'svd' or 'factors'")
    if not plain_lora and kind not in _LINEAR and mode != "dense":
        name = "DoRA" if newest.get("use_dora") else "LoRA with target_parameters" if on_parameters else kind
        if mode != "factors":
            raise UsageError(
                f"lora_mode must be 'factors' (approximate) or 'dense' (exact) for {brief(name)} adapters, got {mode!r}"
            )
        caveat = f"{name} adapters are not linear in their tensors, so this average is approximate; 'dense' is exact"
    start = newest.get("init_lora_weights")
    if plain_lora and isinstance(start, str) and start.startswith(_FROM_BASE):
        if mode in ("svd", "cat"):
            raise UsageError(
                f"lora_mode must be 'factors' or 'dense' for adapters initialized by {brief(start)}, got {mode!r}: "
                "PEFT changes the base weights by their rank and scaling, which this mode replaces"
            )
        caveat = (
            f"adapters initialized by {brief(start)} only fit the base weights that this initialization has changed"
        )
    pairs = _pairs(places[-1]) if plain_lora else {}
    adapters = Adapters(configs, places, pairs)
    for found, pair in product(places, pairs.values()):
        if pair.a not in found or pair.b not in found:
            continue  # which tensors they all must hold is checked elsewhere
        a, b = found[pair.a].shape, found[pair.b].shape
        if len(a) < 2 or len(b) < 2 or not a[0]:
            raise UsageError(
                f"{found[pair.a].file} is damaged: the factors of {brief(pair.module)} have shapes {a} and {b}"
            )
        if mode != "factors" and (a[0] != b[1] or math.prod(b[2:]) != 1):
            raise UsageError(
                f"lora_mode must be 'factors' for {brief(pair.module)}, a grouped convolution, got {mode!r}"
            )
    return adapters, caveat


def _pairs(places: Mapping[str, Place]) -> dict[str, Pair]:
    pairs = {}
    for name in places:
        match = _FACTOR.match(name)
        if match and match[3] == "A":
            partner = name.removesuffix(match[4] or "")[:-1] + "B" + (match[4] or "")
            if partner not in places:
                raise UsageError(f"{places[name].file} has {brief(name)} without {brief(partner)}")
            pairs[name] = Pair(base_name(match[1]), name, partner, embedding=bool(match[2]))
    return pairs


def base_name(name: str) -> str:
    """The name that a tensor or module of an adapter folder has in the base model."""
    return name.removeprefix("base_model.model.").replace(".base_layer.", ".")


def _check_configs(checkpoints: Sequence[RunCheckpoint], configs: Sequence[Config], keys: Sequence[str]) -> None:
    for checkpoint, config in zip(checkpoints, configs, strict=True):
        for key in keys:
            mine, newest = _comparable(config.get(key)), _comparable(configs[-1].get(key))
            if mine != newest:
                fix = "; lora_mode 'svd' or 'cat' allows that" if key in _SCALING else ""
                raise UsageError(
                    f"{checkpoint.path} and {checkpoints[-1].path} differ in {key}: {brief(mine)} and {brief(newest)}"
                    f"{fix}"
                )


def _comparable(value: Any) -> Any:
    return sorted(value, key=str) if isinstance(value, list) else value or None  # lists hold sets, absent means off


def _wide(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
