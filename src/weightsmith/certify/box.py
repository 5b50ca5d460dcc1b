"""The set of inputs that a bound holds for."""

import math
from typing import Any

import torch
from torch import Tensor

from weightsmith.certify.interval import Interval
from weightsmith.core.errors import UsageError

Eps = float | Tensor | None


def input_box(x: Tensor, eps: Eps, lower: Any = None, upper: Any = None, *, outward: bool = False) -> Interval:
    """``max(x - eps, lower) .. min(x + eps, upper)``.

    Args:
        x: Inputs, ``(B, ...)``.
        eps: Largest change of every number, in the units of ``x``, at least 0: a number, or a tensor that broadcasts to
            ``x`` (``eps / std`` per channel where inputs are normalized). ``None``: ``lower`` and ``upper`` are the
            box.
        lower: Least valid value, a number or a tensor that broadcasts; ``None``: there is none.
        upper: Largest valid value, likewise.
        outward: Round both ends away from ``x``.

    Raises:
        UsageError: An argument is negative, not finite, does not broadcast, or leaves nothing between both ends.
    """
    _finite("x", x)
    if eps is None and (lower is None or upper is None):
        raise UsageError("eps=None needs the box itself: give lower and upper")
    low = high = None
    if eps is not None:
        distance = _fitting("eps", eps, x)
        if (eps < 0) if isinstance(eps, int | float) else bool((distance < 0).any()):
            raise UsageError(
                f"eps must be at least 0, got {eps if not isinstance(eps, Tensor) else distance.min().item()}"
            )
        low, high = x - distance, x + distance
        if outward:
            low, high = low.nextafter(low.new_tensor(-torch.inf)), high.nextafter(high.new_tensor(torch.inf))
    if lower is not None:
        end = _fitting("lower", lower, x)
        low = end.expand_as(x) if low is None else torch.maximum(low, end)
    if upper is not None:
        end = _fitting("upper", upper, x)
        high = end.expand_as(x) if high is None else torch.minimum(high, end)
    assert low is not None
    assert high is not None
    if bool((crossed := low > high).any()):  # x on a limit that was rounded in another type: the box holds both
        rounding = 4 * torch.finfo(x.dtype).eps * torch.maximum(low.abs(), high.abs())
        crossed = crossed & (low - high <= rounding)
        low, high = torch.where(crossed, high, low), torch.where(crossed, low, high)
    if bool((low > high).any()):
        raise UsageError(
            "lower must be at most upper everywhere: with these eps, lower and upper nothing is left of the box "
            "around x (is x itself between lower and upper?)"
        )
    return Interval(low, high)


def _fitting(name: str, value: Any, x: Tensor) -> Tensor:
    if isinstance(value, int | float):
        if not math.isfinite(value):
            raise UsageError(f"{name} must be finite, holds NaN or infinity")
        return x.new_full((), value)
    tensor = torch.as_tensor(value, dtype=x.dtype, device=x.device)
    _finite(name, tensor)
    try:
        fits = torch.broadcast_shapes(tensor.shape, x.shape) == x.shape
    except RuntimeError:
        fits = False
    if not fits:
        raise UsageError(f"{name} of shape {tuple(tensor.shape)} does not broadcast to x of shape {tuple(x.shape)}")
    return tensor


def _finite(name: str, value: Tensor) -> None:
    if not bool(torch.isfinite(value).all()):
        raise UsageError(f"{name} must be finite, holds NaN or infinity")


def check_labels(labels: Tensor, classes: int) -> None:
    """Refuse what are no labels ``(B,)`` of this many classes.

    Raises:
        UsageError: They are not.
    """
    if classes < 2:
        raise UsageError(
            "labels need two classes at least, the model has one output: return logits [0, z] in its place"
        )
    if labels.dim() != 1 or labels.is_floating_point():
        raise UsageError(f"labels must be whole numbers of shape (B,), got {labels.dtype} {tuple(labels.shape)}")
    if len(labels) and not 0 <= int(labels.min()) <= int(labels.max()) < classes:
        raise UsageError(f"labels must be between 0 and {classes - 1}, got {int(labels.min())} to {int(labels.max())}")


def margins_of(labels: Tensor, classes: int, like: Tensor) -> Tensor:
    """Rows ``e_y - e_j`` for all ``j != y`` in increasing order: what must be positive for class ``y`` to win.

    Args:
        labels: ``(B,)``, int64.
        classes: Number of classes ``K``.
        like: Gives type and device.

    Returns:
        ``(B, K - 1, K)``.

    Raises:
        UsageError: A label is not in ``0 .. K - 1``.
    """
    check_labels(labels, classes)
    labels = labels.to(like.device, torch.long)
    eye = torch.eye(classes, dtype=like.dtype, device=like.device)
    rows = eye[labels][:, None] - eye
    others = torch.arange(classes, device=like.device) != labels[:, None]
    return rows[others].view(len(labels), classes - 1, classes)


def check_spec(c: Tensor, batch: int, outputs: int, like: Tensor) -> Tensor:
    """Bring a specification to ``(B, S, K)``.

    Raises:
        UsageError: It is neither ``(S, K)`` nor ``(B, S, K)``, or not finite.
    """
    if (
        not isinstance(c, Tensor)
        or c.dim() not in (2, 3)
        or c.shape[-1] != outputs
        or (c.dim() == 3 and len(c) != batch)
    ):
        got = tuple(c.shape) if isinstance(c, Tensor) else type(c).__name__
        raise UsageError(f"C must have the shape (S, {outputs}) or ({batch}, S, {outputs}), got {got}")
    c = c.to(like)
    _finite("C", c)
    return c.expand(batch, -1, -1) if c.dim() == 2 else c
