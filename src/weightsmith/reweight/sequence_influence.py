r"""The influence of objectives from one backward pass, for advantages that are constant within each sequence.

The gradients of all objectives are combinations of the same per-sequence gradients: ``g_k = sum_b c_kb d logp_b``. With
the derivative ``delta`` of the summed log-probabilities at the output of ``y = W x + b``, an objective's gradient is
``dW_k = sum_b c_kb sum_t delta_bt x_bt^T``. So one backward pass over activations serves all objectives, and each
layer adds its share to a ``(K, K)`` matrix of inner products and is forgotten.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from weightsmith.core.errors import UsageError

LogProbs = Callable[[tuple[Tensor, ...]], Tensor]
_NORMS = (F.layer_norm, F.rms_norm)


def sequence_influence(
    logp: LogProbs,
    slopes: Callable[[Tensor], Tensor],
    mask: Tensor,
    params: Sequence[Tensor],
    others: Sequence[Tensor],
    max_norm: float | None,
) -> Tensor:
    """Compute the influence of each objective; `objective_influence` says what that is.

    Args:
        logp: Computes ``(B, T)`` from ``params``.
        slopes: Computes ``(K, B, T)``, the derivative of each objective's loss, from the log-probabilities.
        mask: ``(B, T)``, nonzero where a token counts.
        params: What the influence is measured on.
        others: What counts in the norm only.
        max_norm: Clip each objective's gradient to this norm; ``None``: do not.

    Returns:
        ``(K,)``.

    Raises:
        UsageError: The slopes differ within a sequence, or the policy changes a layer's input or output in place.
    """
    everything = [*params, *others] if max_norm is not None else list(params)
    watch = _Watch(everything, len(mask))
    with watch:
        found = logp(tuple(params))
    each, counted = slopes(found), mask > 0
    per_sequence = _constant(each, counted)
    if any(use.changed() for use in watch.uses):
        raise UsageError('the policy changes an activation in place: use method="backward"')
    left = _used_otherwise(found, watch.uses, everything)
    rest = [torch.autograd.grad(found, left, s.to(found.dtype), retain_graph=True) for s in each] if left else []
    outputs = [use.output for use in watch.uses]
    deltas = torch.autograd.grad(found, outputs, counted.to(found.dtype), retain_graph=True, allow_unused=True)
    used = [(use, delta) for use, delta in zip(watch.uses, deltas, strict=True) if delta is not None]
    grams, unclipped = _Grams(len(each), each), each.new_zeros(len(each))
    with torch.no_grad():
        for index, p in enumerate(everything):
            at = next((i for i, one in enumerate(left) if one is p), None)
            known = None if at is None else torch.stack([row[at].to(each.dtype).flatten() for row in rest])
            uses = [(use, delta) for use, delta in used if use.holds(p)] if known is None else []
            if known is None and not uses:
                continue
            if max_norm is not None:
                own = _sum([use.gradients(p, d, per_sequence) for use, d in uses]) if known is None else known
                grams.add(own, target=index < len(params))
            elif known is not None:
                unclipped += known @ known.sum(0)
            else:
                every = per_sequence.sum(0, keepdim=True)
                along = _sum([use.gradients(p, d, every)[0] for use, d in uses])
                unclipped += per_sequence @ _sum([use.along(p, d, along) for use, d in uses])
    return unclipped if max_norm is None else grams.influence(max_norm)


def _used_otherwise(found: Tensor, uses: Sequence["_Use"], params: Sequence[Tensor]) -> list[Tensor]:
    """Parameters that the graph also uses in another place than the watched layers."""
    edges = {_edge(p): id(p) for p in params}
    watched = {use.output.grad_fn: use.begin for use in uses}
    end = _edge(found)[0]
    seen, open_, known = {end}, [end], set[int]()
    while open_:
        node = open_.pop()
        for edge in watched.get(node, node.next_functions):
            if edge in edges:
                known.add(edges[edge])
            elif edge[0] is not None and edge[0] not in seen:
                seen.add(edge[0])
                open_.append(edge[0])
    return [p for p in params if id(p) in known]


def _edge(tensor: Tensor) -> tuple[Any, int]:
    edge = get_gradient_edge(tensor)
    return edge.node, edge.output_nr


def _sum(tensors: list[Tensor]) -> Tensor:
    return tensors[0] if len(tensors) == 1 else torch.stack(tensors).sum(0)


class _Grams:
    """Inner products of the objectives' gradients, summed over parameters."""

    def __init__(self, k: int, like: Tensor) -> None:
        self.targets, self.norms = like.new_zeros(k, k), like.new_zeros(k)

    def add(self, gradients: Tensor, *, target: bool) -> None:
        """Count the gradients ``(K, P)`` of one parameter."""
        self.norms += gradients.square().sum(1)
        if target:
            self.targets += gradients @ gradients.T

    def influence(self, max_norm: float) -> Tensor:
        """``(K,)``: ``I_k = c_k sum_j c_j <g_k, g_j>`` with the factors ``c`` of clipping."""
        scale = (max_norm / (self.norms.sqrt() + 1e-6)).clamp(max=1.0)
        return scale * (self.targets @ scale)


