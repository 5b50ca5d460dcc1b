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

import torch
from torch import Tensor

from weightsmith.diagnose import kernel_alignment


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
