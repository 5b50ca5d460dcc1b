"""One pass of intervals through a traced model, with the clean activations beside them where they are needed.

Batch norm in training mode normalizes the clean activations and both ends with the mean and the biased variance of the
clean batch, so that the clean pass is part of the graph of gradients. Its running statistics are updated once.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F

from weightsmith.certify.interval import Interval, intervals, sample
from weightsmith.certify.rules import RULES, Rule
from weightsmith.core.errors import UsageError
from weightsmith.core.graph import SHAPE_ONLY, Graph, Live, Node, UnsupportedOperation, replaced

Statistics = Literal["clean", "center"]
_FUSED = ("linear", "conv1d", "conv2d", "conv3d")


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
    def output(self) -> Interval:
        """Interval of what the model returns."""
        return as_interval(self.values[self.graph.output])

    def arguments(self, node: Node) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Arguments of a node's operation with their intervals."""
        call = self.calls[node]
        return self.fill((call.args, dict(call.kwargs)), self.values)

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


def propagate(
    graph: Graph,
    inputs: Sequence[Any],
    clean: Sequence[Any] | None = None,
    *,
    options: Options,
    want_clean: bool = False,
    refine: Callable[[Pass, Node], None] | None = None,
) -> Pass:
    """Bound every operation of a model.

    Args:
        graph: The traced model.
        inputs: One interval, or anything known exactly, per input.
        clean: The unperturbed inputs; ``None``: the centers of the intervals.
        options: See `Options`; ``dtype`` is set.
        want_clean: Compute the clean activations even where batch norm does not need them.
        refine: Called after every operation; may replace its interval by a tighter one.
    """
    done = Pass(graph, options)
    users = graph.users()
    need_clean = want_clean or (options.statistics == "clean" and any(map(_in_training, graph.nodes)))
    for hook in graph.before:
        hook()
    given = clean if clean is not None else [x.center if isinstance(x, Interval) else x for x in inputs]
    for node, value, exact in zip(graph.inputs, inputs, given, strict=True):
        done.values[node], done.clean[node] = value, exact
    for node in graph.nodes:
        if node in done.values:
            continue
        _bound(done, node, users, need_clean, want_clean or not options.detach)
        if refine is not None and isinstance(done.values.get(node), Interval):
            refine(done, node)
    return done


def _in_training(node: Node) -> bool:
    if node.op != "batch_norm":
        return False
    named = {name: value.get() if isinstance(value, Live) else value for name, value in node.kwargs.items()}
    return bool(named["training"]) or named["running_mean"] is None


def _bound(done: Pass, node: Node, users: Mapping[Node, list[Node]], need_clean: bool, clean_grad: bool) -> None:
    if node.op in SHAPE_ONLY:
        args, kwargs = done.fill((node.args, dict(node.kwargs)), done.values)
        done.values[node] = done.clean[node] = node.call(*sample(args), **sample(kwargs))
        return
    if node.op == "batch_norm":
        call, clean = _batch_norm(done, node, users, need_clean)
    elif node.op in ("dropout", "channel_dropout"):
        call, clean = _dropout(done, node, need_clean)
    else:
        call, clean = Call(node.op, node.call, node.args, node.kwargs), None
        if need_clean:
            with torch.set_grad_enabled(torch.is_grad_enabled() and clean_grad):
                args, kwargs = done.fill((node.args, dict(node.kwargs)), done.clean)
                clean = node.call(*args, **kwargs)
    done.calls[node] = call
    if need_clean:
        done.clean[node] = clean
    if _is_folded(node, users, done):
        return  # the batch norm behind it is bounded together with it
    args, kwargs = done.arguments(node)
    if not any(isinstance(arg, Interval) for arg in args) and not intervals((args, kwargs)):
        same = need_clean and not any(parent.varies for parent in node.parents)
        done.values[node] = clean if same else call.call(*args, **kwargs)
        return
    if call.op not in RULES:
        raise unsupported(node)
    try:
        out = call.rule.ibp(call.call, args, kwargs)
    except UnsupportedOperation as error:
        raise UnsupportedOperation(f"node {node.name!r}: {error}") from error
    except UsageError as error:
        raise UsageError(f"node {node.name!r}: {error}") from error
    done.values[node] = _widened(node, call, args, kwargs, out) if done.options.outward else out


def unsupported(node: Node) -> UnsupportedOperation:
    """The error for an operation without a rule."""
    op = node.op if isinstance(node.op, str) else node.op.__name__
    return UnsupportedOperation(
        f"node {node.name!r} ({op}) has no bounds; tell them with weightsmith.certify.register_bound"
    )


def _widened(node: Node, call: Call, args: Any, kwargs: Any, out: Interval) -> Interval:
    if call.rule.rounding is None:
        raise UnsupportedOperation(
            f"node {node.name!r} ({call.op}): its rounding errors are not analyzed; leave rounding='nearest'"
        )
    error = call.rule.rounding(call.call, args, kwargs, out)
    unit = torch.finfo(out.sample.dtype).eps
    return Interval(
        out.lower - error * (1 + 4 * unit) - unit * out.lower.abs(),
        out.upper + error * (1 + 4 * unit) + unit * out.upper.abs(),
    )


