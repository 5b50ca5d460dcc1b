"""What AdamP and SGDP share and what is no part of the method: parameter groups, state, and which weights go together.

What a step *is* stands in ``adamp_step_`` and ``sgdp_step_``, what projecting is in ``projection``. Here the weights of
a model are given to those in two ways: on the CPU each is looked at first, and all that move freely go to one fused
kernel; elsewhere both answers are computed and one is chosen on the device, so that the host never waits.
"""

import warnings
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.optim import Optimizer
from torch.optim.optimizer import ParamsT

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.optim._statistics import ProjectionStats, statistics
from weightsmith.optim.projection import (
    View,
    invariant_view,
    look_and_move_,
    move_projected_,
    project,
    row_views,
)

Group = dict[str, Any]
# the parameter's step count (no tensor if the optimizer keeps none), the parameter, its gradient, its moments
Item = tuple[Any, ...]


class ProjectedOptimizer(Optimizer):
    """A momentum optimizer whose step is projected where a weight looks scale-invariant.

    A subclass says what its options, its state and its unprojected step are.
    """

    moments: ClassVar[tuple[str, ...]]
    counts_steps: ClassVar[bool]

    def __init__(self, params: ParamsT, defaults: Group) -> None:
        self._views: dict[int, list[View | Tensor]] = {}
        super().__init__(params, defaults)
        if all(not is_lazy(p) and p.dim() < 2 for group in self.param_groups for p in group["params"]):
            warnings.warn(
                f"{type(self).__name__} was given no parameter of two dimensions or more, so nothing will be "
                "projected; if the model was flattened (FSDP1, ZeRO), shard it with FSDP2 instead",
                WeightsmithWarning,
                stacklevel=3,
            )

    def _check(self, group: Group) -> None:
        """Raise ``UsageError`` if an option of the group is out of range."""
        for name in ("lr", "eps", "weight_decay", "delta"):
            if not group[name] >= 0:
                raise UsageError(f"{name} must be 0 or more, got {group[name]}")
        if not 0 <= group["wd_ratio"] <= 1:
            raise UsageError(f"wd_ratio must be between 0 and 1, got {group['wd_ratio']}")

    def _decay(self, group: Group) -> Any:
        """Share of a weight that undiminished decay takes in one step."""
        raise NotImplementedError

    def _advance_(
        self,
        targets: list[Tensor],
        grads: list[Tensor],
        steps: list[Tensor],
        *moments: list[Tensor],
        group: Group,
        dense: bool,
    ) -> None:
        """Update the moments; decay the targets in full and move them by the unprojected step.

        A target of zeros becomes the step itself. ``dense``: all tensors are on the CPU, of one dtype, and hold their
        elements in the same order.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step.

        Args:
            closure: Evaluates the loss and its gradients anew; called with gradients enabled.

        Returns:
            What ``closure`` returned, or ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for index, group in enumerate(self.param_groups):
            params: list[Tensor] = []
            grads: list[Tensor] = []
            steps: list[Tensor] = []
            moments: list[list[Tensor]] = [[] for _ in self.moments]
            self._init_group(group, params, grads, steps, *moments)
            self._views[index] = self._step_group(group, params, grads, steps, moments) if params else []
        return loss

    def _init_group(
        self, group: Group, params: list[Tensor], grads: list[Tensor], steps: list[Tensor], *moments: list[Tensor]
    ) -> None:
        # the name and the lists to be filled are torch's convention: torch.compile runs such a method untraced
        for p in group["params"]:
            if p.grad is None or p.numel() == 0:
                continue
            if p.grad.layout != torch.strided:
                raise RuntimeError(
                    f"{type(self).__name__} takes no sparse gradients; use torch.optim.SparseAdam for this parameter"
                )
            state = self.state[p]
            if not state:
                if self.counts_steps:
                    device = p.device if group["capturable"] else "cpu"
                    state["step"] = torch.zeros((), dtype=count_dtype(), device=device)
                for key in self.moments:
                    state[key] = torch.zeros_like(p, memory_format=torch.preserve_format)
            params.append(p)
            grads.append(p.grad.resolve_conj())  # autograd leaves complex gradients conjugated, which has no real view
            if self.counts_steps:
                steps.append(state["step"])
            for key, values in zip(self.moments, moments, strict=True):
                values.append(state[key])

    def _step_group(
        self, group: Group, params: list[Tensor], grads: list[Tensor], steps: list[Tensor], moments: list[list[Tensor]]
    ) -> list[View | Tensor]:
        if steps:
            torch._foreach_add_(steps, 1)
        if group["maximize"]:
            grads = list(torch._foreach_neg(grads))
        items: list[Item] = [
            (steps[i : i + 1], *tensors) for i, tensors in enumerate(zip(params, grads, *moments, strict=True))
        ]
        views: list[View | Tensor] = []
        together = group["foreach"]
        if together is None and not (
            group["capturable"] or group.get("project_buffer") or torch.compiler.is_compiling()
        ):
            dense = [_as_rows(item) for item in items]
            views += self._look_and_step(group, [rows for rows in dense if rows])
            items = [item for item, rows in zip(items, dense, strict=True) if not rows]
        if together is None:
            together = all(_native(p) and p.device.type != "cpu" for p in params)
        for chunk in [items] if together else [[item] for item in items]:
            views += self._step_branchless(group, chunk)
        return views

    def _look_and_step(self, group: Group, items: list[Item]) -> list[View | Tensor]:
        views: list[View | Tensor] = []
        free = []
        keep = float(1 - self._decay(group) * group["wd_ratio"])
        for item in items:
            steps, w, *operands = item
            if w.dim() < 2:
                free.append(item)
                continue

            def displace(g_rows: Tensor, *moment_rows: Tensor, steps: list[Tensor] = steps) -> Tensor:
                d = torch.zeros_like(g_rows)
                self._advance_([d], [g_rows], steps, *([rows] for rows in moment_rows), group=group, dense=True)
                return d

            view = look_and_move_(w, displace, operands, keep=keep, delta=group["delta"], eps=group["eps"])
            views.append(view)
            if view == View.NONE:
                free.append(item)
        for dtype in {w.dtype for _, w, *_ in free}:
            same = [item for item in free if item[1].dtype == dtype]
            self._advance_items([w for _, w, *_ in same], same, group=group, dense=True)
        return views

    def _step_branchless(self, group: Group, items: list[Item]) -> list[View | Tensor]:
        flat = [p.dim() < 2 for _, p, *_ in items]
        items = [
            (steps, *(torch.view_as_real(t) if t.is_complex() else t for t in tensors)) for steps, *tensors in items
        ]
        targets = [p if vector else torch.zeros_like(p) for (_, p, *_), vector in zip(items, flat, strict=True)]
        self._advance_items(targets, items, group=group, dense=False)
        views: list[View | Tensor] = []
        for (_, p, g, *moments), d, vector in zip(items, targets, flat, strict=True):
            if vector:
                continue
            view = invariant_view(p, g, delta=group["delta"], eps=group["eps"])
            views.append(view)
            if group.get("project_buffer") and not group["nesterov"]:
                moments[0].copy_(project(moments[0], p, view, eps=group["eps"]))
            move_projected_(p, d, view, decay=self._decay(group), wd_ratio=group["wd_ratio"], eps=group["eps"])
        return views

    def _advance_items(self, targets: list[Tensor], items: list[Item], *, group: Group, dense: bool) -> None:
        if not items:
            return
        steps, _, grads, *moments = (list(column) for column in zip(*items, strict=True))
        self._advance_(targets, grads, [s for one in steps for s in one], *moments, group=group, dense=dense)

    def add_param_group(self, param_group: Group) -> None:
        """Add a parameter group.

        Args:
            param_group: Its parameters under ``"params"``, and whatever options differ from the optimizer's own.

        Raises:
            UsageError: An option is out of range.
        """
        super().add_param_group(param_group)
        try:
            self._check(self.param_groups[-1])
        except UsageError:
            self.param_groups.pop()
            raise

    def __setstate__(self, state: dict[str, Any]) -> None:
        defaults = state.get("defaults") or self.defaults
        for group in state["param_groups"]:
            self._check(defaults | group)  # torch.optim.SGD takes a momentum of 1, by which SGDP would divide
        super().__setstate__(state)
        self._views = {}
        for group in self.param_groups:
            for name, value in self.defaults.items():
                group.setdefault(name, value)
            foreign = [f"{name}=True" for name in ("amsgrad", "caution") if group.get(name)]
            if group["weight_decay"]:  # Adam's, which adds to the gradient
                coupled = ("decoupled_weight_decay", "weight_decouple")
                foreign += [f"{name}=False" for name in coupled if group.get(name) is False]
            if foreign:
                warnings.warn(
                    f"the loaded state was made with {foreign[0]}, which {type(self).__name__} does not have; "
                    "training goes on without it",
                    WeightsmithWarning,
                    stacklevel=3,
                )

    def projection_stats(self) -> list[ProjectionStats]:
        """Tell what the last step did, group by group.

        Returns:
            One entry per parameter group; all counts are 0 before the first step. On a GPU this waits for the device;
            if parameters are sharded, all ranks must call it, and all get the same numbers.
        """
        views = [self._views.get(index, []) for index in range(len(self.param_groups))]
        return [statistics(group["params"], seen) for group, seen in zip(self.param_groups, views, strict=True)]


def count_dtype() -> torch.dtype:
    """Of step counts: half precision, which may be the default dtype, stops counting at 256."""
    return torch.promote_types(torch.get_default_dtype(), torch.float32)


def _native(p: Tensor) -> bool:
    return type(p) in (Tensor, nn.Parameter)


def _as_rows(item: Item) -> Item | None:
    steps, p, g, *moments = item
    if not (_native(p) and p.device.type == "cpu" and p.dtype in (torch.float32, torch.float64)):
        return None
    if any(moment.dtype != p.dtype for moment in moments):
        return None
    if g.stride() != p.stride():
        g = torch.empty_like(p).copy_(g)
    rows = row_views(p, g, *moments)
    return (steps, *rows) if rows else None
