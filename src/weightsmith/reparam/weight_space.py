"""Optimize a companded model the way the method means it: decay on the weight, adaptive rules in weight space.

Weight decay belongs on ``w``, not on ``v`` (eq. 5). And a rule that normalizes gradients, like Adam's, would cancel
the slope ``dw/dv`` which is the method; so the rule runs on ``w`` and ``dL/dw``, and its step is scaled by the slope:

    v <- v + dw/dv * (w_after - w)

Source: arXiv 2306.16993; its adaptive rule follows Powerpropagation, arXiv 2110.00296.
"""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.reparam.apply import sites
from weightsmith.reparam.compander import WeightCompander

Model = TypeVar("Model", bound=nn.Module)


def param_groups(model: nn.Module, weight_decay: float, **kw: Any) -> list[dict[str, Any]]:
    """Group parameters for an optimizer that works on ``v`` directly, such as SGD.

    Args:
        model: A companded model.
        weight_decay: Decay of the parameters that are not companded, and of ``v`` where the pair is learned. Fixed
            pairs decay on ``w``: see `add_weight_decay_grad_`.
        **kw: Further options of every group, for example ``momentum=0.9``.

    Returns:
        Groups of the rest, of ``v``, and of the learned ``a`` and ``b`` (never decayed); empty ones are left out.
    """
    pairs = {id(p): p for m in model.modules() if isinstance(m, WeightCompander) for p in m.parameters()}
    learned = [site.v for site in sites(model) if site.compander.learnable]
    fixed = [site.v for site in sites(model) if not site.compander.learnable]
    special = {*pairs, *map(id, learned), *map(id, fixed)}
    rest = [p for p in model.parameters() if id(p) not in special]
    groups = ((rest, weight_decay), (learned, weight_decay), (fixed, 0.0), (list(pairs.values()), 0.0))
    return [{"params": params, "weight_decay": decay, **kw} for params, decay in groups if params]


@torch.no_grad()
def add_weight_decay_grad_(
    model: Model, weight_decay: float, *, optimizer: torch.optim.Optimizer | None = None
) -> Model:
    """Add the decay on ``w`` to the gradients of ``v``: ``v.grad += weight_decay * w * dw/dv`` (eq. 5, as torch's SGD).

    Call it after unscaling and clipping, right before ``optimizer.step()``. Weights without a gradient are skipped,
    and so are those with a learned pair: the paper decays their ``v``, by the optimizer.

    Args:
        model: A companded model.
        weight_decay: The decay that plain weights would get from ``torch.optim.SGD``.
        optimizer: When given, warn about fixed companded weights that it decays as well.

    Returns:
        ``model`` itself.
    """
    decayed = {id(p) for group in _groups(optimizer) if group.get("weight_decay") for p in group["params"]}
    twice = []
    for name, v, compander, *_ in sites(model):
        if compander.learnable or v.grad is None:
            continue
        v.grad.add_(compander(v) * compander.derivative(v), alpha=weight_decay)
        if id(v) in decayed:
            twice.append(name)
    if twice:
        warnings.warn(
            f"the optimizer's own weight_decay acts on {', '.join(twice)} too: give companded weights weight_decay=0, "
            "see weightsmith.reparam.param_groups",
            WeightsmithWarning,
            stacklevel=2,
        )
    return model


class InWeightSpace(torch.optim.Optimizer):
    """Let any optimizer see ``w`` and ``dL/dw`` in place of ``v`` and ``dL/dv``, then scale its step by ``dw/dv``.

    State, decay and projections (AdamP) of the wrapped optimizer then live in weight space: with AdamW, decoupled
    decay acts on ``w``. Everything else passes through to it: groups, state, hooks, `state_dict`. Parameters that are
    not companded, and learned ``a`` and ``b``, are stepped as usual. During a step each companded weight that has a
    gradient takes four more tensors of its size.

    Args:
        optimizer: Any optimizer over the parameters of ``model`` that does not need to re-evaluate the loss.
        model: A companded model. Its weights are looked up at every step, so that folding it is harmless.

    Raises:
        TypeError: The optimizer re-evaluates the loss inside its step (LBFGS).
        UsageError: No companded weight of ``model`` is in the optimizer.

    Example:
        >>> from weightsmith.reparam import compand_
        >>> model = compand_(nn.Linear(4, 2))
        >>> optimizer = InWeightSpace(torch.optim.AdamW(model.parameters(), lr=1e-3), model)
    """

    # A fused optimizer would unscale by itself, with scaled gradients divided by the slope here: let GradScaler do it.
    _step_supports_amp_scaling = False

    def __init__(self, optimizer: torch.optim.Optimizer, model: nn.Module) -> None:
        if isinstance(optimizer, torch.optim.LBFGS):
            raise TypeError(
                "LBFGS evaluates the loss inside its step, where companded weights hold w: it cannot be wrapped"
            )
        held = {id(p) for group in _groups(optimizer) for p in group["params"]}
        if not any(id(site.v) in held for site in sites(model)):
            raise UsageError("optimizer holds no companded weight of model: call compand_ first, then build it")
        # No super().__init__: groups, state and hooks are the wrapped optimizer's, found through __getattr__.
        self.optimizer = optimizer
        self.model = model

    def __getattr__(self, name: str) -> Any:
        if name in ("optimizer", "model"):  # not set yet: copying and unpickling ask before they fill the object
            raise AttributeError(name)
        return getattr(self.optimizer, name)

    def __getstate__(self) -> dict[str, Any]:
        return vars(self)

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Step the wrapped optimizer in weight space.

        Args:
            closure: Evaluates the loss and its gradients; called once, before anything is swapped.

        Returns:
            What ``closure`` returned, or ``None``.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        held = {id(p) for group in self.param_groups for p in group["params"]}
        swapped = []
        for _, v, compander, *_ in sites(self.model):
            if v.grad is None or id(v) not in held:
                continue
            slope, w = compander.derivative(v), compander(v)
            swapped.append((v, v.clone(), w, slope, v.grad))
            # where the slope has underflowed so has the gradient: 0, not 0 / 0. A learned pair may make it negative.
            tiny = torch.finfo(slope.dtype).tiny
            v.grad = (v.grad / slope.where(slope.abs() >= tiny, tiny)).to(v.dtype)
            v.copy_(w)
        try:
            self.optimizer.step()
        finally:
            for v, before, w, slope, grad in swapped:
                v.grad = grad  # the same tensor: DDP may hold a view of it
                v.copy_(before + slope * (v - w))
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Reset the gradients of the wrapped optimizer's parameters."""
        self.optimizer.zero_grad(set_to_none=set_to_none)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the wrapped optimizer."""
        self.optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """Return the wrapped optimizer's state; it lives in weight space."""
        return self.optimizer.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore the wrapped optimizer's state."""
        self.optimizer.load_state_dict(state_dict)


def _groups(optimizer: torch.optim.Optimizer | None) -> list[dict[str, Any]]:
    return [] if optimizer is None else optimizer.param_groups
