"""A model that has been traced once for many calls, with rules for all that it does."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.certify.affine import finite
from weightsmith.certify.crown import Axes, example_axes
from weightsmith.certify.norms import EXPANSIONS
from weightsmith.certify.passes import Options, working_dtype
from weightsmith.certify.propagate import propagate, unsupported
from weightsmith.certify.rules import RULES, own_operations
from weightsmith.core.errors import UsageError
from weightsmith.core.graph import Graph, Node, UnsupportedOperation, leaves, replaced
from weightsmith.core.tracing import trace as trace_graph


class Traced:
    """A model that has been traced, for many calls; parameters, buffers and modes stay the model's own.

    It is traced anew when a module changes between training and evaluation mode and, where its code reads sizes of the
    inputs, for inputs of another shape. After a module was replaced, trace it again.

    Args:
        model: The model.
        inputs: An example input ``(B, ...)``, or a tuple of all of them.

    Raises:
        UnsupportedOperation: The model cannot be traced, or has an operation without bounds; the message names it.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model = model
        given = as_inputs(inputs)
        size = len(given[0]) if given[0].dim() else 0
        if not size:
            raise UsageError(f"x must hold at least one example, got shape {tuple(given[0].shape)}")
        self._counted = tuple(isinstance(item, Tensor) and item.dim() > 0 and len(item) == size for item in given)
        self._dtypes = tuple(item.dtype if isinstance(item, Tensor) else None for item in given)
        self._graphs: dict[tuple[bool, ...], dict[str | None, Graph]] = {}
        self._axes: dict[tuple[Graph, str], Axes] = {}
        self.graph(given)

    def graph(self, inputs: Sequence[Any]) -> Graph:
        """The operations of the model in its present modes, for inputs of these shapes.

        Raises:
            UsageError: There are more or fewer inputs than the model was traced with.
            UnsupportedOperation: See `Traced`.
        """
        graphs = self._graphs.setdefault(tuple(module.training for module in self.model.modules()), {})
        if len(inputs) != len(self._dtypes):
            raise UsageError(f"x must hold {len(self._dtypes)} inputs, as the model was traced with, got {len(inputs)}")
        if None in graphs:
            return graphs[None]
        shapes: str | None = _shapes(inputs)
        if shapes not in graphs:
            pairs = zip(inputs, self._dtypes, strict=True)
            example = [
                item.detach().to(kind or item.dtype) if isinstance(item, Tensor) else item for item, kind in pairs
            ]
            graph = trace_graph(self.model, example, own=own_operations(), expansions=EXPANSIONS)
            _check(graph)
            if graph.batch is None:
                shapes = None
            graphs[shapes] = graph
        return graphs[shapes]

    def axes(self, graph: Graph, inputs: Sequence[Any]) -> Axes:
        """Which axis of every operation's output counts the examples, for inputs of these shapes."""
        counts = self._counts(inputs)
        one = [item[:1].detach() if counted else item for item, counted in zip(inputs, counts, strict=True)]
        key = graph, _shapes(one)
        if key not in self._axes:
            options = Options(dtype=working_dtype(self.model, inputs, None), update=False)

            def run(batch: int, spoilt: Tensor | None = None) -> list[Any]:
                pairs = zip(one, counts, strict=True)
                clean = tuple(_repeated(item, batch, options.dtype) if counted else item for item, counted in pairs)
                of_size = self.graph(clean)
                if len(of_size.nodes) != len(graph.nodes):
                    raise UnsupportedOperation(
                        f"{type(self.model).__name__} does something else in a batch of another size: use method='ibp'"
                    )
                given = clean
                if spoilt is not None:
                    mask = spoilt.view(-1, *[1] * (clean[0].dim() - 1)).to(clean[0].device)
                    given = (clean[0].masked_fill(mask, torch.nan), *clean[1:])
                done = propagate(of_size, given, clean, options=options)
                return [done.values.get(node) for node in of_size.nodes]

            with torch.no_grad():
                self._axes[key] = example_axes(graph, run, graph.batch or 2)
        return self._axes[key]

    def _counts(self, inputs: Sequence[Any]) -> tuple[bool, ...]:
        """Which inputs hold one entry per example."""
        size = len(inputs[0])
        return tuple(c and len(item) == size for item, c in zip(inputs, self._counted, strict=True))


