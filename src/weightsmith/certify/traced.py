"""A model that has been traced once for many calls, with rules for all that it does."""

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
from weightsmith.core.graph import Graph, UnsupportedOperation
from weightsmith.core.tracing import trace as trace_graph


class Traced:
    """A model that has been traced, for many calls; parameters, buffers and modes stay the model's own.

    It is traced anew when a module changes between training and evaluation mode. After a module was replaced, trace it
    again.

    Args:
        model: The model.
        inputs: An example input ``(B, ...)``, or a tuple of all of them.

    Raises:
        UnsupportedOperation: The model cannot be traced, or has an operation without bounds; the message names it.
    """

    def __init__(self, model: nn.Module, inputs: Any) -> None:
        self.model = model
        self._inputs = tuple(
            item[:2].detach() if isinstance(item, Tensor) and item.dim() else item for item in as_inputs(inputs)
        )
        self._graphs: dict[tuple[bool, ...], dict[int | None, Graph]] = {}
        self._axes: dict[Graph, Axes] = {}
        self.graph(len(as_inputs(inputs)[0]))

    def graph(self, batch: int) -> Graph:
        """The operations of the model in its present modes, for a batch size."""
        graphs = self._graphs.setdefault(tuple(module.training for module in self.model.modules()), {})
        if None not in graphs and batch not in graphs:
            graph = trace_graph(self.model, self._example(batch, None), own=own_operations(), expansions=EXPANSIONS)
            _check(graph)
            graphs[graph.batch] = graph
        return graphs.get(None) or graphs[batch]

    def axes(self, graph: Graph) -> Axes:
        """Which axis of every operation's output counts the examples."""
        if graph not in self._axes:
            options = Options(dtype=working_dtype(self.model, self._inputs, None), update=False)

            def run(batch: int) -> list[Any]:
                of_size = self.graph(batch)
                done = propagate(of_size, self._example(batch, options.dtype), options=options)
                return [done.values.get(node) for node in of_size.nodes]

            with torch.no_grad():
                self._axes[graph] = example_axes(graph, run, graph.batch or 2)
        return self._axes[graph]

    def _example(self, batch: int, dtype: torch.dtype | None) -> tuple[Any, ...]:
        return tuple(_repeated(item, batch, dtype) for item in self._inputs)


def _check(graph: Graph) -> None:
    """Refuse what cannot be bounded, and take infinity out of masks."""
    if len(graph.outputs) != 1:
        raise UnsupportedOperation(
            f"{type(graph.model).__name__} must return one tensor, returns {len(graph.outputs)}: wrap it in a "
            "module that returns its logits"
        )
    for node in graph.nodes:
        if node.varies and node.op not in _ALWAYS and node.op not in RULES:
            raise unsupported(node)
        if node.op in ("masked_fill", "where", "add") and sum(parent.varies for parent in node.parents) < 2:
            node.call = _without_infinity(node.call)


def _without_infinity(call: Any) -> Any:
    def masked(*args: Any, **kwargs: Any) -> Any:
        dtype = next(arg.dtype for arg in args if isinstance(arg, Tensor) and arg.is_floating_point())
        return call(*(finite(arg, dtype) for arg in args), **kwargs)

    return masked


_ALWAYS = ("input", "batch_norm", "dropout", "channel_dropout")


def _repeated(item: Any, batch: int, dtype: torch.dtype | None) -> Any:
    if not isinstance(item, Tensor) or not item.dim():
        return item
    item = item[:1].expand(batch, *item.shape[1:]).contiguous()
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
