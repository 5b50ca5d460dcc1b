"""Weight Compander: write every weight as a bounded curve of a free number.

Training moves ``v``, the network sees ``w = a * arctan(v / b)``. The curve bounds weights to ``|w| < a * pi / 2`` and
lets gradients move weights near zero more than large ones; after training ``fold_`` writes ``w`` back as plain weight.

    w     = a * phi(v / b)                       phi = arctan (eq. 1-3), arcsinh or erf (section IV-F)
    dL/dv = dL/dw * (a / b) * phi'(v / b)
    dL/da = sum(dL/dw * w) / a                   only when the pair is learned
    dL/db = -sum(v * dL/dv) / b

Source: "Weight Compander: A Simple Weight Reparameterization for Regularization", Rinor Cakaj, Jens Mehnert, Bin Yang,
IJCNN 2023, arXiv 2306.16993.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightsmith.core.errors import UsageError, WeightsmithWarning, unknown
from weightsmith.reparam.curves import Curve, as_curve

CLIP = 0.95  # of the bound: there arctan still has 0.6 % of its slope at zero; closer means frozen


class WeightCompander(nn.Module):
    """The parametrization ``v -> w = a * phi(v / b)``, for ``torch.nn.utils.parametrize``.

    Arithmetic is in float32 at least; results have the dtype and memory format of their argument.

    Args:
        a: Height of the curve, > 0: arctan keeps ``|w| < a * pi / 2``, erf ``|w| < a``; arcsinh has no bound.
        b: Width of the curve, > 0; the slope at zero is ``a / b`` (erf: 1.13 times that).
        fn: ``"arctan"``, ``"arcsinh"``, ``"erf"`` or your own `Curve`.
        learnable: Train ``a`` and ``b``. They are plain parameters as in the paper and may reach 0.
        positive: Keep learned ``a`` and ``b`` above 0 through a softplus.
        overflow: What `right_inverse` does with weights that the curve cannot reach: ``"error"``, or ``"clip"`` to
            0.95 of the bound with a warning.

    Raises:
        UsageError: An argument is out of its range.
    """

    a: Tensor
    b: Tensor

    def __init__(
        self,
        a: float = 0.7,
        b: float = 0.7,
        fn: str | Curve = "arctan",
        *,
        learnable: bool = False,
        positive: bool = False,
        overflow: str = "error",
    ) -> None:
        for name, value in (("a", a), ("b", b)):
            if not (value > 0 and math.isfinite(value)):
                raise UsageError(f"{name} must be finite and above 0, got {value}")
        if overflow not in ("error", "clip"):
            raise unknown("overflow", overflow, ("error", "clip"))
        if positive and not learnable:
            raise UsageError("positive=True needs learnable=True: a fixed pair never changes")
        super().__init__()
        self.curve = as_curve(fn)
        self.learnable = learnable
        self.overflow = overflow
        for name, value in (("a", a), ("b", b)):
            start = torch.tensor(float(value), dtype=torch.float64)  # compand_ brings it to the weight's precision
            if learnable:
                self.register_parameter(name, nn.Parameter(start))
            else:
                self.register_buffer(name, start)
            if positive:
                parametrize.register_parametrization(self, name, _Positive())

    @property
    def bound(self) -> float:
        """Limit of ``|w|``; reads ``a`` from its device."""
        return abs(_number(self.a)) * self.curve.bound

    def forward(self, v: Tensor) -> Tensor:
        """Return ``w = a * phi(v / b)``, shaped like ``v``."""
        a, b = self._pair(v)
        # compilers fuse plain operations better than they see through a Function; torch.func needs them
        if torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
            return _evaluate(v, a, b, self.curve)
        w: Tensor = cast(Any, _Compand).apply(v, a, b, self.curve)
        return w

    def right_inverse(self, w: Tensor) -> Tensor:
        """Return ``v = b * phi^-1(w / a)``, shaped like ``w`` (eq. 4).

        Raises:
            UsageError: A weight is not finite, or lies outside the curve's range and ``overflow`` is ``"error"``.
        """
        return self.invert(self.admit({"weight": w})["weight"])

    @torch.no_grad()
    def derivative(self, v: Tensor) -> Tensor:
        """Return ``dw/dv = (a / b) * phi'(v / b)``, shaped like ``v``, in float32 at least."""
        a, b = self._pair(v)
        return _slope(v, a, b, self.curve)

    def assert_valid(self, name: str = "weight") -> None:
        """Raise `UsageError` when training has moved ``a`` or ``b`` to 0, below it, or to no finite number."""
        for which in ("a", "b"):
            value = _number(getattr(self, which))
            if not (value > 0 and math.isfinite(value)):
                raise UsageError(
                    f"{which} of the compander of {name} must be finite and above 0, got {value:.6g}: "
                    "training has moved it there; lower its learning rate or use positive=True"
                )

    def admit(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Check that the curve reaches the given weights; return them, clipped when ``overflow`` is ``"clip"``.

        Args:
            weights: Weights by the names that messages call them.

        Raises:
            UsageError: As for `right_inverse`; one message lists every weight out of reach.
        """
        peaks = {name: float(w.detach().abs().max()) if w.numel() else 0.0 for name, w in weights.items()}
        for name, peak in peaks.items():
            self.assert_valid(name)
            if not math.isfinite(peak):
                raise UsageError(f"{name} holds NaN or infinite values: it cannot be companded")
        if self.overflow == "clip":
            return self._clip(weights)
        # a weight within rounding of the bound may divide to the far side of the pole
        reach = {name: self.bound * (1 - 4 * torch.finfo(_precision(w)).eps) for name, w in weights.items()}
        over = {name: peak for name, peak in peaks.items() if peak >= reach[name]}
        if over:
            smallest = _round_up(max(_number(self.a) * peak / reach[name] for name, peak in over.items()))
            listed = ", ".join(f"{name} (max |w| = {peak:.6g})" for name, peak in over.items())
            raise UsageError(
                f"a={_number(self.a):.6g} keeps |w| below {self.bound:.6g} ({self.curve.name}), which does not hold "
                f'{listed}: the smallest sufficient a is {smallest:.4g}; or pass overflow="clip"'
            )
        return dict(weights)

    @torch.no_grad()
    def invert(self, w: Tensor, name: str = "weight") -> Tensor:
        """Return what `right_inverse` does, for a weight that `admit` has seen.

        Raises:
            UsageError: ``v`` would not be finite in the dtype of ``w``.
        """
        a, b = self._pair(w)
        v = (b * self.curve.inverse(w.to(a.dtype) / a)).to(w.dtype)
        if not v.isfinite().all():
            raise UsageError(f"{name} cannot be inverted in {w.dtype} with a={_number(a):.6g}: use a larger a")
        return v

    def _clip(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        limit = CLIP * self.bound
        counts = {name: int((w.abs() > limit).sum()) for name, w in weights.items()}
        listed = ", ".join(f"{count} of {weights[name].numel()} in {name}" for name, count in counts.items() if count)
        if listed:
            warnings.warn(f"clipped weights to |w| <= {limit:.6g}: {listed}", WeightsmithWarning, stacklevel=3)
        return {name: w.clamp(-limit, limit) if counts[name] else w for name, w in weights.items()}

    def _pair(self, like: Tensor) -> tuple[Tensor, Tensor]:
        dtype = _precision(like)
        return self.a.to(like.device, dtype), self.b.to(like.device, dtype)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if hasattr(destination, "_metadata"):  # torch keeps it with the state dict; a safetensors file does not
            destination._metadata[prefix[:-1]]["curve"] = self.curve.name

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        metadata, *_, errors = args
        if (curve := metadata.get("curve", self.curve.name)) != self.curve.name:
            errors.append(
                f"{prefix[:-1]} was trained with fn={curve!r} and is {self.curve.name!r} here, which would make other "
                f"weights of the same numbers: compand_(model, fn={curve!r}) before loading."
            )
        for name in () if self.learnable else ("a", "b"):
            mine, stored = _number(getattr(self, name)), _number(state_dict.get(prefix + name, torch.tensor(math.nan)))
            if not (math.isnan(mine) or math.isnan(stored) or math.isclose(mine, stored, rel_tol=1e-6)):
                warnings.warn(
                    f"{prefix}{name} is {stored:.6g} in the checkpoint and was {mine:.6g} here; "
                    "took the checkpoint's, which its weights were trained with",
                    WeightsmithWarning,
                    stacklevel=2,
                )
        super()._load_from_state_dict(state_dict, prefix, *args)

    def extra_repr(self) -> str:
        """Word the curve and the present pair."""
        return f"a={_number(self.a):.4g}, b={_number(self.b):.4g}, fn={self.curve.name}, learnable={self.learnable}"


class _Positive(nn.Module):
    def forward(self, raw: Tensor) -> Tensor:
        return F.softplus(raw)

    def right_inverse(self, value: Tensor) -> Tensor:
        return value + torch.log(-torch.expm1(-value))


class _Compand(torch.autograd.Function):
    """Keeps only ``v`` for the backward pass (and ``w``, which the layer keeps anyway, when ``a`` is learned)."""

    # forward takes ctx although setup_context is the newer way: the latter binds arguments by signature at every call,
    # which takes longer than the arctangents of a small layer

    @staticmethod
    def forward(ctx: Any, v: Tensor, a: Tensor, b: Tensor, curve: Curve) -> Tensor:
        w = _evaluate(v, a, b, curve)
        ctx.curve = curve
        ctx.save_for_backward(v, a, b, w if ctx.needs_input_grad[1] else None)
        return w

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        v, a, b, w = ctx.saved_tensors
        grad_w = grads[0].to(a.dtype)
        grad_v = _slope(v, a, b, ctx.curve) * grad_w
        grad_a = (grad_w * w).sum() / a if ctx.needs_input_grad[1] else None
        grad_b = -(v * grad_v).sum() / b if ctx.needs_input_grad[2] else None
        return grad_v.to(v.dtype), grad_a, grad_b, None


def _evaluate(v: Tensor, a: Tensor, b: Tensor, curve: Curve) -> Tensor:
    return (a * curve.value(v.to(a.dtype) / b)).to(v.dtype)


def _slope(v: Tensor, a: Tensor, b: Tensor, curve: Curve) -> Tensor:
    # (a/b) / (1 + (v/b)^2) rather than a*b / (b^2 + v^2): finite for every finite v
    return curve.slope(v.to(a.dtype) / b) * (a / b)


def _precision(like: Tensor) -> torch.dtype:
    return torch.promote_types(like.dtype, torch.float32)


def _number(value: Tensor) -> float:
    return math.nan if value.is_meta else float(value.detach())


def _round_up(value: float, digits: int = 4) -> float:
    scale = 10.0 ** (digits - 1 - math.floor(math.log10(value)))
    return math.ceil(value * scale * (1 + 1e-9)) / scale
