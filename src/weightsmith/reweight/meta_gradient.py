"""The gradient of the meta loss through a virtual step, without a second-order graph.

With ``theta'(w) = theta - eta * grad sum_i w_i l_i(theta)`` and the meta loss ``M(theta')``:

    dM/dw_i = -eta <grad l_i(theta), v>,    v = grad M(theta')

which is exact, since ``w`` enters linearly. What is left is a directional derivative of each sample's loss. For a
virtual step ``theta - U(g)`` that is element-wise in the gradient, ``v`` is multiplied by ``U'(g)`` first.

Source: arXiv 2412.12955, equation 5.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel

from weightsmith.core.errors import UsageError

MetaGrad = Literal["finite_difference", "jvp", "double_backward", "head", "none"]
_STEP, _STEP_OF_DOUBLES = 1e-2, 1e-5
_SIGN_EPS = 1e-8 / (1 - 0.999) ** 0.5  # where the library "higher" puts Adam's eps at an optimizer's first step


def meta_gradient(
    losses: Callable[[Sequence[Tensor]], Tensor],
    meta_loss: Callable[[Sequence[Tensor]], Tensor],
    w: Tensor,
    theta: Sequence[Tensor],
    lr: float,
    steps: int = 1,
) -> Tensor:
    """``dM/dw`` as the definition says it: by differentiating through the step. The fast modes are compared with it.

    Args:
        losses: ``theta -> (B,)``.
        meta_loss: ``theta -> ()``.
        w: ``(B,)``.
        theta: Parameters that require gradients.
        lr: Step size.
        steps: How many steps.

    Returns:
        ``(B,)``.
    """
    w = w.detach().requires_grad_()
    for _ in range(steps):
        g = torch.autograd.grad((w * losses(theta)).sum(), theta, create_graph=True)
        theta = [p - lr * gradient for p, gradient in zip(theta, g, strict=True)]
    return torch.autograd.grad(meta_loss(theta), w)[0]


def directional_derivatives(
    losses: Callable[[], Tensor], module: nn.Module, direction: Sequence[Tensor], mode: MetaGrad = "finite_difference"
) -> Tensor:
    """``<grad l_i(theta), v>`` of every sample.

    Args:
        losses: Gives ``(B,)`` from the module as it is when it is called: no dropout, no side effects.
        module: Whose trainable parameters theta are; they are as before afterwards, to the bit.
        direction: ``v``, a tensor for each of `trainable`.
        mode: ``"finite_difference"``: two forward passes at ``theta ± e v``, ``e = 0.01 / |v|`` (``1e-5 / |v|`` in
            float64); works with every kernel. ``"jvp"``: one pass with forward-mode derivatives.
            ``"double_backward"``: reverse over reverse. Attention falls back to the math kernel in the latter two.

    Returns:
        ``(B,)``, detached.

    Raises:
        UsageError: The mode is unknown, or does not work with this model.
    """
    params = trainable(module)
    if mode == "finite_difference":
        return _finite_difference(losses, params, direction)
    if mode not in ("jvp", "double_backward"):
        raise UsageError(f"mode must be finite_difference, jvp or double_backward, got {mode!r}")
    try:
        with sdpa_kernel(SDPBackend.MATH):
            return (_jvp if mode == "jvp" else _double_backward)(losses, module, direction)
    except (NotImplementedError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        first = str(error).strip().partition("\n")[0]
        raise UsageError(
            f"meta_grad={mode!r} does not work with this model ({first}): use meta_grad='finite_difference'"
        ) from error


def _finite_difference(losses: Callable[[], Tensor], params: list[nn.Parameter], direction: Sequence[Tensor]) -> Tensor:
    step, norm = _step_along(params, direction)
    with torch.no_grad(), restoring(params) as before:
        ends = []
        for sign in (1, -1):
            _move_(params, before, direction, sign * step)
            with _same_noise(params):
                ends.append(losses())
    return torch.where(norm > 0, (ends[0] - ends[1]) / (2 * step.clamp(min=torch.finfo(step.dtype).tiny)), 0.0)


def hessian_vector(
    loss: Callable[[], Tensor], params: Sequence[Tensor], direction: Sequence[Tensor], *, exact: bool
) -> list[Tensor]:
    """``H v`` of a loss at the parameters as they are.

    Args:
        loss: Gives one number from them.
        params: As they are before afterwards.
        direction: ``v``, of the same shapes.
        exact: Reverse over reverse, with the math kernel of attention; otherwise a central difference of gradients.
    """

    def gradients(*, graph: bool = False) -> list[Tensor]:
        with torch.enable_grad():
            found = torch.autograd.grad(loss(), params, create_graph=graph, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)]

    if exact:
        with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
            first = gradients(graph=True)
            _check_twice_differentiable(first)
            along = torch.stack([(g * v.detach()).sum() for g, v in zip(first, direction, strict=True)]).sum()
            second = (
                torch.autograd.grad(along, params, allow_unused=True) if along.requires_grad else [None] * len(first)
            )
        return [torch.zeros_like(p) if g is None else g for p, g in zip(params, second, strict=True)]
    step, norm = _step_along(params, direction)
    ends = []
    with restoring(params) as before:
        for sign in (1, -1):
            _move_(params, before, direction, sign * step)
            with _same_noise(params):
                ends.append(gradients())
    scale = torch.where(norm > 0, 1 / (2 * step.clamp(min=torch.finfo(step.dtype).tiny)), 0.0)
    return [(up - down) * scale.to(up.device, up.dtype) for up, down in zip(*ends, strict=True)]


def _step_along(params: Sequence[Tensor], direction: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """How far to go in a direction for a central difference, and the direction's norm."""
    double = all(p.dtype == torch.float64 for p in params)
    dtype = torch.float64 if double else torch.float32
    norm = torch.stack([v.norm().to(params[0].device, dtype) for v in direction]).norm()
    return torch.where(norm > 0, (_STEP_OF_DOUBLES if double else _STEP) / norm, 0.0), norm


