"""The tangent kernel of linear layers and convolutions without their Jacobians.

A weight that is used at positions ``t`` with inputs ``h_t`` and derivatives ``d_t`` of an output by what it computes
has the gradient ``sum_t d_t h_t^T``, so that two gradients have the inner product
``sum_{t,t'} (d_{a,t} . d_{b,t'}) (h_{a,t} . h_{b,t'})``. Where there are many positions the gradients themselves are
formed from ``d`` and ``h``. Uses are recorded while the model runs, whether by modules or by functions; a parameter
that is used in any other way is left to the explicit Jacobian, and so is one whose recorded gradient is not autograd's.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from weightsmith.diagnose._function import Function
from weightsmith.diagnose._jacobian import Add

_LINEAR = {F.linear}
_CONV = {torch.conv2d, F.conv2d}
_MOST_PAIRS = 4096
_CONV_ARGUMENTS = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")


@dataclass
class Use:
    """One use of a weight.

    Attributes:
        weight: Name of the weight, if it is one of the parameters.
        bias: Name of the bias, if it is one.
        inputs: What it was applied to.
        result: What came out.
        conv: Settings of a convolution; ``None``: linear.
        axis: Where ``result`` counts samples.
    """

    weight: str | None
    bias: str | None
    inputs: Tensor
    result: Tensor
    conv: dict[str, Any] | None
    axis: int = 0

    def before(self) -> Tensor:
        """Inputs ``(N, positions, in)``."""
        h = self.inputs.detach()
        if self.conv is None:
            return h.movedim(self.axis, 0).reshape(h.shape[self.axis], -1, h.shape[-1])
        return F.unfold(h, **self.conv).mT

    def after(self, delta: Tensor) -> Tensor:
        """Derivatives ``(O, *result)`` as ``(N, O, positions, out)``."""
        d = delta.movedim(self.axis + 1, 0)
        if self.conv is None:
            return d.reshape(*d.shape[:2], -1, d.shape[-1])
        return d.flatten(3).mT


class _Recorder(TorchFunctionMode):
    """Writes down where parameters are used."""

    def __init__(self, params: dict[str, Any]) -> None:
        self.names = {id(parameter): name for name, parameter in params.items()}
        self.uses: list[Use] = []
        self.other: set[str] = set()
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        involved = {self.names[id(leaf)] for leaf in tree_leaves((args, kwargs)) if id(leaf) in self.names}
        if involved and any(isinstance(leaf, Tensor) for leaf in tree_leaves(result)):
            use = self._use(func, args, kwargs, result)
            if use is None or involved != {name for name in (use.weight, use.bias) if name}:
                self.other |= involved
            else:
                self.uses.append(use)
        return result

    def _use(self, func: Any, args: Any, kwargs: Any, result: Any) -> Use | None:
        if func not in _LINEAR and func not in _CONV:
            return None
        given = dict(zip(_CONV_ARGUMENTS, args, strict=False)) | kwargs
        weight, bias = (self.names.get(id(given.get(key))) for key in ("weight", "bias"))
        if not isinstance(result, Tensor) or id(given["input"]) in self.names or not result.requires_grad:
            return None
        conv = None
        if func in _CONV:
            padding = given.get("padding", 0)
            if given.get("groups", 1) != 1 or isinstance(padding, str) or given["input"].dim() != 4:
                return None
            conv = {"kernel_size": given["weight"].shape[2:], "padding": padding}
            conv |= {key: given.get(key, 1) for key in ("stride", "dilation")}
        return Use(weight, bias, given["input"], result, conv)


@dataclass
class Recorded:
    """Outputs of the model with what led to them.

    Attributes:
        out: Outputs ``(N, O)`` with their graph.
        uses: By parameter: where it is used; parameters that are not here need a Jacobian.
    """

    out: Tensor
    uses: dict[str, list[Use]]


def record(function: Function) -> Recorded:
    """Run the model and find the parameters of which all uses are known and confirmed by autograd."""
    recorder = _Recorder(function.params)
    with recorder:
        out = function.batch()
    found: dict[str, list[Use]] = {}
    for use in recorder.uses:
        for name in (use.weight, use.bias):
            if name is not None and name not in recorder.other:
                found.setdefault(name, []).append(use)
    params = function.params
    found = {name: uses for name, uses in found.items() if not params[name].is_complex()}
    return Recorded(out, _confirmed(function, out, found))


def _confirmed(function: Function, out: Tensor, found: dict[str, list[Use]]) -> dict[str, list[Use]]:
    """Those whose gradient is what autograd says; their batch axes are found on the way."""
    if not found or not out.requires_grad:
        return {}
    uses = list({id(use): use for parts in found.values() for use in parts}.values())
    generator = torch.Generator().manual_seed(0)
    weights, factors = (torch.randn(size, generator=generator).to(out) for size in reversed(out.shape))
    wanted = [*(use.result for use in uses), *(function.params[name] for name in found)]
    total = out @ weights
    plain, scaled = (
        torch.autograd.grad(loss.sum(), wanted, retain_graph=True, allow_unused=True)
        for loss in (total, total * factors)
    )
    deltas: dict[int, Tensor] = {}
    for use, before, after in zip(uses, plain, scaled, strict=False):
        delta = torch.zeros_like(use.result) if after is None else after
        possible = _axes(use, torch.zeros_like(delta) if before is None else before, delta, factors)
        if len(possible) == 1 or (possible and function.samples == 1):  # of one sample and one position, either will do
            use.axis = possible[0]
            deltas[id(use)] = delta
    return {
        name: parts
        for (name, parts), expected in zip(found.items(), scaled[len(uses) :], strict=True)
        if all(id(use) in deltas for use in parts) and _agrees(function.params[name], name, parts, deltas, expected)
    }


def _agrees(parameter: Tensor, name: str, parts: list[Use], deltas: dict[int, Tensor], expected: Tensor | None) -> bool:
    total = torch.zeros_like(parameter)
    for use in parts:
        d = use.after(deltas[id(use)][None])[:, 0]
        product = torch.einsum("nto,nti->oi", d, use.before()) if use.weight == name else d.sum((0, 1))
        total = total + product.reshape(total.shape)
    return _close(total, torch.zeros_like(total) if expected is None else expected)


def _axes(use: Use, plain: Tensor, scaled: Tensor, factors: Tensor) -> list[int]:
    """The dimensions of a result that may count samples: with the outputs of each, its derivatives there are scaled.

    That a size is the number of samples proves nothing: there may be as many positions, or an expert may get as many
    tokens.
    """
    samples = len(factors)
    found = []
    for axis in range(1 if use.conv is not None else plain.dim() - 1):
        if plain.shape[axis] == samples and use.inputs.shape[axis] == samples:
            shape = [-1 if i == axis else 1 for i in range(plain.dim())]
            if _close(plain * factors.to(plain).view(shape), scaled):
                found.append(axis)
    return found


def _close(one: Tensor, other: Tensor) -> bool:
    if not one.numel():
        return True
    scale = max(float(one.abs().max()), float(other.abs().max()), 1e-30)
    return float((one - other).abs().max()) <= min(1000 * torch.finfo(one.dtype).eps, 0.05) * scale


def accumulate(recorded: Recorded, names: list[str], dtype: torch.dtype, budget: int, trace: bool, add: Add) -> None:
    """Give ``add`` the kernel of each of these parameters, like `weightsmith.diagnose._jacobian.accumulate`."""
    samples, outputs = recorded.out.shape
    left = list(names)
    while left:
        group: list[str] = []
        uses: dict[int, Use] = {}
        size = 0
        while left:  # as many layers at a time as the derivatives of half the budget allow
            new = {id(use): use for use in recorded.uses[left[0]] if id(use) not in uses}
            more = sum(use.result.numel() for use in new.values()) * outputs * dtype.itemsize
            if group and size + more > budget // 2:
                break
            uses |= new
            size += more
            group.append(left.pop(0))
        deltas = _deltas(recorded.out, list(uses.values()))
        for name in group:
            parts = [(use, use.after(deltas[id(use)]).to(dtype)) for use in recorded.uses[name]]
            if parts[0][0].weight == name:
                _weight(name, parts, samples, outputs, dtype, trace, add)
            else:
                total = sum(d.sum(2) for _, d in parts)
                assert isinstance(total, Tensor)
                j = total.flatten(1) if trace else total.flatten(0, 1)
                add(name, 0, 0, j @ j.T)


def _deltas(out: Tensor, uses: list[Use]) -> dict[int, Tensor]:
    """Derivatives of each output, of all samples at once, by the results of uses: ``(O, *result)``."""
    outputs = out.shape[1]
    results = [use.result for use in uses]
    found = [torch.zeros(outputs, *result.shape, dtype=result.dtype, device=result.device) for result in results]
    for k in range(outputs):
        grads = torch.autograd.grad(out[:, k].sum(), results, retain_graph=True, allow_unused=True)
        for buffer, grad in zip(found, grads, strict=True):
            if grad is not None:
                buffer[k] = grad
    return {id(use): buffer for use, buffer in zip(uses, found, strict=True)}


def _weight(
    name: str, parts: list[tuple[Use, Tensor]], samples: int, outputs: int, dtype: torch.dtype, trace: bool, add: Add
) -> None:
    h = torch.cat([use.before().to(dtype) for use, _ in parts], 1)  # (N, T, in)
    d = torch.cat([delta for _, delta in parts], 2)  # (N, O, T, out)
    positions = h.shape[1]
    if forms_gradients(positions, h.shape[2]):
        j = torch.einsum("nkto,nti->nkoi", d, h)
        j = j.flatten(1) if trace else j.flatten(0, 1).flatten(1)
        add(name, 0, 0, j @ j.T)
        return
    ends = [d[:, :, t].any() for t in range(positions)]
    total = torch.zeros(*(2 * (samples if trace else samples * outputs,)), dtype=dtype, device=h.device)
    for t in range(positions):
        for other in range(t + 1):
            if not (ends[t] and ends[other]):
                continue
            same = h[:, t] @ h[:, other].T
            if trace:
                block = (d[:, :, t].flatten(1) @ d[:, :, other].flatten(1).T).mul_(same)
            else:
                block = d[:, :, t].flatten(0, 1) @ d[:, :, other].flatten(0, 1).T
                block.view(samples, outputs, samples, outputs).mul_(same[:, None, :, None])
            total += block
            if other != t:
                total += block.T
    add(name, 0, 0, total)


def forms_gradients(positions: int, inputs: int) -> bool:
    """Whether forming the gradients is cheaper than all pairs of positions."""
    return positions**2 > min(_MOST_PAIRS, 2 * inputs)


def memory(uses: list[Use], name: str, samples: int, outputs: int, width: int, itemsize: int) -> int:
    """Bytes that the kernel of one parameter takes beyond the kernel itself."""
    deltas = sum(use.result.numel() for use in uses) * outputs
    if uses[0].weight != name:
        return 2 * deltas * itemsize
    out = uses[0].result.shape[1 if uses[0].conv is not None else -1]
    positions = sum(use.result.numel() for use in uses) // (samples * out)
    inputs = width // out
    formed = samples * outputs * width if forms_gradients(positions, inputs) else 2 * (samples * outputs) ** 2
    return (2 * deltas + samples * positions * inputs + formed) * itemsize
