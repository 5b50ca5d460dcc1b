"""SGDP: SGD with momentum that does not let momentum inflate scale-invariant weights.

The same projection as AdamP (see there), on heavy-ball or Nesterov momentum with decoupled decay:

    b <- momentum b + (1 - dampening) g
    u  = b, or g + momentum b with Nesterov
    w <- (1 - lr weight_decay rho / (1 - momentum)) w - lr project(u)

Dividing by ``1 - momentum`` gives decay the size that coupled L2 decay accumulates to in ``torch.optim.SGD``, so that
the same ``weight_decay`` means the same strength. ``sgdp_step_`` is exactly that for one weight; ``SGDP`` computes the
same for all weights of a model, faster.

Source: "AdamP: Slowing Down the Slowdown for Momentum Optimizers on Scale-invariant Weights", arXiv 2006.08217,
Algorithm 1; the two views of a tensor, ``wd_ratio`` and the decay as in the authors' code.
"""

from typing import Any

import torch
from torch import Tensor
from torch.optim.optimizer import ParamsT

from weightsmith.core.errors import UsageError
from weightsmith.optim._base import Group, ProjectedOptimizer
from weightsmith.optim.projection import invariant_view, project


@torch.no_grad()
def sgdp_step_(
    w: Tensor,
    g: Tensor,
    b: Tensor,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    eps: float = 1e-8,
    delta: float = 0.1,
    wd_ratio: float = 0.1,
    project_buffer: bool = False,
) -> None:
    """Make one step of one real weight, in place: the reference.

    ``w``, its gradient ``g`` and its momentum ``b``, which starts at 0, have one shape; options as in `SGDP`.
    """
    b.mul_(momentum).add_(g, alpha=1 - dampening)
    u = g + momentum * b if nesterov else b
    rho = 1.0
    if w.dim() >= 2:
        view = invariant_view(w, g, delta=delta, eps=eps)  # none, channel or layer
        u = project(u, w, view, eps=eps)
        rho = wd_ratio if view else 1.0
        if project_buffer and not nesterov:
            b.copy_(u)
    w.mul_(1 - lr * weight_decay * rho / (1 - momentum))
    w.sub_(u, alpha=lr)


class SGDP(ProjectedOptimizer):
    """SGD with momentum, decoupled weight decay and projected steps.

    Args:
        params: Parameters, named parameters, or groups; every option below can differ per group.
        lr: Step size, at least 0; a float or a 0-d tensor.
        momentum: In ``[0, 1)``.
        dampening: Share of the gradient kept out of the momentum, also at the first step (``torch.optim.SGD`` does not
            dampen that one).
        weight_decay: Decoupled decay per unit of ``lr / (1 - momentum)``.
        nesterov: Look one step ahead; may be combined with ``dampening``.
        eps: Smallest norm the projection divides by.
        delta: A weight looks scale-invariant if the cosine of it and its gradient is below ``delta / sqrt(size)``; 0
            turns the projection off.
        wd_ratio: Share of the decay that projected weights keep, in ``[0, 1]``.
        project_buffer: Without Nesterov, also project the stored momentum, as the authors' code does; ``False`` follows
            Algorithm 1. With ``True`` nothing is decided on the host, which is slower.
        foreach: As for ``AdamP``.
        maximize: Ascend.
        capturable: Decide nothing on the host, for CUDA graphs.

    Raises:
        UsageError: An option is out of range.

    Example:
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8))
        >>> optimizer = SGDP(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=1e-5)
    """

    moments = ("momentum",)
    counts_steps = False

    def __init__(
        self,
        params: ParamsT,
        lr: float | Tensor = 1e-3,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        eps: float = 1e-8,
        delta: float = 0.1,
        wd_ratio: float = 0.1,
        *,
        project_buffer: bool = False,
        foreach: bool | None = None,
        maximize: bool = False,
        capturable: bool = False,
    ) -> None:
        defaults = {name: value for name, value in locals().items() if name not in ("self", "params", "__class__")}
        super().__init__(params, defaults)

    def _check(self, group: Group) -> None:
        super()._check(group)
        if not 0 <= group["momentum"] < 1:
            raise UsageError(f"momentum must be in [0, 1), got {group['momentum']}")

    def _decay(self, group: Group) -> Any:
        return group["lr"] * group["weight_decay"] / (1 - group["momentum"])

    def _advance_(
        self,
        targets: list[Tensor],
        grads: list[Tensor],
        steps: list[Tensor],  # noqa: ARG002
        *moments: list[Tensor],
        group: Group,
        dense: bool,  # noqa: ARG002
    ) -> None:
        # sgdp_step_ without its projection, which ProjectedOptimizer puts between the step and the weight
        (buffers,) = moments
        lr, momentum = group["lr"], group["momentum"]
        torch._foreach_mul_(buffers, momentum)
        torch._foreach_add_(buffers, grads, alpha=1 - group["dampening"])
        if group["weight_decay"]:
            torch._foreach_mul_(targets, 1 - self._decay(group))
        if group["nesterov"]:
            torch._foreach_add_(targets, torch._foreach_mul(grads, -lr))
            lr = lr * momentum
        torch._foreach_add_(targets, torch._foreach_mul(buffers, -lr))

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            group.pop("step", None)  # pytorch_optimizer counts steps; nothing here depends on them
            for p in group["params"]:
                held = self.state.get(p, {})
                if "momentum_buffer" in held:  # torch.optim.SGD; None if it ran without momentum
                    buffer = held.pop("momentum_buffer")
                    held.update({} if buffer is None else {"momentum": buffer})