@dataclass(frozen=True, slots=True)
class _Use:
    """One call ``output = weight * inputs + bias``: a product of matrices, or elementwise after a normalization.

    ``begin`` are the edges at which the graph goes on beyond the call, but those to watched parameters.
    """

    inputs: Tensor
    output: Tensor
    weight: Tensor
    bias: Tensor | None
    elementwise: bool
    versions: tuple[int, int]
    begin: Sequence[tuple[Any, int]]

    def changed(self) -> bool:
        return self.versions != (self.inputs._version, self.output._version)

    def holds(self, param: Tensor) -> bool:
        return param is self.weight or param is self.bias

    def gradients(self, param: Tensor, delta: Tensor, factors: Tensor) -> Tensor:
        """``(K, P)`` from the derivative at the output and the factors ``(K, B)`` of the sequences."""
        rows = delta.to(factors.dtype).flatten(1, -2)
        if param is self.bias:
            return factors @ rows.sum(1)
        inputs = self.inputs.to(factors.dtype).flatten(1, -2)
        if self.elementwise:
            return factors @ (rows * inputs).sum(1)
        # the smaller of the two is scaled
        if rows.shape[-1] <= inputs.shape[-1]:
            flat = inputs.flatten(0, 1)
            found = [((rows * f[:, None, None]).flatten(0, 1).T @ flat).flatten() for f in factors]
        else:
            flat = rows.flatten(0, 1)
            found = [(flat.T @ (inputs * f[:, None, None]).flatten(0, 1)).flatten() for f in factors]
        return found[0][None] if len(found) == 1 else torch.stack(found)

    def along(self, param: Tensor, delta: Tensor, direction: Tensor) -> Tensor:
        """``(B,)``: each sequence's gradient times a direction ``(P,)``."""
        rows = delta.to(direction.dtype).flatten(1, -2)
        if param is self.bias:
            return rows.sum(1) @ direction
        inputs = self.inputs.to(direction.dtype).flatten(1, -2)
        if self.elementwise:
            return (rows * inputs).sum(1) @ direction
        matrix = direction.view(param.shape)
        # the smaller of the two products is made
        if rows.shape[-1] <= inputs.shape[-1]:
            return ((inputs @ matrix.T) * rows).sum((1, 2))
        return ((rows @ matrix) * inputs).sum((1, 2))


class _Watch(TorchFunctionMode):
    """Note where linear layers and normalizations use the parameters."""

    def __init__(self, params: Sequence[Tensor], rows: int) -> None:
        super().__init__()
        self.params, self.rows, self.uses = {id(p) for p in params}, rows, list[_Use]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        if func is F.linear:
            self._linear(output, *args, **kwargs)
        if func in _NORMS:
            self._norm(func, output, *args, **kwargs)
        return output

    def _linear(self, output: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        if self._known(output, input, weight, bias):
            self._note(input, output, input, weight, bias, elementwise=False)

    def _norm(
        self,
        func: Any,
        output: Tensor,
        input: Tensor,
        normalized_shape: Any,
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        **more: Any,
    ) -> None:
        if weight is not None and len(normalized_shape) == 1 and self._known(output, input, weight, bias):
            with torch.no_grad():
                normalized = func(input, normalized_shape, **more)
            self._note(normalized, output, input, weight, bias, elementwise=True)

    def _known(self, output: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        # with another first dimension the sequences cannot be told apart, as among positions shared by all
        batched = inputs.dim() > 2 and len(inputs) == self.rows and output.requires_grad
        return batched and (id(weight) in self.params or id(bias) in self.params)

    def _note(
        self, factor: Tensor, output: Tensor, inputs: Tensor, weight: Tensor, bias: Tensor | None, *, elementwise: bool
    ) -> None:
        others = [inputs, *(p for p in (weight, bias) if p is not None and id(p) not in self.params)]
        begin = [_edge(tensor) for tensor in others if tensor.requires_grad]
        versions = (factor._version, output._version)
        self.uses.append(_Use(factor.detach(), output, weight, bias, elementwise, versions, begin))


def _constant(slopes: Tensor, counted: Tensor) -> Tensor:
    """``(K, B)``: the slope of each sequence, which all of its tokens share."""
    first = counted.int().argmax(1)
    found = slopes[:, torch.arange(len(first), device=first.device), first]
    if not torch.equal(torch.where(counted, found[..., None], 0.0), slopes):
        raise UsageError('method "sequence" needs advantages that are constant within a sequence: use "backward"')
    return found
