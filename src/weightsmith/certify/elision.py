"""Bounds of ``C z`` that take the last linear layer in, and how exact they are."""

import torch
from torch import Tensor

from weightsmith.certify.interval import Interval
from weightsmith.certify.passes import Pass
from weightsmith.core.graph import Node


def elided(done: Pass, spec: Tensor | None) -> Interval:
    """IBP ends of ``C z``: of a last linear layer ``C W c + C b -+ |C W| r``, tighter than bounding ``z`` first."""
    output = done.output
    if spec is None:
        return output
    layer = last_linear(done)
    if layer is None:
        center, radius, bias, weight = output.center, output.radius, None, spec
    else:
        x, matrix, offset = layer
        center, radius, weight = x.center, x.radius, spec @ matrix
        bias = None if offset is None else spec @ offset
    middle = (weight @ center.unsqueeze(-1)).squeeze(-1)
    middle = middle if bias is None else middle + bias
    half = (weight.abs() @ radius.unsqueeze(-1)).squeeze(-1)
    if done.options.outward:
        terms = weight.shape[-1] + spec.shape[-1] + 8
        unit = terms * torch.finfo(weight.dtype).eps
        size = (spec.abs() @ (matrix if layer else torch.eye(spec.shape[-1]).to(spec)).abs()) @ (
            center.abs() + radius
        ).unsqueeze(-1)
        extra = 0 if bias is None or layer is None or layer[2] is None else spec.abs() @ layer[2].abs()
        half = half + unit * (size.squeeze(-1) + extra)
    return Interval(middle - half, middle + half)


def last_linear(done: Pass) -> tuple[Interval, Tensor, Tensor | None] | None:
    """Input interval, weight and bias of the last operation, where it is a linear layer on ``(B, features)``."""
    node: Node = done.graph.output
    call = done.calls.get(node)
    if call is None or call.op != "linear" or len(done.output.shape) != 2:
        return None
    args, kwargs = done.arguments(node)
    weight = args[1] if len(args) > 1 else kwargs["weight"]
    return args[0], weight, args[2] if len(args) > 2 else kwargs.get("bias")


@torch.no_grad()
def tolerance_of(done: Pass, ends: Interval, spec: Tensor | None) -> float:
    """Unit roundoff, times the operations in a row, times the size of what the last one adds up."""
    size = torch.maximum(ends.lower.abs().max(), ends.upper.abs().max())
    layer = last_linear(done)
    if layer is not None:
        x, weight, bias = layer
        terms = (x.center.abs() + x.radius) @ weight.abs().T
        largest = terms.max() if bias is None else (terms + bias.abs()).max()
        size = torch.maximum(size, largest * (2 if spec is not None else 1))
    return float(size) * (8 + len(done.calls)) * torch.finfo(ends.lower.dtype).eps
