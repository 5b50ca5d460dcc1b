"""Apply an initialization to the weights of a model, whatever way its modules store them."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.core.parameters import WhereParameter, select_parameters
from weightsmith.core.weights import TRANSPOSED, Slot, check_plain, is_conv1d, layouts, why_computed

_GATES: tuple[tuple[type[nn.Module], int], ...] = (
    (nn.LSTM, 4),
    (nn.LSTMCell, 4),
    (nn.GRU, 3),
    (nn.GRUCell, 3),
)


@dataclass(frozen=True, slots=True)
class Initialized:
    """What `apply_` has changed.

    Attributes:
        model: The model.
        changed: Names of the parameters, with the number of matrices in each: gates, groups or experts.
        skipped: Names of the chosen parameters that have fewer than two dimensions, or no elements.
    """

    model: nn.Module
    changed: dict[str, int]
    skipped: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{name}: {count} matrices" if count > 1 else name for name, count in self.changed.items()]
        return "\n".join([*lines, *(f"{name}: left as it is, no matrix" for name in self.skipped)])


def apply_(model: nn.Module, fn: Callable[[Tensor], object], where: WhereParameter = None) -> Initialized:
    """Initialize weights of a model by a verb such as `weightsmith.init.low_rank_`.

    ``fn`` gets each matrix on its own, with outputs as rows: one gate of an LSTM or GRU at a time, query, key and value
    of packed attention, groups of a transposed convolution, each expert of a stack. A tied weight is changed once.
    Nothing is changed if ``fn`` fails on any of them.

    Args:
        model: Changed in place.
        fn: Changes a tensor ``(out, in, ...)`` in place, for example ``lambda w: low_rank_(w, 10)``.
        where: Glob(s) over names of parameters, or a predicate ``(name, parameter) -> bool``. ``None``: the paper's
            choice, recurrent matrices (``weight_hh`` of torch's modules).

    Returns:
        What was changed.

    Raises:
        UsageError: Nothing matches, a weight is computed by a parametrization, or ``fn`` refuses one.
        TypeError: A weight is no dense floating-point tensor.

    Example:
        >>> from weightsmith.init import low_rank_
        >>> report = apply_(nn.LSTM(3, 8), lambda w: low_rank_(w, 2))
        >>> report.changed
        {'weight_hh_l0': 4}
    """
    chosen = select_parameters(model, where, default=lambda name, _: name.rpartition(".")[2].startswith("weight_hh"))
    skipped = tuple(name for name, (parameter, _) in chosen.items() if parameter.dim() < 2 or not parameter.numel())
    written: dict[str, tuple[nn.Parameter, Tensor, int]] = {}
    for name, (parameter, slots) in chosen.items():
        if name in skipped:
            continue
        _check(name, slots)
        copy = parameter.detach().clone()
        matrices = list(_matrices(copy, _holder(slots)))
        for put, matrix in matrices:
            made = fn(matrix)
            if isinstance(made, Tensor) and made.data_ptr() != matrix.data_ptr():
                raise UsageError(f"fn must change {name} in place, and it returned another tensor: nothing has changed")
            put(matrix)
        written[name] = (parameter, copy, len(matrices))
    if not written and all(parameter.dim() < 2 for parameter, _ in chosen.values()):
        raise UsageError(f"where={where!r} matches vectors alone ({', '.join(skipped)}): they have no rank")
    with torch.no_grad():
        for parameter, values, _ in written.values():
            parameter.copy_(values)
    return Initialized(model, {name: count for name, (_, _, count) in written.items()}, skipped)


def _check(name: str, slots: list[Slot]) -> None:
    slot = slots[0]
    if ".parametrizations." in f".{name}":
        raise UsageError(f"{name} belongs to a parametrization: call weightsmith.fold_ on the model first")
    for suffix in ("_orig", "_g", "_v"):  # what torch's pruning, spectral and weight norm put in a weight's place
        plain = slot.attribute.removesuffix(suffix)
        if plain != slot.attribute and hasattr(slot.module, plain) and plain not in slot.module._parameters:
            raise UsageError(f"{slot.owner}.{plain} {why_computed(slot.module, plain)}")
    check_plain(name, slot.module, slot.attribute)


def _holder(slots: list[Slot]) -> Slot:
    """The place that says how the tensor is laid out: a layer before an embedding that shares its weight."""
    return next((slot for slot in slots if not isinstance(slot.module, nn.Embedding)), slots[0])


def _matrices(w: Tensor, slot: Slot) -> Iterator[tuple[Callable[[Tensor], object], Tensor]]:
    """Each matrix as a copy with outputs as rows, and what writes it back."""
    module, attribute = slot.module, slot.attribute
    if isinstance(module, TRANSPOSED) and attribute == "weight":
        parts = [part.movedim(1, 0) for part in w.chunk(module.groups)]
    elif is_conv1d(module) and attribute == "weight":
        parts = [w.T]
    else:
        stacked = {layout.attribute: layout for layout in layouts(module) if layout.stacked}
        if attribute in stacked:
            parts = [part.movedim(stacked[attribute].axis - 1, 0) for part in w]
        else:
            parts = list(w.chunk(_count(module, attribute)))
    for part in parts:
        yield part.copy_, part.clone(memory_format=torch.contiguous_format)


def _count(module: nn.Module, attribute: str) -> int:
    if attribute == "in_proj_weight":
        return 3
    if attribute.startswith(("weight_ih", "weight_hh")):
        return next((gates for kind, gates in _GATES if isinstance(module, kind)), 1)
    return 1
