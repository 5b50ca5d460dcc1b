"""What a pass of intervals through a model is made of."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.certify.interval import Interval
from weightsmith.certify.rules import RULES, Rule
from weightsmith.core.errors import UsageError
from weightsmith.core.graph import Graph, Live, Node, replaced

Statistics = Literal["clean", "center"]


@dataclass(frozen=True, slots=True)
class Options:
    """How a pass is made.

    Attributes:
        statistics: What batch norm in training mode takes its statistics from: the clean activations, or the centers
            of the intervals.
        detach: These statistics carry no gradient, which saves the backward pass of the clean activations.
        dtype: What bounds are computed in; ``None``: float32, or float64 for a float64 model.
        outward: Widen every result by the largest rounding error it can have.
        update: Let batch norm in training mode update its running statistics.
    """

    statistics: Statistics = "clean"
    detach: bool = False
    dtype: torch.dtype | None = None
    outward: bool = False
    update: bool = True


@dataclass(slots=True)
class Call:
    """An operation as it is bounded in one pass: batch norm, for example, with the statistics of this batch.

    Attributes:
        op: Name of the operation.
        call: The function.
        args: Its arguments; what comes from other operations is a `Node`.
        kwargs: Likewise.
    """

    op: Any
    call: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def rule(self) -> Rule:
        """How it is bounded."""
        return RULES[self.op]


@dataclass(slots=True)
class Pass:
    """What one pass has computed.

    Attributes:
        graph: The model.
        options: How.
        values: By node: an interval, or a tensor that is known exactly.
        clean: By node: its value for the unperturbed input; empty where it was not needed.
        calls: By node: what was bounded.
    """

    graph: Graph
    options: Options
    values: dict[Node, Any] = field(default_factory=dict)
    clean: dict[Node, Any] = field(default_factory=dict)
    calls: dict[Node, Call] = field(default_factory=dict)

    @property
    def inputs(self) -> list[Any]:
        """The unperturbed inputs."""
        return [self.clean[node] for node in self.graph.inputs]

    @property
    def output(self) -> Interval:
        """Interval of what the model returns."""
        return as_interval(self.values[self.graph.output])

    def arguments(self, node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a node's operation with their intervals."""
        call = self.calls[node]
        filled: tuple[tuple[Any, ...], dict[str, Any]] = self.fill((call.args, dict(call.kwargs)), self.values)
        return filled

    def fill(self, tree: Any, values: Mapping[Node, Any]) -> Any:
        """Put values in the place of nodes, and parameters in the place of references to them."""

        def value(leaf: Any) -> Any:
            if isinstance(leaf, Node):
                return values[leaf]
            found = leaf.get() if isinstance(leaf, Live) else leaf
            if isinstance(found, Tensor) and found.is_floating_point() and found.dtype != self.options.dtype:
                return found.to(self.options.dtype)
            return found

        return replaced(tree, value)


def as_interval(value: Any) -> Interval:
    """A value that is known exactly as an interval of width 0."""
    return value if isinstance(value, Interval) else Interval(value, value)


def working_dtype(model: nn.Module, inputs: Sequence[Any], asked: torch.dtype | None) -> torch.dtype:
    """Float32, or float64 where the model or the input has it: lower precision breaks soundness.

    Raises:
        UsageError: ``asked`` is another one.
    """
    if asked is not None:
        if asked not in (torch.float32, torch.float64):
            raise UsageError(f"dtype must be torch.float32 or torch.float64, got {asked}")
        return asked
    tensors = [*model.parameters(), *(x for x in inputs if isinstance(x, Tensor))]
    return torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
