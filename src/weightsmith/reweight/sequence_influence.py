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
    outputs = [use.output for use in watch.uses]
    parts = torch.autograd.grad(
        found, [*outputs, *everything], counted.to(found.dtype), retain_graph=True, allow_unused=True
    )
    # watched uses are cut off from their parameters: a parameter that still has a gradient is also used in another way
    left = [p for p, part in zip(everything, parts[len(outputs) :], strict=True) if part is not None]
    rest = [torch.autograd.grad(found, left, s.to(found.dtype), retain_graph=True) for s in each] if left else []
    grams = _Grams(len(each), each)
    with torch.no_grad():
        for index, p in enumerate(everything):
            known = [
                use.gradients(p, delta, per_sequence)
                for use, delta in zip(watch.uses, parts, strict=False)
                if delta is not None and use.holds(p)
            ]
            at = next((i for i, one in enumerate(left) if one is p), None)
            if at is not None:
                known.append(torch.stack([gradients[at].to(each.dtype).flatten() for gradients in rest]))
            if known:
                grams.add(torch.stack(known).sum(0), target=index < len(params))
        return grams.influence(max_norm)


class _Grams:
    """Inner products of the objectives' gradients, summed over parameters."""

    def __init__(self, k: int, like: Tensor) -> None:
        self.targets, self.norms = like.new_zeros(k, k), like.new_zeros(k)

    def add(self, gradients: Tensor, *, target: bool) -> None:
        """Count the gradients ``(K, P)`` of one parameter."""
        self.norms += gradients.square().sum(1)
        if target:
            self.targets += gradients @ gradients.T

    def influence(self, max_norm: float | None) -> Tensor:
        """``(K,)``: ``I_k = c_k sum_j c_j <g_k, g_j>`` with the factors ``c`` of clipping."""
        if max_norm is None:
            return self.targets.sum(1)
        scale = (max_norm / (self.norms.sqrt() + 1e-6)).clamp(max=1.0)
        return scale * (self.targets @ scale)


@dataclass(frozen=True, slots=True)
class _Use:
    """One call ``output = weight * inputs + bias``: a product of matrices, or elementwise after a normalization."""

    inputs: Tensor
    output: Tensor
    weight: Tensor
    bias: Tensor | None
    elementwise: bool
    versions: tuple[int, int]

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
            return torch.stack([((rows * f[:, None, None]).flatten(0, 1).T @ flat).flatten() for f in factors])
        flat = rows.flatten(0, 1)
        return torch.stack([(flat.T @ (inputs * f[:, None, None]).flatten(0, 1)).flatten() for f in factors])


class _Watch(TorchFunctionMode):
    """Note where linear layers and normalizations use the parameters, and cut those uses off from them."""

    def __init__(self, params: Sequence[Tensor], rows: int) -> None:
        super().__init__()
        self.params, self.rows, self.uses = {id(p) for p in params}, rows, list[_Use]()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.linear:
            return self._linear(*args, **kwargs)
        if func in _NORMS:
            return self._norm(func, *args, **kwargs)
        return func(*args, **kwargs)

    def _linear(self, inputs: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self._known(inputs, weight, bias):
            return F.linear(inputs, weight, bias)
        output = F.linear(inputs, self._cut(weight), None if bias is None else self._cut(bias))
        return self._noted(inputs, output, weight, bias, elementwise=False)

    def _norm(
        self, func: Any, inputs: Tensor, shape: Any, weight: Tensor | None = None, bias: Tensor | None = None,
        eps: float | None = None,
    ) -> Tensor:  # fmt: skip
        more: dict[str, Any] = {} if eps is None else {"eps": eps}
        if weight is None or len(shape) != 1 or not self._known(inputs, weight, bias):
            both = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
            return func(inputs, shape, **both, **more)  # type: ignore[no-any-return]
        given = {"weight": self._cut(weight)} | ({} if bias is None else {"bias": self._cut(bias)})
        output = func(inputs, shape, **given, **more)
        with torch.no_grad():
            normalized = func(inputs, shape, **more)
        return self._noted(normalized, output, weight, bias, elementwise=True)

    def _known(self, inputs: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
        # with another first dimension the sequences cannot be told apart, as among positions shared by all
        batched = inputs.dim() > 2 and len(inputs) == self.rows
        return batched and (id(weight) in self.params or id(bias) in self.params)

    def _cut(self, param: Tensor) -> Tensor:
        return param.detach() if id(param) in self.params else param

    def _noted(
        self, inputs: Tensor, output: Tensor, weight: Tensor, bias: Tensor | None, *, elementwise: bool
    ) -> Tensor:
        output.requires_grad_()
        versions = (inputs._version, output._version)
        self.uses.append(_Use(inputs.detach(), output, weight, bias, elementwise, versions))
        return output


def _constant(slopes: Tensor, counted: Tensor) -> Tensor:
    """``(K, B)``: the slope of each sequence, which all of its tokens share."""
    first = counted.int().argmax(1)
    found = slopes[:, torch.arange(len(first), device=first.device), first]
    if not torch.equal(torch.where(counted, found[..., None], 0.0), slopes):
        raise UsageError('method "sequence" needs advantages that are constant within a sequence: use "backward"')
    return found
