"""The tangent kernel of any model on some samples, three ways, within a memory budget.

``K = J J^T``, where ``J`` holds the derivatives of all outputs by the parameters: what a step of gradient descent does
to the outputs. Rows are ordered sample first, then output.

- ``jacobian``: explicit ``J``, a few parameters at a time, and blocks of samples where one tensor is too large. Memory:
  the kernels, and the budget.
- ``contract``: linear layers and convolutions from their inputs and derivatives, without ``J``; the rest as above.
  Memory: the kernels, and the derivatives of all outputs by what a layer computes.
- ``sketch``: products of ``J`` with random directions. Memory: rows times directions; the kernel is never formed.

``contract`` gives the same numbers as ``jacobian``, ``sketch`` an estimate with a standard error.
"""

import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, reason
from weightsmith.core.parameters import WhereParameter
from weightsmith.diagnose import _contract, _jacobian, _sketch
from weightsmith.diagnose._function import Function, Outputs, chosen, quietly
from weightsmith.diagnose.alignment import kernel_alignment
from weightsmith.diagnose.options import KernelOptions, KernelPlan, in_bytes

_TIMED = 256


@dataclass(frozen=True, slots=True)
class TangentKernel:
    """A tangent kernel, layer by layer.

    Attributes:
        parts: By layer (the module that owns the parameters): ``(R, R)``; of a sketch, under ``""``, its factors
            ``(R, Q, probes)``.
        plan: How it was computed.
    """

    parts: Mapping[str, Tensor]
    plan: KernelPlan

    @property
    def matrix(self) -> Tensor:
        """The kernel ``(R, R)`` of all parameters together; of a sketch the estimate."""
        if self.plan.method == "sketch":
            f = self.parts[""].flatten(1)
            return f @ f.T / self.plan.probes
        return torch.stack(list(self.parts.values())).sum(0)

    def alignment(self, after: "TangentKernel") -> tuple[float, float]:
        """The alignment with a later kernel of the same inputs, and its standard error: 0 unless it is a sketch.

        Raises:
            UsageError: The two were computed in different ways.
        """
        _comparable(self, after)
        if self.plan.method == "sketch":
            return _sketch.alignment(self.parts[""], after.parts[""], "the tangent kernel")
        return kernel_alignment(self.matrix, after.matrix, what="the tangent kernel"), 0.0

    def alignment_per_layer(self, after: "TangentKernel") -> dict[str, float]:
        """The alignment of each layer's kernel; empty for a sketch."""
        _comparable(self, after)
        if self.plan.method == "sketch":
            return {}
        return {
            name: kernel_alignment(k, after.parts[name], what=f"the tangent kernel of {name or 'the model'}")
            for name, k in self.parts.items()
        }


def plan_kernel(
    model: nn.Module,
    inputs: Any,
    *,
    params: WhereParameter = None,
    outputs: Outputs = None,
    batch_dim: int = 0,
    options: KernelOptions | None = None,
) -> KernelPlan:
    """Say how a tangent kernel would be computed, with its memory and time; one forward pass is all that runs.

    Args:
        model: As for `tangent_kernel`.
        inputs: As there.
        params: As there.
        outputs: As there.
        batch_dim: As there.
        options: As there.

    Raises:
        UsageError: As `tangent_kernel`.
    """
    function = Function(model, chosen(model, params), inputs, outputs, batch_dim)
    with quietly(model):
        return _prepare(function, options or KernelOptions())[0]


