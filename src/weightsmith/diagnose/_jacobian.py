"""The tangent kernel from explicit Jacobians, tensor by tensor, never more of them at once than the budget allows."""

import logging
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor
from torch.func import jacrev, vmap

from weightsmith.diagnose._function import Function

_log = logging.getLogger(__name__)
Add = Callable[[str, int, int, Tensor], None]


def widths(function: Function, names: list[str]) -> dict[str, int]:
    """Real numbers in each parameter."""
    return {name: function.params[name].numel() * (2 if function.params[name].is_complex() else 1) for name in names}


def groups(function: Function, names: list[str], rows: int, itemsize: int, budget: int) -> list[list[str]]:
    """Parameters to differentiate together, such that the Jacobian of a group takes half the budget where it can.

    The other half is for what computes it. Parameters of one layer stay in order.
    """
    room = max(1, budget // (2 * rows * itemsize))
    found: list[list[str]] = [[]]
    used = 0
    for name, width in widths(function, names).items():
        if found[-1] and used + width > room:
            found.append([])
            used = 0
        found[-1].append(name)
        used += width
    return [group for group in found if group]


def accumulate(
    function: Function, names: list[str], outputs: int, dtype: torch.dtype, budget: int, trace: bool, add: Add
) -> None:
    """Give ``add`` the kernel of each parameter: its name, first row, first column, block.

    Args:
        function: What to differentiate.
        names: Of its parameters.
        outputs: Outputs per sample.
        dtype: Of the kernel.
        budget: Bytes.
        trace: Sum over outputs.
        add: Called with blocks on and below the diagonal; those below it stand for their transposes too.
    """
    samples = function.samples
    itemsize = dtype.itemsize
    for group in groups(function, names, samples * outputs, itemsize, budget):
        width = sum(widths(function, group).values())
        each = max(1, min(samples, budget // (2 * outputs * width * itemsize)))  # samples per block
        if each < samples:
            each = max(1, each // 2)  # two blocks at a time
        starts = range(0, samples, each)
        for first in starts:
            left = rows(function, group, first, min(first + each, samples), outputs, dtype, budget)
            for second in (other for other in starts if other <= first):
                right = left
                if second != first:
                    right = rows(function, group, second, min(second + each, samples), outputs, dtype, budget)
                for name, column in _columns(function, group):
                    a, b = left[:, :, column], right[:, :, column]
                    a, b = (a.flatten(1), b.flatten(1)) if trace else (a.flatten(0, 1), b.flatten(0, 1))
                    scale = 1 if trace else outputs
                    add(name, first * scale, second * scale, a @ b.T)


def rows(
    function: Function, group: list[str], first: int, last: int, outputs: int, dtype: torch.dtype, budget: int
) -> Tensor:
    """The Jacobian of a range of samples, ``(samples, outputs, width)``, parameters of the group side by side."""
    sizes = widths(function, group)
    width = sum(sizes.values())
    found = torch.empty(last - first, outputs, width, dtype=dtype, device=function.device)
    itemsize = max(function.params[name].dtype.itemsize for name in group)
    # a backward pass through several uses of a weight holds several such pieces
    chunk = max(1, min(last - first, budget // (16 * outputs * width * itemsize)))
    by_vmap = True
    for start in range(first, last, chunk):
        stop = min(start + chunk, last)
        parts = None
        if by_vmap:
            try:
                parts = _by_vmap(function, group, start, stop)
            except Exception as error:  # any of the things that vmap cannot do, in whatever words
                _log.debug("vmap cannot differentiate this model, autograd does it sample by sample: %s", error)
                by_vmap = False
        if parts is None:
            parts = _by_autograd(function, group, start, stop)
        for part, column in zip(parts, _columns(function, group), strict=True):
            if part.is_complex():
                part = torch.view_as_real(part)
            found[start - first : stop - first, :, column[1]] = part.reshape(stop - start, outputs, -1).to(dtype)
        del parts
    return found


def _by_vmap(function: Function, group: list[str], first: int, last: int) -> list[Tensor]:
    values = {name: function.params[name].detach() for name in group}
    varying, dims = function.varying(first, last)
    with torch.no_grad():  # the derivatives that jacrev takes are on; none is recorded outside
        found = vmap(jacrev(function.sample), in_dims=(None, *dims))(values, *varying)
    return [_dense(found[name].detach()) for name in group]


def _by_autograd(function: Function, group: list[str], first: int, last: int) -> list[Tensor]:
    params = [function.params[name] for name in group]
    found: list[list[Tensor]] = [[] for _ in group]
    for sample in range(first, last):
        out = function.part(sample, sample + 1).batch()[0]
        for index, part in enumerate(gradients(out, params)):
            found[index].append(part)
    return [torch.stack(parts) for parts in found]


def gradients(out: Tensor, wanted: Sequence[Tensor]) -> list[Tensor]:
    """Derivatives ``(O, ...)`` of outputs ``(O,)`` by some tensors, zeros where there are none."""
    eye = torch.eye(len(out), dtype=out.dtype, device=out.device)
    if not out.requires_grad:
        return [tensor.new_zeros(len(out), *tensor.shape) for tensor in wanted]
    found: Sequence[Tensor | None]
    try:
        found = torch.autograd.grad(out, wanted, eye, retain_graph=True, allow_unused=True, is_grads_batched=True)
    except RuntimeError as error:  # an operation without a batched derivative
        _log.debug("derivatives one by one: %s", error)
        each = [torch.autograd.grad(out, wanted, row, retain_graph=True, allow_unused=True) for row in eye]
        found = [
            None if any(part is None for part in parts) else torch.stack(parts) for parts in zip(*each, strict=True)
        ]
    return [
        tensor.new_zeros(len(out), *tensor.shape) if part is None else _dense(part.detach())
        for part, tensor in zip(found, wanted, strict=True)
    ]


def _dense(part: Tensor) -> Tensor:
    return part.to_dense() if part.is_sparse else part


def _columns(function: Function, group: list[str]) -> Iterator[tuple[str, slice]]:
    start = 0
    for name, width in widths(function, group).items():
        yield name, slice(start, start + width)
        start += width
