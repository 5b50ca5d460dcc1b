"""Is a model learning features, or only how to read them out? A probe that looks at it before and after training."""

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.core.parameters import WhereParameter
from weightsmith.core.select import Where, select
from weightsmith.diagnose._activity import NAN, Activity, observe
from weightsmith.diagnose._function import (
    Outputs,
    chosen,
    count,
    digest,
    take,
)
from weightsmith.diagnose.alignment import (
    kernel_alignment,
    kernel_target_alignment,
    sign_similarity,
    weight_change,
)
from weightsmith.diagnose.kernels import plan_kernel, tangent_kernel
from weightsmith.diagnose.options import KernelOptions, KernelPlan
from weightsmith.diagnose.rank import effective_rank
from weightsmith.diagnose.report import LazinessReport
from weightsmith.diagnose.snapshot import Snapshot


class LazinessProbe:
    """Measure how lazily a model learns, on inputs that stay the same.

    The model is in evaluation mode while it is probed; modes, flags, buffers and random generators are left as they
    were. With DDP probe the unwrapped module on one process.

    Args:
        model: The model, or one built like it; it fixes parameters and layers.
        inputs: As `weightsmith.diagnose.tangent_kernel` takes them; a few hundred samples. They are copied.
        layers: Modules whose activity is compared: glob(s) or a predicate ``(name, module) -> bool``. ``None``: those
            that own some of the parameters.
        params: Parameters: glob(s) or a predicate ``(name, parameter) -> bool``. ``None``: all that are trained.
        outputs: Maps what the model returns to ``(N, O)``; ``None``: its logits or first tensor.
        activity: Maps what a layer returns to ``(N, units)``, for example the last step of a recurrent one. ``None``:
            its first tensor with all positions.
        kernel: How the tangent kernel is computed: its `KernelOptions`, or the name of a method; ``None``: no kernel.
        kernel_samples: How many of the first samples have the tangent kernel; the paper takes 32.
        targets: ``(N, O)`` for the kernel-target alignment, as many numbers per sample as outputs.
        batch_dim: Dimension of inputs, activity and outputs that counts samples.
        rank: Kind of `weightsmith.diagnose.effective_rank` that is reported for every matrix.

    Raises:
        UsageError: Model, inputs or an argument do not fit.

    Example:
        >>> net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 2))
        >>> probe = LazinessProbe(net, torch.randn(16, 3))
        >>> before = probe.snapshot(net)
        >>> probe.compare(before, net).kernel_alignment  # training would come between
        1.0
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        layers: Where = None,
        params: WhereParameter = None,
        outputs: Outputs = None,
        activity: Activity = None,
        kernel: KernelOptions | str | None = "auto",
        kernel_samples: int = 32,
        targets: Tensor | None = None,
        batch_dim: int = 0,
        rank: str = "participation",
    ) -> None:
        if kernel_samples < 1:
            raise UsageError(f"kernel_samples must be at least 1, got {kernel_samples}")
        samples = count(inputs, batch_dim)
        self.inputs = _copied(inputs)
        self.digest = digest(self.inputs)
        self.options = KernelOptions(method=kernel) if isinstance(kernel, str) else kernel  # type: ignore[arg-type]
        self.outputs, self.activity, self.batch_dim, self.rank = outputs, activity, batch_dim, rank
        self.kernel_samples = min(kernel_samples, samples)
        self.names = tuple(chosen(model, params))
        effective_rank(torch.eye(2), rank)
        held = {name.rpartition(".")[0] for name in self.names}
        own = {name.partition(".parametrizations.")[0] for name in held}  # the layer, where a weight is computed
        self.layers = tuple(
            select(model, layers, default=lambda name, _: name in own, supported=lambda _, module: True)
        )
        modules = dict(model.named_modules())
        if scripted := [name for name in self.layers if isinstance(modules[name], torch.jit.ScriptModule)]:
            raise UsageError(
                f"{scripted[0] or 'model'} is a ScriptModule, whose activity cannot be observed: probe the module that "
                "it was made from"
            )
        self.targets = None
        if targets is not None:
            if self.options is None or self.options.reduce != "full" or len(targets) != samples:
                raise UsageError(f"targets must be {samples} rows, and need a kernel with reduce='full'")
            self.targets = targets.detach().clone()

    def plan(self, model: nn.Module) -> KernelPlan:
        """Say what the kernel of a snapshot takes, before any is made.

        Raises:
            UsageError: The probe has no kernel, or the model does not fit.
        """
        if self.options is None:
            raise UsageError("this probe was made with kernel=None")
        return plan_kernel(model, self._few(model), **self._kernel_arguments())

    def snapshot(self, model: nn.Module) -> Snapshot:
        """Look at a model.

        Raises:
            UsageError: It is not built as the probe's was, or the inputs were changed.
        """
        self._check(model)
        params = dict(model.named_parameters(remove_duplicate=False))
        weights = {name: params[name].detach().cpu().clone() for name in self.names}
        if any(weight.dtype in (torch.float16, torch.bfloat16) for weight in weights.values()):
            warnings.warn(
                "weights of half precision have derivatives of half precision; sums over them are float32",
                WeightsmithWarning,
                stacklevel=2,
            )
        similarities, signs = observe(model, self.layers, _placed(self.inputs, model), self.activity, self.batch_dim)
        kernel = None
        if self.options is not None:
            found = tangent_kernel(model, self._few(model), **self._kernel_arguments())
            kernel = type(found)({name: part.cpu() for name, part in found.parts.items()}, found.plan)
        return Snapshot(weights, similarities, signs, kernel, self.digest)

    def compare(self, before: Snapshot, after: nn.Module | Snapshot) -> LazinessReport:
        """Compare a model with an earlier snapshot of it.

        Args:
            before: From `snapshot`.
            after: The model now, or a later snapshot.

        Raises:
            UsageError: The two do not belong to this probe's inputs, or have different weights or layers.
        """
        now = after if isinstance(after, Snapshot) else self.snapshot(after)
        for name, one in (("before", before), ("after", now)):
            if one.digest != self.digest:
                raise UsageError(
                    f"{name} is a snapshot for other inputs: moments can only be compared on the same ones"
                )
        if before.similarities.keys() != now.similarities.keys() or (before.kernel is None) != (now.kernel is None):
            raise UsageError("before and after are snapshots of different layers, or one of them has no kernel")
        similarities = {name: before.similarities[name] for name in self.layers if name in before.similarities}
        weights = {name: before.weights[name] for name in self.names}
        ranks = {
            name: (float(effective_rank(weight, self.rank)), float(effective_rank(now.weights[name], self.rank)))
            for name, weight in weights.items()
            if weight.dim() >= 2 and weight.numel() and (not self.rank.startswith("eig") or _is_square(weight))
        }
        alignment, error = (math.nan, math.nan)
        layers: dict[str, float] = {}
        if before.kernel is not None and now.kernel is not None:
            alignment, error = before.kernel.alignment(now.kernel)
            layers = before.kernel.alignment_per_layer(now.kernel)
        changes = {
            name: (
                weight_change(weight, now.weights[name]),
                weight_change(weight, now.weights[name], relative=True),
            )
            for name, weight in weights.items()
        }
        return LazinessReport(
            weight_change=weight_change(before.weights, now.weights),
            relative_weight_change=weight_change(before.weights, now.weights, relative=True),
            weight_changes=changes,
            representation_alignment={
                name: kernel_alignment(r, now.similarities[name], what=f"the activity of {name or 'the model'}")
                for name, r in similarities.items()
            },
            centered_alignment={
                name: kernel_alignment(
                    _centered(r),
                    _centered(now.similarities[name]),
                    what=f"the centered activity of {name or 'the model'}",
                )
                for name, r in similarities.items()
            },
            sign_similarity={name: _signs(before.signs[name], now.signs[name]) for name in similarities},
            kernel_alignment=alignment,
            kernel_alignment_error=error,
            per_layer=layers,
            kernel_target_alignment=self._with_targets(before, now),
            effective_rank=ranks,
            rank_kind=self.rank,
            samples=count(self.inputs, self.batch_dim),
            parameters=self.names,
            plan=before.kernel.plan if before.kernel is not None else None,
        )

    def _with_targets(self, before: Snapshot, now: Snapshot) -> tuple[float, float] | None:
        if self.targets is None or before.kernel is None or now.kernel is None:
            return None
        y = self.targets[: self.kernel_samples]
        if before.kernel.plan.rows != y.numel():
            raise UsageError(
                f"targets must have {before.kernel.plan.outputs} numbers per sample, as the outputs do, "
                f"got {y.numel() / len(y):g}"
            )
        first, second = (kernel_target_alignment(one.matrix, y) for one in (before.kernel, now.kernel))
        return first, second

    def _check(self, model: nn.Module) -> None:
        if digest(self.inputs) != self.digest:
            raise UsageError("inputs of the probe were changed in place: moments can only be compared on the same ones")
        known, modules = dict(model.named_parameters(remove_duplicate=False)), dict(model.named_modules())
        lost = [name for name in self.names if name not in known] + [
            name for name in self.layers if name not in modules
        ]
        if lost:
            raise UsageError(f"model must be built as the probe's was: it has no {lost[0]!r}")
        chosen(model, lambda name, _: name in self.names)

    def _kernel_arguments(self) -> dict[str, Any]:
        names = set(self.names)
        return {
            "params": lambda name, _: name in names,
            "outputs": self.outputs,
            "batch_dim": self.batch_dim,
            "options": self.options,
        }

    def _few(self, model: nn.Module) -> Any:
        return _placed(take(self.inputs, self.batch_dim, self.kernel_samples), model)


def _signs(one: Tensor, other: Tensor) -> float:
    if one.shape != other.shape or (one == NAN).any() or (other == NAN).any():
        return math.nan
    return sign_similarity(one, other)


def _centered(r: Tensor) -> Tensor:
    return r - r.mean(0) - r.mean(1, keepdim=True) + r.mean()


def _is_square(w: Tensor) -> bool:
    return w.shape[0] ** 2 == w.numel()


def _map(inputs: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(inputs, Tensor):
        return change(inputs)
    if isinstance(inputs, Mapping):
        return {name: _map(value, change) for name, value in inputs.items()}
    if isinstance(inputs, Sequence) and not isinstance(inputs, str):
        return tuple(_map(value, change) for value in inputs)
    return inputs


def _copied(inputs: Any) -> Any:
    return _map(inputs, lambda tensor: tensor.detach().clone())


def _placed(inputs: Any, model: nn.Module) -> Any:
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    return _map(inputs, lambda tensor: tensor.to(device))
