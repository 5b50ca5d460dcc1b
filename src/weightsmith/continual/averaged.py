"""The state of an average: parameters side by side in flat buffers, so that a step takes few operations."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError

_LEAST = 2**18  # elements of a part
_PARTS = 4  # on a GPU: few large kernels, and buffers of a quarter of all parameters


@dataclass(slots=True, eq=False)
class Part:
    """Some parameters of one device and dtype.

    Attributes:
        names: Of the parameters.
        parameters: The live ones.
        average: ``(n,)``: all their averages.
        previous: ``(n,)``: their last finite gradients; ``None`` where the mode needs none.
        known: ``(p,)``: whether there is such a gradient.
        lag: ``(p,)``: distance of the live parameters from the average after the last step, for the paper's mode.
        alpha: ``(p,)``: the last averaging weights.
        skipped: ``(p,)``: steps in which something was not finite.
        counts: ``(p,)``: elements of every parameter.
        averages: Views of ``average``, in the parameters' shapes.
        gradients: Views of ``previous``, in the parameters' shapes; empty where there is none.
    """

    names: Sequence[str]
    parameters: list[Tensor]
    average: Tensor
    previous: Tensor | None
    known: Tensor
    lag: Tensor
    alpha: Tensor
    skipped: Tensor
    sizes: list[int] = field(init=False)
    counts: Tensor = field(init=False)
    averages: list[Tensor] = field(init=False)
    gradients: list[Tensor] = field(init=False)

    def __post_init__(self) -> None:
        self.sizes = [parameter.numel() for parameter in self.parameters]
        self.counts = torch.tensor(self.sizes, device=self.average.device)
        # made once: hundreds of views take as long as a tenth of a step
        self.averages = [view for _, view in self.views(self.average)]
        self.gradients = [] if self.previous is None else [view for _, view in self.views(self.previous)]

    @property
    def nbytes(self) -> int:
        """Bytes of the buffers."""
        return self.average.nbytes + (self.previous.nbytes if self.previous is not None else 0)

    def trainable(self) -> Tensor:
        """Which parameters take part, ``(p,)``: frozen ones keep their average."""
        return self._mask([p.requires_grad for p in self.parameters])

    def present(self) -> Tensor:
        """Which parameters have a gradient, ``(p,)``."""
        return self._mask([p.grad is not None for p in self.parameters])

    def _mask(self, flags: list[bool]) -> Tensor:
        # built from a number where it can be, because copying a list to a GPU waits for it
        device = self.average.device
        if len(set(flags)) == 1:
            return torch.full((len(flags),), flags[0], device=device)
        return torch.tensor(flags).to(device, non_blocking=True)

    def named(self) -> Iterator[tuple[str, Tensor]]:
        """Names and live parameters."""
        return zip(self.names, self.parameters, strict=True)

    def by_name(self, values: Tensor) -> Iterator[tuple[str, float]]:
        """Names and numbers."""
        return zip(self.names, values.tolist(), strict=True)

    def views(self, flat: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Names and parts of a flat buffer, in the parameters' shapes."""
        for name, parameter, values in zip(self.names, self.parameters, flat.split(self.sizes), strict=True):
            yield name, values.view(parameter.shape)

    def state(self) -> Iterator[tuple[str, dict[str, Tensor]]]:
        """What is stored of every parameter."""
        previous = dict(self.views(self.previous)) if self.previous is not None else {}
        for index, (name, average) in enumerate(self.views(self.average)):
            held = {"average": average.clone(), "lag": self.lag[index].clone(), "skipped": self.skipped[index].clone()}
            held["alpha"] = self.alpha[index].clone()
            if name in previous and bool(self.known[index]):
                held["gradient"] = previous[name].clone()
            yield name, held

    def load(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Take back what `state` gave."""
        gradients = dict(self.views(self.previous)) if self.previous is not None else {}
        for index, (name, average) in enumerate(self.views(self.average)):
            held = state[name]
            average.copy_(held["average"])
            self.lag[index], self.skipped[index], self.alpha[index] = held["lag"], held["skipped"], held["alpha"]
            self.known[index] = "gradient" in held
            if name in gradients:
                gradients[name].copy_(held.get("gradient", torch.zeros(())))


def parts_of(named: Sequence[tuple[str, Tensor]], *, mode: str, dtype: torch.dtype, cpu: bool) -> list[Part]:
    """Put parameters into parts by device and precision, on a GPU several, so that what a step allocates is small."""
    groups: dict[tuple[torch.device, torch.dtype], list[list[tuple[str, Tensor]]]] = {}
    total = sum(parameter.numel() for _, parameter in named)
    for name, parameter in named:
        device = torch.device("cpu") if cpu else parameter.device
        lists = groups.setdefault((device, torch.promote_types(parameter.dtype, dtype)), [[]])
        most = total if device.type == "cpu" else max(_LEAST, total // _PARTS)
        if lists[-1] and sum(p.numel() for _, p in lists[-1]) + parameter.numel() > most:
            lists.append([])
        lists[-1].append((name, parameter))
    return [_part(some, *key, mode) for key, lists in groups.items() for some in lists]


def _part(named: Sequence[tuple[str, Tensor]], device: torch.device, dtype: torch.dtype, mode: str) -> Part:
    names, parameters = zip(*named, strict=True)
    average = torch.cat([p.detach().reshape(-1).to(device=device, dtype=dtype) for p in parameters])
    count = len(names)
    exact = torch.float32 if device.type == "mps" else torch.float64
    zeros = torch.zeros(count, device=device, dtype=exact)
    return Part(
        names=names,
        parameters=list(parameters),
        average=average,
        previous=None if mode == "fixed" else torch.zeros_like(average),
        known=torch.zeros(count, dtype=torch.bool, device=device),
        lag=zeros.clone(),
        alpha=zeros.clone(),
        skipped=torch.zeros(count, dtype=torch.int64, device=device),
    )


def named_trainable(given: nn.Module | Iterable[Any]) -> Iterator[tuple[str, Tensor]]:
    """Names and trainable parameters, each storage once.

    Raises:
        TypeError: Something is not a parameter.
    """
    pairs: Iterable[Any] = given.named_parameters() if isinstance(given, nn.Module) else enumerate(given)
    seen: set[tuple[Any, ...]] = set()
    for name, item in pairs:
        if not isinstance(given, nn.Module) and isinstance(item, tuple) and len(item) == 2:
            name, item = item
        if not isinstance(item, Tensor):
            raise TypeError(f"params must hold parameters, or pairs of name and parameter, got {type(item).__name__}")
        if not item.requires_grad or not item.is_floating_point():
            continue
        key = (item.untyped_storage().data_ptr(), item.storage_offset(), item.shape, item.stride(), item.device)
        if item.numel() == 0 or (item.device.type != "meta" and key in seen):
            continue
        seen.add(key)
        yield str(name), item


def check_whole(name: str, parameter: Tensor) -> None:
    """Refuse what is not all here.

    Raises:
        UsageError: The parameter is sharded over processes, or has no values yet.
    """
    if parameter.is_meta:
        raise UsageError(f"{name} has no values yet (device meta): load the weights first")
    if hasattr(parameter, "ds_id") or hasattr(parameter, "placements"):
        raise UsageError(
            f"{name} is sharded over processes (FSDP or ZeRO), and the norms are of whole tensors: train with DDP or "
            "ZeRO stage 0"
        )