def tangent_kernel(
    model: nn.Module,
    inputs: Any,
    *,
    params: WhereParameter = None,
    outputs: Outputs = None,
    batch_dim: int = 0,
    options: KernelOptions | None = None,
) -> TangentKernel:
    """Compute the tangent kernel of a model on some samples.

    The model is in evaluation mode meanwhile; modes, flags, buffers and random generators are as before afterwards.

    Args:
        model: Any module of which samples do not influence each other in evaluation mode.
        inputs: A tensor, a tuple of positional or a mapping of keyword arguments, each tensor with the samples along
            ``batch_dim``; other things are passed as they are.
        params: Which parameters: glob(s) over their names, or a predicate ``(name, parameter) -> bool``. ``None``: all
            that are trained. A tied one counts once.
        outputs: Maps what the model returns to ``(N, O)``; it is also called for one sample alone. ``None``: the
            logits or first tensor, all its numbers.
        batch_dim: Dimension of inputs and outputs that counts samples.
        options: See `KernelOptions`.

    Returns:
        The kernel.

    Raises:
        UsageError: The model, its outputs or an argument do not fit; samples influence each other; or an exact method
            was asked for and the kernel itself does not fit the budget.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> kernel = tangent_kernel(net, torch.randn(5, 3))
        >>> kernel.matrix.shape
        torch.Size([10, 10])
    """
    function = Function(model, chosen(model, params), inputs, outputs, batch_dim)
    with quietly(model):
        try:
            plan, function, recorded = _prepare(function, options or KernelOptions())
            return _compute(function, plan, recorded, options or KernelOptions())
        except RuntimeError as error:
            if "use_reentrant" not in str(error):
                raise
            raise UsageError(
                "the model checkpoints activations with use_reentrant=True, which has no derivative by single "
                "parameters: switch checkpointing off while it is probed, or use use_reentrant=False"
            ) from error


def _prepare(function: Function, options: KernelOptions) -> tuple[KernelPlan, Function, _contract.Recorded | None]:
    start = time.perf_counter()
    with torch.no_grad():
        out = function.batch()
    forward = time.perf_counter() - start
    samples, outputs = out.shape
    if not outputs:
        raise UsageError("the model returns no outputs")
    _check_independence(function, out)
    if options.reduce == "random":
        generator = torch.Generator().manual_seed(options.seed)
        combine = torch.randn(samples, outputs, generator=generator, dtype=torch.float64).to(out)
        function, outputs = replace(function, combine=combine), 1
    widths = _jacobian.widths(function, list(function.params))
    dtype = options.dtype or (torch.float64 if out.dtype == torch.float64 else torch.float32)
    item, parameters = dtype.itemsize, sum(widths.values())
    n = samples * outputs
    layers = {name.rpartition(".")[0] for name in widths}
    kernels = (samples if options.reduce == "trace" else n) ** 2 * len(layers) * item
    flops = _flops(function.device, dtype)
    recorded = None

    def jacobian() -> tuple[int, float]:
        groups = _jacobian.groups(function, list(widths), n, item, options.budget)
        largest = max(sum(widths[name] for name in group) for group in groups)
        held = min(4 * n * largest * item, max(options.budget, 4 * outputs * largest * item))
        return kernels + held, len(groups) * outputs * 2 * forward + 2 * n * n * parameters / flops

    def contract(recorded: _contract.Recorded) -> tuple[int, float]:
        rest = [name for name in widths if name not in recorded.uses]
        most = [
            _contract.memory(uses, name, samples, outputs, widths[name], item) for name, uses in recorded.uses.items()
        ]
        more = min(n * sum(widths[name] for name in rest) * item, options.budget)
        return kernels + max([*most, more, 0]), 3 * outputs * forward + 2 * n * n * parameters / flops / 2

    method = options.method
    needed, seconds = jacobian()
    if method == "auto":
        if kernels > options.budget:
            method = "sketch"
        elif n * parameters * item <= options.budget:
            method = "jacobian"
        else:
            recorded = _contract.record(function)
            method = "contract" if recorded.uses and contract(recorded)[0] <= options.budget else "jacobian"
    if method == "sketch":
        needed, seconds = n * options.probes * item, options.probes * 2.5 * forward
    elif kernels > options.budget:
        raise UsageError(
            f"budget {in_bytes(options.budget)} does not hold {len(layers)} kernels of "
            f"{in_bytes(kernels // len(layers))}: take fewer samples, reduce='trace' or 'random', or method='sketch'"
        )
    if method == "contract":
        recorded = recorded or _contract.record(function)
        needed, seconds = contract(recorded)
    covered = sum(widths[name] for name in recorded.uses) / parameters if recorded and method == "contract" else 0.0
    plan = KernelPlan(
        method=method, reduce=options.reduce, samples=samples, outputs=outputs, parameters=parameters,
        contracted=covered, layers=1 if method == "sketch" else len(layers),
        probes=options.probes if method == "sketch" else 0, memory=needed, seconds=seconds, budget=options.budget,
        dtype=dtype,
    )  # fmt: skip
    return plan, function, recorded if method == "contract" else None


