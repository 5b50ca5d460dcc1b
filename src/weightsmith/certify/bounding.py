"""Bounds of a network's outputs over a box of inputs.

Interval bound propagation (IBP) carries both ends forward; CROWN carries linear functions backward and is tighter and
dearer; CROWN-IBP takes the intervals of IBP inside and one backward pass. Source: arXiv 2103.17268, 1810.12715,
1811.00866 and 1906.06316.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from weightsmith.certify.box import Eps, check_spec, input_box, margins_of
from weightsmith.certify.crown import Backward, ReluMode
from weightsmith.certify.elision import elided, tolerance_of
from weightsmith.certify.interval import Interval
from weightsmith.certify.passes import Options, Pass, Statistics, working_dtype
from weightsmith.certify.precision import full_precision
from weightsmith.certify.propagate import propagate
from weightsmith.certify.refine import refiner
from weightsmith.certify.traced import Traced, as_inputs
from weightsmith.core.errors import UsageError, unknown

Method = Literal["ibp", "crown-ibp", "crown"]
Rounding = Literal["nearest", "outward"]


@dataclass(frozen=True, slots=True)
class Bounds:
    """Proved ends of every output, and with which arithmetic they were computed.

    Attributes:
        lower: No input of the box gives less: ``(B, K)``, or ``(B, S)`` with a specification.
        upper: No input of the box gives more.
        method: How they were found.
        rounding: ``"outward"``: they hold for real arithmetic, rounding errors included. ``"nearest"``: up to rounding.
        tolerance: By how much rounding may have moved an end, an estimate from the size of what was added up; 0 where
            rounding went outward.
    """

    lower: Tensor
    upper: Tensor
    method: Method = "ibp"
    rounding: Rounding = "nearest"
    tolerance: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundOptions:
    """How bounds are computed.

    Attributes:
        intersect: ``"crown"``, ``"crown-ibp"``: keep the tighter of the backward and the interval bound everywhere.
        relu: Lower line of ReLU in backward passes: ``"adaptive"``, ``"zero-lb"``, ``"one-lb"`` or ``"same-slope"``.
        dtype: ``torch.float32`` or ``torch.float64``; ``None``: float32, or float64 for a float64 model or input.
        rounding: ``"outward"``: compute in float64 and widen every result by its largest rounding error (``"ibp"``
            only).
        statistics: What batch norm in training mode is normalized by: ``"clean"`` activations, or ``"center"`` of the
            intervals.
        detach_statistics: These carry no gradient: cheaper, and not what the paper does.
        update_statistics: Batch norm in training mode updates its running statistics, once per call.
    """

    intersect: bool = False
    relu: ReluMode = "adaptive"
    dtype: torch.dtype | None = None
    rounding: Rounding = "nearest"
    statistics: Statistics = "clean"
    detach_statistics: bool = False
    update_statistics: bool = True

    def __post_init__(self) -> None:
        for name, kind in (("relu", ReluMode), ("rounding", Rounding), ("statistics", Statistics)):
            if getattr(self, name) not in get_args(kind):
                raise unknown(name, str(getattr(self, name)), get_args(kind))


def bounds(
    model: nn.Module | Traced,
    x: Any,
    eps: Eps,
    *,
    method: Method = "ibp",
    lower: Any = None,
    upper: Any = None,
    C: Tensor | None = None,
    options: BoundOptions | None = None,
) -> Bounds:
    """Bound the outputs of a model over all inputs within ``eps`` of ``x``, elementwise (L-infinity).

    Bounds are computed in float32, inside autocast too, because the rounding of half precision would break them; see
    `BoundOptions`. They are differentiable. In training mode batch norm uses the batch, as the model would.

    Args:
        model: Any model of common layers and functions, or `trace` of it, which saves tracing again.
        x: Inputs ``(B, ...)``; a tuple when the model has several: the first one is perturbed, the others are known
            exactly.
        eps: Largest change of every number, in the units of ``x``; a number or a tensor that broadcasts. ``None``:
            ``lower`` and ``upper`` are the box.
        method: ``"ibp"``, ``"crown-ibp"`` or ``"crown"``, from cheap to tight (usually).
        lower: Least valid input, a number or a tensor that broadcasts; ``None``: inputs are not clipped.
        upper: Largest valid input, likewise.
        C: Bound ``C z`` instead of the outputs ``z``: ``(S, K)``, or ``(B, S, K)`` for rows of each example's own.
        options: The rest; ``None``: the defaults of `BoundOptions`.

    Returns:
        Ends of shape ``(B, K)`` (the model's output shape), or ``(B, S)`` with ``C``.

    Raises:
        UsageError: An argument is out of range or does not fit.
        UnsupportedOperation: The model has an operation without bounds (a ``NotImplementedError``).

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from weightsmith import certify
        >>> found = certify.bounds(nn.Linear(2, 1), torch.zeros(3, 2), 0.1, lower=0.0, upper=1.0)
        >>> found.lower.shape
        torch.Size([3, 1])
    """
    inputs, options = as_inputs(x), options or BoundOptions()
    box = make_box(model, inputs, eps, lower, upper, options)
    traced = model if isinstance(model, Traced) else Traced(model, inputs)
    return bound_box(traced, (box, *inputs[1:]), inputs, method=method, C=C, options=options)


def margins(
    model: nn.Module | Traced, x: Any, labels: Tensor, eps: Eps, *, method: Method = "ibp", lower: Any = None,
    upper: Any = None, options: BoundOptions | None = None,
) -> Bounds:  # fmt: skip
    """Bound ``z_y - z_j`` for the label ``y`` and every other class ``j``; all lower ends above 0 prove the label.

    Args:
        model: See `bounds`.
        x: Likewise.
        labels: ``(B,)``.
        eps: See `bounds`.
        method: Likewise.
        lower: Likewise.
        upper: Likewise.
        options: Likewise.

    Returns:
        Ends of shape ``(B, K - 1)``, the other classes in increasing order.

    Raises:
        UsageError: A label is out of range, or see `bounds`.
    """
    inputs, options = as_inputs(x), options or BoundOptions()
    box = make_box(model, inputs, eps, lower, upper, options)
    traced = model if isinstance(model, Traced) else Traced(model, inputs)
    return bound_box(traced, (box, *inputs[1:]), inputs, method=method, C=labels, options=options)


def make_box(model: Any, inputs: Sequence[Any], eps: Eps, lower: Any, upper: Any, options: BoundOptions) -> Interval:
    """The box around the first input, in the type that bounds are computed in."""
    dtype = _dtype(model.model if isinstance(model, Traced) else model, inputs, options)
    return input_box(inputs[0].to(dtype), eps, lower, upper, outward=options.rounding == "outward")


def _dtype(model: nn.Module, inputs: Sequence[Any], options: BoundOptions) -> torch.dtype:
    if options.rounding == "outward":
        if options.dtype == torch.float32:
            raise UsageError("rounding='outward' computes in float64: leave dtype=None")
        return torch.float64
    return working_dtype(model, inputs, options.dtype)


def bound_box(
    traced: Traced, inputs: Sequence[Any], clean: Sequence[Any], *, method: Method, C: Tensor | None,
    options: BoundOptions, both: bool = True,
) -> Bounds:  # fmt: skip
    """Bounds over a box; ``C`` may be labels ``(B,)``, for margins. With ``both`` unset ``upper`` is ``lower``."""
    done = run_box(traced, inputs, clean, method=method, options=options)
    spec = specification(done, C)
    ends = ends_of(traced, done, spec, method=method, options=options, both=both)
    outward = options.rounding == "outward"
    if not bool((ends.upper >= ends.lower).all()):  # an overflow inside: nothing is known
        ends = Interval(
            torch.where(ends.lower.isnan(), -torch.inf, ends.lower),
            torch.where(ends.upper.isnan(), torch.inf, ends.upper),
        )
    tolerance = 0.0 if outward else tolerance_of(done, ends, spec)
    return Bounds(*_with_infinity(ends.lower, ends.upper), method, options.rounding, tolerance)


def _with_infinity(lower: Tensor, upper: Tensor) -> tuple[Tensor, Tensor]:
    """Give masked outputs their infinite values back, which are finite on the way: see `finite`."""
    least = torch.finfo(lower.dtype).min / 16
    if not bool((lower < least).any()) and not bool((upper > -least).any()):
        return lower, upper
    return torch.where(lower < least, -torch.inf, lower), torch.where(upper > -least, torch.inf, upper)


def run_box(
    traced: Traced, inputs: Sequence[Any], clean: Sequence[Any], *, method: Method, options: BoundOptions,
    want_clean: bool = False,
) -> Pass:  # fmt: skip
    """The forward pass of a method: intervals everywhere, refined by backward passes for ``"crown"``.

    Raises:
        UsageError: The method is unknown.
    """
    if method not in get_args(Method):
        raise unknown("method", str(method), get_args(Method))
    outward = options.rounding == "outward"
    if outward and method != "ibp":
        raise UsageError(f"rounding='outward' is there for method='ibp' only, got method={method!r}")
    box = inputs[0]
    dtype = box.sample.dtype
    how = Options(options.statistics, options.detach_statistics, dtype, outward, options.update_statistics)
    with full_precision(box.sample.device.type):
        graph, refine = traced.graph(clean), None
        if method == "crown":
            refine = refiner(graph, traced.axes(graph, clean), len(box.sample), options.relu, options.intersect)
        clean = [item.to(dtype) if isinstance(item, Tensor) and item.is_floating_point() else item for item in clean]
        given = [box, *clean[1:]]
        return propagate(graph, given, clean, options=how, want_clean=want_clean, refine=refine)


def specification(done: Pass, C: Tensor | None) -> Tensor | None:
    """Check a specification, or turn labels into one.

    Raises:
        UsageError: It does not fit the model's output.
    """
    if C is None:
        return None
    shape, like = done.output.shape, done.output.sample
    if len(shape) != 2:
        raise UsageError(f"C needs a model with outputs (B, K), this one has {tuple(shape)}")
    if isinstance(C, Tensor) and C.dim() == 1:
        if len(C) != len(like):
            raise UsageError(f"labels must be one per example, ({len(like)},), got {tuple(C.shape)}")
        return margins_of(C, shape[1], like)
    return check_spec(C, shape[0], shape[1], like)


def ends_of(
    traced: Traced, done: Pass, spec: Tensor | None, *, method: Method, options: BoundOptions, both: bool = True
) -> Interval:
    """The ends that a method gives for ``C z``, or for all outputs."""
    with full_precision(done.output.sample.device.type):
        if method == "ibp":
            return elided(done, spec)
        output = done.output
        backward = Backward(done, traced.axes(done.graph, done.inputs), output.shape[0], options.relu)
        if spec is None:
            width = output.shape[1:].numel()
            rows = torch.eye(width, dtype=output.sample.dtype, device=output.sample.device)
            rows = rows[:, None].expand(-1, output.shape[0], -1).reshape(width, *output.shape)
        else:
            rows = spec.transpose(0, 1)
        count = len(rows)
        found = backward.lower(done.graph.output, torch.cat([rows, -rows]) if both else rows)
        low = found[:, :count]
        high = -found[:, count:] if both else low
        if options.intersect:
            other = elided(done, spec)
            flat = (end.reshape(low.shape) for end in (other.lower, other.upper))
            first, second = flat
            low, high = torch.maximum(low, first), torch.minimum(high, second) if both else low
        shape = output.shape if spec is None else low.shape
        return Interval(low.reshape(shape), high.reshape(shape))
