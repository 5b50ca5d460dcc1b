"""One pass of intervals through a traced model, with the clean activations beside them where they are needed.

Batch norm in training mode normalizes the clean activations and both ends with the mean and the biased variance of the
clean batch, so that the clean pass is part of the graph of gradients. Its running statistics are updated once.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from weightsmith.certify.batch_ops import batch_norm, dropout, in_training, is_folded
from weightsmith.certify.interval import Interval, intervals, sample
from weightsmith.certify.passes import Call, Options, Pass
from weightsmith.certify.rules import RULES
from weightsmith.core.errors import UsageError, reason
from weightsmith.core.graph import SHAPE_ONLY, Graph, Node, UnsupportedOperation


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
    need_clean = want_clean or (options.statistics == "clean" and any(map(in_training, graph.nodes)))
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


def _bound(done: Pass, node: Node, users: Mapping[Node, list[Node]], need_clean: bool, clean_grad: bool) -> None:
    if node.op in SHAPE_ONLY:
        args, kwargs = done.fill((node.args, dict(node.kwargs)), done.values)
        done.values[node] = done.clean[node] = node.call(*sample(args), **sample(kwargs))
        return
    if node.op == "batch_norm":
        call, clean = batch_norm(done, node, users, need_clean)
    elif node.op in ("dropout", "channel_dropout"):
        call, clean = dropout(done, node, need_clean)
    else:
        call, clean = Call(node.op, node.call, node.args, node.kwargs), None
        if need_clean:
            with torch.set_grad_enabled(torch.is_grad_enabled() and clean_grad):
                args, kwargs = done.fill((node.args, dict(node.kwargs)), done.clean)
                clean = node.call(*args, **kwargs)
    done.calls[node] = call
    if need_clean:
        done.clean[node] = clean
    if is_folded(node, users, done):
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
    except (TypeError, ValueError, IndexError) as error:  # arguments that the rule does not know
        raise UnsupportedOperation(
            f"node {node.name!r} ({node.op}) has arguments without a rule: {reason(error)}"
        ) from error
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