def _compute(
    function: Function, plan: KernelPlan, recorded: _contract.Recorded | None, options: KernelOptions
) -> TangentKernel:
    if plan.method == "sketch":
        found = _sketch.factors(function, plan.probes, options.seed, plan.dtype, plan.budget)
        return TangentKernel({"": found if plan.reduce == "trace" else found.flatten(0, 1)[:, None]}, plan)
    trace, rows, device = plan.reduce == "trace", plan.rows, function.device
    parts = {
        name.rpartition(".")[0]: torch.zeros(rows, rows, dtype=plan.dtype, device=device) for name in function.params
    }

    def add(name: str, first: int, second: int, block: Tensor) -> None:
        kernel = parts[name.rpartition(".")[0]]
        kernel[first : first + block.shape[0], second : second + block.shape[1]] += block
        if first != second:
            kernel[second : second + block.shape[1], first : first + block.shape[0]] += block.T

    contracted = list(recorded.uses) if recorded is not None else []
    if recorded is not None and contracted:
        _contract.accumulate(recorded, contracted, plan.dtype, plan.budget, trace, add)
    rest = [name for name in function.params if name not in contracted]
    if rest:
        _jacobian.accumulate(function, rest, plan.outputs, plan.dtype, plan.budget, trace, add)
    return TangentKernel(parts, plan)


def _check_independence(function: Function, out: Tensor) -> None:
    if function.samples < 2:
        return
    try:
        with torch.no_grad():
            alone = function.part(0, 1).batch()
    except UsageError:
        raise
    except Exception as error:
        raise UsageError(
            f"the model does not take one sample alone (batch statistics?), so it has no tangent kernel per sample: "
            f"{reason(error)}"
        ) from error
    scale = float(out.abs().max())
    tolerance = 100 * torch.finfo(out.dtype).eps * max(scale, 1.0)
    if alone.shape[1:] != out.shape[1:] or (
        bool(out.isfinite().all()) and float((alone[0] - out[0]).abs().max()) > tolerance
    ):
        raise UsageError(
            "the outputs of a sample depend on the others, even in evaluation mode (batch statistics? padding? a "
            "batch_dim other than the model's?): such a model has no tangent kernel per sample"
        )


def _comparable(one: TangentKernel, other: TangentKernel) -> None:
    for name in ("method", "reduce", "samples", "outputs", "probes"):
        if getattr(one.plan, name) != getattr(other.plan, name):
            exact = {one.plan.method, other.plan.method} == {"jacobian", "contract"}
            if name == "method" and exact:
                continue
            raise UsageError(
                f"kernels can only be compared with equal {name}: "
                f"{getattr(one.plan, name)} before, {getattr(other.plan, name)} after"
            )
    if one.parts.keys() != other.parts.keys():
        raise UsageError("kernels can only be compared for the same layers")


def _flops(device: torch.device, dtype: torch.dtype) -> float:
    a = torch.ones(_TIMED, _TIMED, device=device, dtype=dtype)
    a @ a
    start = time.perf_counter()
    (a @ a).sum().item()
    return 2 * _TIMED**3 / max(1e-9, time.perf_counter() - start)