def _shapes(inputs: Sequence[Any]) -> str:
    """What the code of a model can ask of its inputs: the shapes of tensors, and other values."""
    return repr(replaced(list(inputs), lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf))


def _check(graph: Graph) -> None:
    """Refuse what cannot be bounded, and take infinity out of masks."""
    if len(graph.outputs) != 1:
        raise UnsupportedOperation(
            f"{type(graph.model).__name__} must return one tensor, returns {len(graph.outputs)}: wrap it in a "
            "module that returns its logits"
        )
    for node in graph.nodes:
        if node.op in _CASTS and node.varies:
            _cast(node)
        if node.op in _RANDOM and not graph.model.training:
            raise UnsupportedOperation(f"node {node.name!r} ({node.op}) draws random numbers")
        if node.varies and node.op not in _ALWAYS and node.op not in RULES:
            raise unsupported(node)
        if node.op in ("masked_fill", "where", "add") and sum(parent.varies for parent in node.parents) < 2:
            node.call = _without_infinity(node.call)


def _without_infinity(call: Any) -> Any:
    def masked(*args: Any, **kwargs: Any) -> Any:
        dtype = next((arg.dtype for arg in args if isinstance(arg, Tensor) and arg.is_floating_point()), None)
        return call(*(args if dtype is None else (finite(arg, dtype) for arg in args)), **kwargs)

    return masked


def _cast(node: Node) -> None:
    """Make a node of a cast to another type of numbers; bounds themselves stay in the type that they have.

    Raises:
        UnsupportedOperation: It goes to whole numbers.
    """
    given = [leaf for leaf in leaves((node.args[1:], node.kwargs)) if isinstance(leaf, torch.dtype)]
    kind = _CASTS[node.op] or next(iter(given), None)
    if kind is None:
        return
    if not kind.is_floating_point:
        raise UnsupportedOperation(f"node {node.name!r} ({node.op}) rounds to {kind}, which has no bounds")
    change, args, kwargs = node.call, node.args[1:], node.kwargs
    node.op, node.call = "cast", lambda x, kind: change(x, *args, **kwargs).to(x.dtype)
    node.args, node.kwargs = (node.args[0], kind), {}


_CASTS = {"to": None, "float": torch.float32, "double": torch.float64, "half": torch.half, "bfloat16": torch.bfloat16}
_RANDOM = frozenset([
    "rand", "randn", "randint", "randperm", "normal", "bernoulli", "multinomial", "uniform", "exponential", "poisson",
])  # fmt: skip
_ALWAYS = ("input", "batch_norm", "dropout", "channel_dropout")


def _repeated(item: Tensor, batch: int, dtype: torch.dtype | None) -> Tensor:
    item = item.expand(batch, *item.shape[1:]).contiguous()
    if dtype is not None and item.is_floating_point():  # equal examples would leave batch norm nothing to divide by
        item = (
            item.to(dtype) + torch.arange(batch, dtype=dtype, device=item.device).view(-1, *[1] * (item.dim() - 1)) / 8
        )
    return item


def trace(model: nn.Module, inputs: Any) -> Traced:
    """Trace a model once for many calls of `bounds`; see `Traced`.

    Args:
        model: The model.
        inputs: An example input ``(B, ...)``, or a tuple of all of them.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from weightsmith import certify
        >>> net = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> traced = certify.trace(net, torch.zeros(1, 4))
        >>> bool((certify.bounds(traced, torch.zeros(2, 4), 0.1).upper >= net(torch.zeros(2, 4))).all())
        True
    """
    return Traced(model, inputs)


def as_inputs(x: Any) -> tuple[Any, ...]:
    """All inputs of a model as a tuple.

    Raises:
        UsageError: The first one is no floating-point tensor.
    """
    inputs = tuple(x) if isinstance(x, tuple | list) else (x,)
    if not inputs or not isinstance(inputs[0], Tensor) or not inputs[0].is_floating_point():
        got = inputs[0].dtype if inputs and isinstance(inputs[0], Tensor) else type(x).__name__
        raise UsageError(f"x must be a floating-point tensor, or a tuple that begins with one, got {got}")
    return inputs