# --- batch norm and dropout -------------------------------------------------------------------------------------------


def _is_folded(node: Node, users: Mapping[Node, list[Node]], done: Pass) -> bool:
    """Whether only a batch norm follows, into whose scale the weight is multiplied."""
    if node.op not in _FUSED or node is done.graph.output or len(users[node]) != 1:
        return False
    behind, x = users[node][0], node.args[0]
    if behind.op != "batch_norm" or done.options.statistics == "center" or done.options.outward:
        return False
    if len(node.args) < 3 or not all(isinstance(arg, Live | Tensor | None) for arg in node.args[1:3]):
        return False
    value = done.values[x] if isinstance(x, Node) else None
    return isinstance(value, Interval) and (node.op != "linear" or len(value.shape) == 2)


def _batch_norm(done: Pass, node: Node, users: Any, need_clean: bool) -> tuple[Call, Any]:
    """Batch norm as ``a x + b`` with ``a = gamma / sqrt(var + eps)`` and ``b = beta - mean a``."""
    x, options = node.args[0], done.options
    named = {name: value.get() if isinstance(value, Live) else value for name, value in node.kwargs.items()}
    in_training = _in_training(node)
    if in_training:
        clean = done.clean[x] if options.statistics == "clean" else as_interval(done.values[x]).center
        if named["training"]:
            F._verify_batch_size(clean.shape)  # type: ignore[attr-defined]  # torch's own error for a batch of 1
        mean, var, count = _moments(clean, named.get("synced"))
        if options.update and named["training"] and named["running_mean"] is not None:
            _update(named, mean.detach(), var.detach(), count)
        if options.detach:
            mean, var = mean.detach(), var.detach()
    else:
        mean, var = (named[name].to(options.dtype) for name in ("running_mean", "running_var"))
    a = (var + named["eps"]).rsqrt()
    if named.get("weight") is not None:
        a = a * named["weight"].to(options.dtype)
    b = -mean * a
    if named.get("bias") is not None:
        b = b + named["bias"].to(options.dtype)
    out = None
    if need_clean:
        exact = done.clean[x]
        out = torch.addcmul(_channels(b, exact), exact, _channels(a, exact))
    if isinstance(x, Node) and _is_folded(x, users, done):
        _, weight, bias, *more = done.fill((None, *x.args[1:]), {})
        folded = weight * a.view(-1, *[1] * (weight.dim() - 1))
        return Call(x.op, x.call, (x.args[0], folded, b if bias is None else b + bias * a, *more), x.kwargs), out
    like = sample(done.values[x])
    return Call("scale_shift", lambda t, a, b: t * a + b, (x, _channels(a, like), _channels(b, like))), out


def _channels(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _moments(x: Tensor, synced: Any) -> tuple[Tensor, Tensor, int]:
    """Mean, biased variance and count per channel; over all processes of a group for synchronized batch norm."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    count = x.numel() // x.shape[1]
    if (
        synced
        and distributed.is_available()
        and distributed.is_initialized()
        and distributed.get_world_size(synced[0]) > 1
    ):
        from torch.distributed.nn.functional import all_reduce  # not in every build of torch

        sums = torch.stack([x.sum(axes), x.square().sum(axes), torch.full_like(x.sum(axes), count)])
        total, squares, counts = all_reduce(sums, group=synced[0] or distributed.group.WORLD)
        mean = total / counts
        return mean, squares / counts - mean.square(), int(counts[0].item())
    var, mean = torch.var_mean(x, axes, correction=0)
    return mean, var, count


@torch.no_grad()
def _update(named: Mapping[str, Any], mean: Tensor, var: Tensor, count: int) -> None:
    momentum = named["momentum"]
    seen = named.get("num_batches_tracked")
    if seen is not None:
        seen.add_(1)
        momentum = 1 / float(seen) if momentum is None else momentum
    momentum = 0.1 if momentum is None else momentum
    named["running_mean"].lerp_(mean.to(named["running_mean"].dtype), momentum)
    unbiased = var * (count / max(1, count - 1))
    named["running_var"].lerp_(unbiased.to(named["running_var"].dtype), momentum)


def _dropout(done: Pass, node: Node, need_clean: bool) -> tuple[Call, Any]:
    """The same mask for the clean activations and both ends."""
    args, kwargs = done.fill((node.args[1:], dict(node.kwargs)), done.values)
    given = {"p": 0.5, "training": True} | dict(zip(("p", "training"), args, strict=False)) | kwargs
    p, training = given["p"], given.get("train", given["training"])
    x = node.args[0]
    clean = done.clean.get(x)
    if not training or p == 0:
        return Call("identity", lambda t: t, (x,)), clean
    like = sample(done.values[x])
    shape = like.shape if node.op == "dropout" else (*like.shape[:2], *[1] * (like.dim() - 2))
    mask = F.dropout(torch.ones(shape, dtype=like.dtype, device=like.device), p)
    return Call("mul", torch.mul, (x, mask)), done.clean[x] * mask if need_clean else None


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