def _same_noise(params: Sequence[Tensor]) -> Any:
    """Every block begins with the same random numbers: dropout that is always on must not count as a difference."""
    device = params[0].device
    return torch.random.fork_rng([device] if device.type == "cuda" else [])


@torch.no_grad()
def _move_(params: Sequence[Tensor], start: Sequence[Tensor], direction: Sequence[Tensor], step: Tensor) -> None:
    for p, begin, v in zip(params, start, direction, strict=True):
        p.copy_(begin + v * step.to(v.device, v.dtype))


def _jvp(losses: Callable[[], Tensor], module: nn.Module, direction: Sequence[Tensor]) -> Tensor:
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    with torch.no_grad(), forward_ad.dual_level():
        duals = {
            f"module.{name}": forward_ad.make_dual(p.detach(), v.to(p.dtype))
            for name, p, v in zip(names, trainable(module), direction, strict=True)
        }
        found = forward_ad.unpack_dual(functional_call(_Around(module, losses), duals, ()))
        return torch.zeros_like(found.primal) if found.tangent is None else found.tangent.clone()


def _double_backward(losses: Callable[[], Tensor], module: nn.Module, direction: Sequence[Tensor]) -> Tensor:
    with torch.enable_grad():
        found = losses()
        u = torch.ones_like(found, requires_grad=True)
        gradients = torch.autograd.grad((u * found).sum(), trainable(module), create_graph=True, allow_unused=True)
        pairs = [(g, v) for g, v in zip(gradients, direction, strict=True) if g is not None and g.requires_grad]
        if not pairs:
            return torch.zeros_like(found).detach()
        _check_twice_differentiable([g for g, _ in pairs])
        # linear in u, so its derivative is the answer
        return torch.autograd.grad([g for g, _ in pairs], u, [v.to(g.dtype) for g, v in pairs])[0]


def _check_twice_differentiable(gradients: Sequence[Tensor]) -> None:
    """Refuse functions marked ``once_differentiable``: what they hide would silently count as 0."""
    waiting: list[Any] = [g.grad_fn for g in gradients]
    seen = set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node.name() == "torch::autograd::Error":
            raise RuntimeError("it has a function that can be differentiated once only")
        waiting += [following for following, _ in node.next_functions]


class _Around(nn.Module):
    """Makes a closure over a module a module, whose parameters can be replaced for a call."""

    def __init__(self, module: nn.Module, losses: Callable[[], Tensor]) -> None:
        super().__init__()
        self.module, self.losses = module, losses

    def forward(self) -> Tensor:
        return self.losses()


def head_derivatives(
    logit_gradients: Tensor, inputs: Tensor, weight_direction: Tensor, bias_direction: Tensor | None
) -> Tensor:
    """``<grad l_i, v>`` for the weights of a last linear layer alone: ``(dl_i/dz_i) . (V_W h_i + V_b)``.

    Args:
        logit_gradients: ``dl_i/dz_i``, ``(B, C)``; of the cross-entropy ``softmax(z_i) - onehot(y_i)``.
        inputs: ``h_i``, ``(B, D)``.
        weight_direction: ``V_W``, ``(C, D)``.
        bias_direction: ``V_b``, ``(C,)``, or ``None`` without a bias.

    Returns:
        ``(B,)``.
    """
    along = inputs @ weight_direction.mT
    return (logit_gradients * (along if bias_direction is None else along + bias_direction)).sum(1)


@torch.no_grad()
def virtual_step_(
    params: Sequence[Tensor], gradients: Sequence[Tensor], lrs: Sequence[float], *, sign: bool = False
) -> list[Tensor | float]:
    """Move the parameters by ``-U(g)``, element-wise in the gradient.

    Args:
        params: Changed in place.
        gradients: Of the same shapes.
        lrs: Step size of each.
        sign: ``U(g) = lr * g / (|g| + 3.16e-7)``, which is what Adam does at its first step and what the released code
            in effect trains with; otherwise plain gradient descent, ``lr * g``.

    Returns:
        ``U'(g)`` of each.
    """
    slopes: list[Tensor | float] = []
    for p, g, lr in zip(params, gradients, lrs, strict=True):
        if not sign:
            p.add_(g, alpha=-lr)
            slopes.append(lr)
            continue
        size = g.abs() + _SIGN_EPS
        p.addcdiv_(g, size, value=-lr)
        slopes.append(lr * _SIGN_EPS / size.square())
    return slopes


def trainable(module: nn.Module) -> list[nn.Parameter]:
    """The parameters that gradients are asked of, tied ones once."""
    return [p for p in module.parameters() if p.requires_grad]


@contextmanager
def restoring(params: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Give copies of the parameters, and put them back at the end, to the bit."""
    before = [p.detach().clone() for p in params]
    try:
        yield before
    finally:
        with torch.no_grad():
            for p, start in zip(params, before, strict=True):
                p.copy_(start)
