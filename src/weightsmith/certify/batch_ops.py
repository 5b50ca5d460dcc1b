"""Operations that depend on the batch: batch norm with its statistics, dropout with one mask for all."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, distributed
from torch.nn import functional as F

from weightsmith.certify.fused import normalized
from weightsmith.certify.interval import Interval, sample
from weightsmith.certify.passes import Call, Pass, as_interval
from weightsmith.core.graph import Live, Node

_FUSED = ("linear", "conv1d", "conv2d", "conv3d")


def in_training(node: Node) -> bool:
    """Whether a node is batch norm that takes its statistics from the batch."""
    if node.op != "batch_norm":
        return False
    named = {name: value.get() if isinstance(value, Live) else value for name, value in node.kwargs.items()}
    return bool(named["training"]) or named["running_mean"] is None


def is_folded(node: Node, users: Mapping[Node, list[Node]], done: Pass) -> bool:
    """Whether only a batch norm follows, into whose scale the weight is multiplied."""
    if node.op not in _FUSED or node is done.graph.output or len(users[node]) != 1:
        return False
    behind, x = users[node][0], node.args[0]
    if behind.op != "batch_norm" or done.options.statistics == "center" or done.options.outward:
        return False
    if len(node.args) < 3 or not all(isinstance(arg, Live | Tensor | None) for arg in node.args[1:3]):
        return False
    value = done.values[x] if isinstance(x, Node) else None
    if not isinstance(value, Interval) or node.op != "linear":
        return isinstance(value, Interval)
    # where a weight is larger than the batch's activations, scaling those is cheaper
    return len(value.shape) == 2 and not (in_training(behind) and value.shape[1] > 2 * value.shape[0])


def batch_norm(done: Pass, node: Node, users: Any, need_clean: bool) -> tuple[Call, Any]:
    """Batch norm as ``a x + b`` with ``a = gamma / sqrt(var + eps)`` and ``b = beta - mean a``."""
    x, options = node.args[0], done.options
    named = {name: value.get() if isinstance(value, Live) else value for name, value in node.kwargs.items()}
    weight, bias = (None if named.get(name) is None else named[name].to(options.dtype) for name in ("weight", "bias"))
    out = None
    if in_training(node):
        clean = done.clean[x] if options.statistics == "clean" else as_interval(done.values[x]).center
        if named["training"]:
            F._verify_batch_size(clean.shape)  # type: ignore[attr-defined]  # torch's own error for a batch of 1
        count = clean.numel() // clean.shape[1]
        if options.statistics == "clean" and not _is_synced(named.get("synced")):
            out, mean, rstd = normalized(clean, weight, bias, named["eps"])
            var = rstd.detach().square().reciprocal() - named["eps"]
        else:
            mean, var, count = _moments(clean, named.get("synced"))
            rstd = (var + named["eps"]).rsqrt()
        if options.update and named["training"] and named["running_mean"] is not None:
            _update(named, mean.detach(), var.detach().clamp_min(0), count)
        if options.detach:
            mean, rstd = mean.detach(), rstd.detach()
    else:
        mean = named["running_mean"].to(options.dtype)
        rstd = (named["running_var"].to(options.dtype) + named["eps"]).rsqrt()
    a = rstd if weight is None else rstd * weight
    b = -mean * a if bias is None else bias - mean * a
    if need_clean and out is None:
        exact = done.clean[x]
        out = torch.addcmul(_channels(b, exact), exact, _channels(a, exact))
    if isinstance(x, Node) and is_folded(x, users, done):
        matrix, shift, *more = done.fill(x.args[1:], {})
        folded = matrix * a.view(-1, *[1] * (matrix.dim() - 1))
        return Call(x.op, x.call, (x.args[0], folded, b if shift is None else b + shift * a, *more), x.kwargs), out
    like = sample(done.values[x])
    return Call("scale_shift", lambda t, a, b: t * a + b, (x, _channels(a, like), _channels(b, like))), out


def _channels(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.dim() - 2))


def _is_synced(synced: Any) -> bool:
    there = bool(synced) and distributed.is_available() and distributed.is_initialized()
    return there and distributed.get_world_size(synced[0]) > 1


def _moments(x: Tensor, synced: Any) -> tuple[Tensor, Tensor, int]:
    """Mean, biased variance and count per channel; over all processes of a group for synchronized batch norm."""
    axes = [axis for axis in range(x.dim()) if axis != 1]
    count = x.numel() // x.shape[1]
    if _is_synced(synced):
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


def dropout(done: Pass, node: Node, need_clean: bool) -> tuple[Call, Any]:
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
