"""A two-layer linear network, where the alignment of the tangent kernel is known in closed form.

``f(x) = w^T W x`` with whitened inputs learns a teacher ``beta^T x`` by gradient descent on the squared loss. Its
tangent kernel, as an operator on inputs, is ``K = W^T W + |w|^2 I``. From a small start the solution is balanced,
``W^T W = |beta| b b^T`` and ``|w|^2 = |beta|`` with ``b = beta / |beta|``, whatever the start; so with
``M = W(0)^T W(0)`` and ``q = |w(0)|^2``:

    KA = (b^T M b + tr M + q (d + 1)) / (|M + q I| sqrt(d + 3))

and for ``q = 0``, on average over isotropic tasks, ``(d + 1) / (d sqrt(d + 3)) sqrt(PR)``, with the participation ratio
``PR = (tr M)^2 / |M|^2``. It rises with the rank. A start of rank one that points at the task is the exception:
balanced, its alignment is 1.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from weightsmith.diagnose import kernel_alignment

INPUTS, HIDDEN = 20, 30
SCALES = (0.001, 0.1, 1.0)
"""Frobenius norms of the full-rank start: where the theory is exact, close, and no longer meant to hold."""


def measure(arm: str, seed: int, start_: Callable[[Tensor, str, torch.Generator], Tensor]) -> dict[str, float]:
    """Train the network from an arm's start at every scale; the alignment, and how far the theory is off.

    Args:
        arm: What ``start_`` takes; ``"aligned"``: rank one along the task, with a balanced readout.
        seed: Of the task and the start.
        start_: Fills ``W(0)``.

    Returns:
        ``linear`` and ``linear_gap`` for the smallest scale, the others with their scale behind.
    """
    generator = torch.Generator().manual_seed(seed)
    beta = torch.randn(INPUTS, generator=generator, dtype=torch.float64)
    beta /= beta.norm()
    drawn = generator.get_state()

    def filled(name: str) -> Tensor:
        generator.set_state(drawn)
        return start_(torch.empty(HIDDEN, INPUTS, dtype=torch.float64), name, generator)

    unit = torch.full((HIDDEN,), HIDDEN**-0.5, dtype=torch.float64)
    first = torch.outer(unit, beta) if arm == "aligned" else filled(arm) / filled("full").norm()
    readout = unit if arm == "aligned" else torch.zeros_like(unit)
    found: dict[str, float] = {}
    for scale in SCALES:
        trained = trained_alignment(scale * first, scale * readout, beta)
        expected = expected_alignment(scale * first, scale * readout, beta)
        end = "" if scale == SCALES[0] else f"_{scale:g}"
        found |= {f"linear{end}": trained, f"linear_gap{end}": abs(trained - expected)}
    return found


def expected_alignment(first: Tensor, readout: Tensor, beta: Tensor) -> float:
    """The alignment that the theory says, for a small start.

    Args:
        first: ``W(0)``, ``(h, d)``.
        readout: ``w(0)``, ``(h,)``.
        beta: The teacher, ``(d,)``.
    """
    m, b, d, q = first.T @ first, beta / beta.norm(), len(beta), float(readout.square().sum())
    top = float(b @ m @ b) + float(m.trace()) + q * (d + 1)
    return top / (float((m + q * torch.eye(d, dtype=m.dtype)).norm()) * math.sqrt(d + 3))


def trained_alignment(
    first: Tensor, readout: Tensor, beta: Tensor, *, lr: float = 0.02, residual: float = 1e-6, most: int = 200_000
) -> float:
    """The alignment that gradient descent gives, NaN if it has not converged.

    Args:
        first: As for `expected_alignment`.
        readout: As there.
        beta: As there.
        lr: Learning rate.
        residual: Train until the error ``|W^T w - beta|`` is below this share of ``|beta|``.
        most: Steps at most.
    """
    start = _kernel(first, readout)
    w1, w2 = first.clone(), readout.clone()
    for _ in range(most):
        error = beta - w1.T @ w2
        if float(error.norm()) < residual * float(beta.norm()):
            return kernel_alignment(start, _kernel(w1, w2))
        w1, w2 = w1 + lr * torch.outer(w2, error), w2 + lr * (w1 @ error)
    return math.nan


def _kernel(first: Tensor, readout: Tensor) -> Tensor:
    return first.T @ first + readout.square().sum() * torch.eye(first.shape[1], dtype=first.dtype)
