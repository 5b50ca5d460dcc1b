"""AdamP: Adam with decoupled decay that does not let momentum inflate scale-invariant weights.

A weight that is followed by a normalization keeps its function when its length changes, but its effective step size is
``lr / ||w||^2``; momentum makes ``||w||`` grow, so steps shrink too early. Where a weight looks scale-invariant, AdamP
drops the part of the step that only changes the length, and most of the decay, no longer needed against growth.

    m <- b1 m + (1 - b1) g            v <- b2 v + (1 - b2) g^2
    u  = m / (sqrt(v / (1 - b2^k)) + eps)
    w <- (1 - lr weight_decay rho) w - lr / (1 - b1^k) project(u)

with ``rho = wd_ratio`` where ``u`` was projected, else 1. ``adamp_step_`` is exactly that for one weight; ``AdamP``
computes the same for all weights of a model, faster.

Source: "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights", arXiv 2006.08217,
Algorithm 2; bias correction, the two views of a tensor and ``wd_ratio`` as in the authors' code.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from weightsmith.core.errors import UsageError
from weightsmith.optim._base import Group, ProjectedOptimizer, count_dtype
from weightsmith.optim.projection import invariant_view, materialized, project


@torch.no_grad()
def adamp_step_(
    w: Tensor,
    g: Tensor,
    m: Tensor,
    v: Tensor,
    k: int,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    nesterov: bool = False,
) -> None:
    """Make step number ``k`` (from 1) of one real weight, in place: the reference.

    ``w``, its gradient ``g`` and its moments ``m`` and ``v``, which start at 0, have one shape; options as in `AdamP`.
    """
    beta1, beta2 = betas
    m.mul_(beta1).add_(g, alpha=1 - beta1)
    v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
    ahead = beta1 * m + (1 - beta1) * g if nesterov else m
    u = ahead / ((v / (1 - beta2**k)).sqrt() + eps)
    rho = 1.0
    if w.dim() >= 2:
        view = invariant_view(w, g, delta=delta, eps=eps)  # none, channel or layer
        u = project(u, w, view, eps=eps)
        rho = wd_ratio if view else 1.0
    w.mul_(1 - lr * weight_decay * rho)
    w.sub_(u, alpha=lr / (1 - beta1**k))


class AdamP(ProjectedOptimizer):
    """Adam with decoupled weight decay and projected steps.

    Args:
        params: Parameters, named parameters, or groups; every option below can differ per group.
        lr: Step size, at least 0; a float or a 0-d tensor.
        betas: Decay of the first and of the second moment, each in ``[0, 1)``.
        eps: Added to the denominator after bias correction, and smallest norm the projection divides by.
        weight_decay: Decoupled decay per unit of ``lr``.
        delta: A weight looks scale-invariant if the cosine of it and its gradient is below ``delta / sqrt(size)``; 0
            turns the projection off.
        wd_ratio: Share of the decay that projected weights keep, in ``[0, 1]``.
        nesterov: Look one step ahead: ``b1 m + (1 - b1) g`` in place of ``m`` in ``u``.
        foreach: ``None`` picks what is fastest: on the CPU, look at each weight first and hand all that move freely to
            one fused kernel; on other devices as ``True``. ``True``: elementwise work for all tensors at once, nothing
            decided on the host, room for two more copies of the parameters. ``False``: the same, tensor by tensor.
        maximize: Ascend.
        capturable: Keep step counts on the device and decide nothing on the host, for CUDA graphs.

    Raises:
        UsageError: An option is out of range.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        >>> optimizer = AdamP(model.parameters(), lr=1e-3, weight_decay=1e-2)
    """

    moments = ("exp_avg", "exp_avg_sq")
    counts_steps = True

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        nesterov: bool = False,
        *,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        super()._check(group)
        betas = group["betas"]
        if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(0 <= beta < 1 for beta in betas)):
            raise UsageError(f"betas must be two numbers in [0, 1), got {betas}")

    def _decay(self, group: Group) -> Any:
        return group["lr"] * group["weight_decay"]

    def _advance_(
        self,
        targets: list[Tensor],
        grads: list[Tensor],
        steps: list[Tensor],
        *moments: list[Tensor],
        group: Group,
        dense: bool,
    ) -> None:
        # adamp_step_ without its projection, which ProjectedOptimizer puts between the step and the weight
        exp_avgs, exp_avg_sqs = moments
        beta1, beta2 = group["betas"]
        if group["nesterov"]:
            # b1 m + (1 - b1) g is the same average taken once more, so a second update of a copy of m gives it
            torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
            exp_avgs = [m.clone() for m in exp_avgs]
        if dense:
            torch._fused_adamw_(
                targets,
                grads,
                exp_avgs,
                exp_avg_sqs,
                [],
                steps,
                amsgrad=False,
                lr=float(group["lr"]),
                beta1=beta1,
                beta2=beta2,
                weight_decay=group["weight_decay"],
                eps=group["eps"],
                maximize=False,
            )
            return
        torch._foreach_lerp_(exp_avgs, grads, 1 - beta1)
        torch._foreach_mul_(exp_avg_sqs, beta2)
        torch._foreach_addcmul_(exp_avg_sqs, grads, grads, 1 - beta2)
        if group["weight_decay"]:
            torch._foreach_mul_(targets, 1 - self._decay(group))
        if group["capturable"] or torch.compiler.is_compiling():
            # bias corrections in the precision of the parameter, which may be more than that of the step count
            dtypes = [torch.promote_types(w.dtype, torch.float32) for w in targets]
            counts: list[Any] = [step.to(dtype) for step, dtype in zip(steps, dtypes, strict=True)]
        else:
            counts = [step.item() for step in steps]
        # one division per element: inductor computes all of this twice rather than storing it
        updates = torch._foreach_sqrt(exp_avg_sqs)
        torch._foreach_mul_(updates, [materialized((1 - beta2**k) ** -0.5) for k in counts])
        torch._foreach_add_(updates, group["eps"])
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, exp_avgs)
        torch._foreach_mul_(updates, [materialized(-group["lr"] / (1 - beta1**k)) for k in counts])
        torch._foreach_add_(targets, updates)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            common = group.pop("step", None)  # pytorch_optimizer counts once per group
            for p in group["params"]:
                held = self.state.get(p)
                if not held:
                    continue
                device = p.device if group["capturable"] else "cpu"
                held["step"] = torch.as_tensor(held.get("step", common), dtype=count_dtype(), device=device)
