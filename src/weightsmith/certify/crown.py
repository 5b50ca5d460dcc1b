"""Linear bounds by backward substitution: CROWN (arXiv 1811.00866) and CROWN-IBP (arXiv 1906.06316).

A lower bound of ``A z`` is carried back through the operations of a model. Where an operation is not linear, positive
coefficients take a linear function below it and negative ones one above; at the input ``A x >= A c - |A| r``. An upper
bound is minus the lower bound of ``-A z``. Coefficients have the shape ``(S, *shape of the operation's output)`` for
``S`` bounds at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from weightsmith.certify.interval import Interval
from weightsmith.certify.passes import Pass
from weightsmith.certify.propagate import unsupported
from weightsmith.certify.relu import relu_lines
from weightsmith.certify.rules import RULES, Lines
from weightsmith.core.errors import UsageError, reason
from weightsmith.core.graph import Graph, Node, UnsupportedOperation, leaves, replaced

ReluMode = Literal["adaptive", "zero-lb", "one-lb", "same-slope"]


class Place(NamedTuple):
    """Where the examples of a batch are in an operation's output: along one axis, ``(outer, B, inner)``.

    Attributes:
        axis: The axis.
        outer: How often it goes through all examples.
        inner: How many entries in a row belong to one.
    """

    axis: int
    outer: int
    inner: int

    def split(self, values: Tensor, batch: int) -> Tensor:
        """Bring ``(S, *shape)`` to ``(S, B, rest)``."""
        moved = values.movedim(self.axis + 1, 1)
        return moved.reshape(len(values), self.outer, batch, self.inner, -1).movedim(2, 1).flatten(2)

    def join(self, values: Tensor, shape: Sequence[int]) -> Tensor:
        """Bring ``(S, B, rest)`` back to ``(S, *shape)``."""
        rest = [size for axis, size in enumerate(shape) if axis != self.axis]
        parts = values.reshape(*values.shape[:2], self.outer, self.inner, *rest).movedim(1, 2)
        return parts.reshape(len(values), shape[self.axis], *rest).movedim(1, self.axis + 1)


Axes = Mapping[Node, Place]
"""By node: where the examples are."""


@dataclass(frozen=True, slots=True)
class Backward:
    """Everything a backward pass needs beside its coefficients.

    Attributes:
        done: The forward pass, with bounds of every operation.
        axes: See `Axes`.
        batch: Number of examples.
        relu: The lower line of ReLU; see `weightsmith.certify.relu.relu_lines`.
    """

    done: Pass
    axes: Axes
    batch: int
    relu: ReluMode = "adaptive"

    def lower(self, node: Node, coefficients: Tensor, constant: Tensor | None = None) -> Tensor:
        """Lower bounds ``(B, S)`` of ``A z + constant`` where ``z`` is a node's output.

        Args:
            node: The node.
            coefficients: ``(S, *shape)``.
            constant: ``(B, S)``.
        """
        order = self.done.graph.nodes
        held: dict[Node, Tensor] = {node: coefficients}
        total = coefficients.new_zeros(len(coefficients), self.batch)
        for current in reversed(order[: order.index(node) + 1]):
            a = held.pop(current, None)
            if a is None:
                continue
            value = self.done.values.get(current)
            if value is not None and not isinstance(value, Interval):
                total = total + self._per_example(a * value, current)
            elif current in self.done.graph.inputs:
                assert isinstance(value, Interval)
                total = total + self._per_example(a * value.center - a.abs() * value.radius, current)
            else:
                shares, offset = self._step(current, a)
                total = total + offset if offset is not None else total
                for parent, share in shares:
                    held[parent] = held[parent] + share if parent in held else share
        return total.T if constant is None else total.T + constant

    def _per_example(self, products: Tensor, node: Node) -> Tensor:
        """Sum ``(S, *shape)`` over everything but examples: ``(S, B)``."""
        return self.axes[node].split(products, self.batch).sum(-1)

    def _step(self, node: Node, a: Tensor) -> tuple[Sequence[tuple[Node, Tensor]], Tensor | None]:
        call = self.done.calls[node]
        args, kwargs = self.done.arguments(node)
        unknown = [
            leaf for leaf in leaves((call.args, dict(call.kwargs)))
            if isinstance(leaf, Node) and isinstance(self.done.values.get(leaf), Interval)
        ]  # fmt: skip
        if call.op in _WEIGHTED and len(unknown) == 1 and not kwargs and unknown[0] is call.args[0]:
            share, constant = _WEIGHTED[call.op](a, args[0], *args[1:])
            return [(unknown[0], share)], None if constant is None else self._per_example(constant, node)
        rule = RULES.get(call.op)
        if rule is None:
            raise unsupported(node)
        if rule.affine:
            return self._pull(node, unknown, _function(call.call, args, kwargs), a)
        if rule.crown is None:
            raise UnsupportedOperation(
                f"node {node.name!r} ({call.op}) has no linear bounds: use method='ibp', or register_bound(crown=...)"
            )
        try:
            found = relu_lines(args[0], mode=self.relu) if call.op == "relu" else rule.crown(call.call, args, kwargs)
        except UnsupportedOperation as error:
            raise UnsupportedOperation(f"node {node.name!r}: {error}") from error
        except UsageError:
            raise
        except (TypeError, ValueError, IndexError, AttributeError) as error:  # arguments that the rule does not know
            raise _without_lines(node, call.op, f"these arguments: {reason(error)}") from error
        if isinstance(found, Lines) and len(unknown) != 1:
            raise _without_lines(node, call.op, "more than one argument that depends on the input")
        if isinstance(found, Lines):
            return self._lines(node, unknown[0], found, a)
        if found.below is found.above:
            return self._pull(node, unknown, found.below, a)
        below, first = self._pull(node, unknown, found.below, a.clamp(min=0))
        above, second = self._pull(node, unknown, found.above, a.clamp(max=0))
        return [*below, *above], first + second

    def _lines(self, node: Node, parent: Node, lines: Lines, a: Tensor) -> tuple[Any, Tensor | None]:
        positive, negative = a.clamp(min=0), a.clamp(max=0)
        share = positive * lines.below + negative * lines.above
        total = None
        for part, offset in ((positive, lines.below_at), (negative, lines.above_at)):
            if offset is not None:
                found = self._per_example(part * offset, node)
                total = found if total is None else total + found
        return [(parent, share)], total

    def _pull(self, node: Node, unknown: list[Node], f: Callable[..., Tensor], a: Tensor) -> tuple[Any, Tensor]:
        """Carry coefficients through any affine function, by its own transpose."""
        samples = [self.done.values[parent].sample for parent in unknown]
        if not all(isinstance(sample, Tensor) for sample in samples):
            raise UnsupportedOperation(
                f"node {node.name!r} takes several tensors at once out of {unknown[0].name!r}, which has no linear "
                "bounds: take them one by one, or use method='ibp'"
            )
        zeros = [torch.zeros_like(sample) for sample in samples]
        found: Any = torch.func.vjp(f, *zeros)
        offset, pull = found
        shares = torch.func.vmap(pull)(a.expand(len(a), *offset.shape))
        return list(zip(unknown, shares, strict=True)), self._per_example(a * offset, node)


def _without_lines(node: Node, op: Any, what: str) -> UnsupportedOperation:
    kind = op if isinstance(op, str) else op.__name__
    return UnsupportedOperation(f"node {node.name!r} ({kind}) has no linear bounds for {what}; use method='ibp'")


def _function(call: Any, args: Any, kwargs: Any) -> Callable[..., Tensor]:
    """An operation as a function of its unknown arguments alone."""

    def f(*values: Tensor) -> Tensor:
        left = iter(values)
        filled, named = replaced((args, kwargs), lambda leaf: next(left) if isinstance(leaf, Interval) else leaf)
        found: Tensor = call(*filled, **named)
        return found

    return f


def _linear(a: Tensor, x: Interval, weight: Tensor, bias: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    return a @ weight, None if bias is None else a * bias


def _convolved(dims: int) -> Callable[..., tuple[Tensor, Tensor | None]]:
    transposed = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]

    def every(value: Any) -> tuple[int, ...]:
        return (value,) * dims if isinstance(value, int) else tuple(value) * (dims if len(value) == 1 else 1)

    def step(
        a: Tensor, x: Interval, weight: Tensor, bias: Tensor | None = None, stride: Any = 1, padding: Any = 0,
        dilation: Any = 1, groups: int = 1,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        stride, dilation, kernel = every(stride), every(dilation), tuple(weight.shape[2:])
        if padding == "valid":
            padding = 0
        if isinstance(padding, str):  # "same": more on the right where it is odd; cut off what was padded
            pads = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
            full = transposed(a.flatten(0, 1), weight, None, stride, 0, 0, groups, dilation)
            for axis, pad in enumerate(pads):
                full = full.narrow(axis + 2, pad // 2, x.shape[axis + 2])
        else:
            padding = every(padding)
            extra = tuple(
                size - ((out - 1) * s - 2 * p + d * (k - 1) + 1)
                for size, out, s, p, d, k in zip(
                    x.shape[2:], a.shape[3:], stride, padding, dilation, kernel, strict=True
                )
            )
            full = transposed(a.flatten(0, 1), weight, None, stride, padding, extra, groups, dilation)
        share = full.unflatten(0, a.shape[:2])
        return share, None if bias is None else a * bias.view(-1, *[1] * dims)

    return step


def _scaled(a: Tensor, x: Interval, scale: Tensor, shift: Tensor) -> tuple[Tensor, Tensor | None]:
    return a * scale, a * shift


def _reshaped(a: Tensor, x: Interval, *_: Any) -> tuple[Tensor, None]:
    return a.reshape(len(a), *x.shape), None


_WEIGHTED: Mapping[str, Callable[..., tuple[Tensor, Tensor | None]]] = {
    "linear": _linear, "conv1d": _convolved(1), "conv2d": _convolved(2), "conv3d": _convolved(3),
    "scale_shift": _scaled, "flatten": _reshaped, "reshape": _reshaped, "unflatten": _reshaped,
    "squeeze": _reshaped, "unsqueeze": _reshaped, "identity": _reshaped,
}  # fmt: skip


# --- bounds of intermediate operations --------------------------------------------------------------------------------


def example_axes(graph: Graph, run: Callable[..., Sequence[Any]], batch: int) -> Axes:
    """Find, by runs with two batch sizes, which axis of every output counts the examples.

    Args:
        graph: The model.
        run: Gives a tensor of every node's shape for a batch size, in the order of the nodes; with a mask ``(B,)``
            the examples where it is ``True`` are NaN, which nothing that depends on them can hide.
        batch: The smaller size.

    Raises:
        UnsupportedOperation: An output has no such axis, or several, or depends on other examples.
    """

    def mixed(node: Node) -> UnsupportedOperation:
        return UnsupportedOperation(f"node {node.name!r} mixes the examples of a batch: use method='ibp'")

    places: dict[Node, list[Place]] = {}
    plain = run(batch)
    for node, one, other in zip(graph.nodes, plain, run(batch + 1), strict=True):
        if not node.varies or not isinstance(one, Tensor) or not isinstance(other, Tensor):
            continue
        if one.dim() != other.dim():  # a model that does something else for another batch size
            raise mixed(node)
        different = [axis for axis, (n, m) in enumerate(zip(one.shape, other.shape, strict=True)) if n != m]
        if len(different) != 1 or one.shape[different[0]] % batch:
            raise mixed(node)
        each = one.shape[different[0]] // batch
        places[node] = [Place(different[0], n, each // n) for n in range(1, each + 1) if each % n == 0]
    index = torch.arange(batch)
    for bit in range((batch - 1).bit_length()):  # two examples differ in some bit of their numbers
        for spoilt in ((index >> bit) % 2 == 1, (index >> bit) % 2 == 0):
            for node, value, before in zip(graph.nodes, run(batch, spoilt), plain, strict=True):
                if node in places and isinstance(value, Tensor):
                    reached = (value.isnan() & ~before.isnan()).unsqueeze(0)
                    kept = (~spoilt).to(value.device)
                    places[node] = [p for p in places[node] if not bool(p.split(reached, batch)[:, kept].any())]
                    if not places[node]:
                        raise mixed(node)
    found = {node: candidates[0] for node, candidates in places.items()}
    if found[graph.output] != Place(0, 1, 1):
        raise UnsupportedOperation(
            f"node {graph.output.name!r} does not return one row per example, (B, ...): use method='ibp'"
        )
    return found
