"""Averages of low-rank updates ``s B A``, which are not the products of averaged factors.

With bars for weighted means, ``sum_i w_i s B_i A_i = s Bbar Abar + s sum_i w_i (B_i - Bbar)(A_i - Abar)``: averaging
the factors drops the second term, the *covariance gap*. It is small for neighboring checkpoints of one run and large
for adapters that were initialized differently. The exact sum has the factors ``[w_i s B_i]`` and ``[A_i]`` at ``n``
times the rank, and its best approximation of a given rank needs only small decompositions.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def stacked(a: Sequence[Tensor], b: Sequence[Tensor], coefficients: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Write ``sum_i c_i B_i A_i`` exactly as one product.

    Args:
        a: ``(r_i, in)`` each.
        b: ``(out, r_i)`` each.
        coefficients: ``c_i``: weight times scaling.

    Returns:
        ``A (R, in)`` and ``B (out, R)`` with ``R = sum_i r_i``.
    """
    scaled = [factor * c for factor, c in zip(b, coefficients, strict=True)]
    return torch.cat(list(a)), torch.cat(scaled, dim=1)


def best_of_rank(a: Tensor, b: Tensor, rank: int) -> tuple[Tensor, Tensor, float]:
    """Find the best approximation of ``B A`` of a given rank without forming the product.

    ``B = Q_b R_b``, ``A^T = Q_a R_a``, and ``R_b R_a^T = U S V^T`` is small; then ``Q_b U`` and ``Q_a V`` are the
    singular vectors of ``B A`` (Eckart-Young).

    Args:
        a: ``(R, in)``.
        b: ``(out, R)``.
        rank: Of the result; the factors are padded with zeros where the product has less.

    Returns:
        ``A (rank, in)`` and ``B (out, rank)``, each with the square root of the singular values, and the discarded
        share ``||S[rank:]|| / ||S||``.
    """
    q_b, r_b = _qr(b)
    q_a, r_a = _qr(a.T)
    u, s, v = torch.linalg.svd(r_b @ r_a.T, full_matrices=False)
    root = s[:rank].sqrt()
    down, up = q_a(v[:rank].T * root).T, q_b(u[:, :rank] * root)
    missing = rank - len(root)
    if missing > 0:
        down, up = torch.nn.functional.pad(down, (0, 0, 0, missing)), torch.nn.functional.pad(up, (0, missing))
    energy = s.double().square()
    total = energy.sum().item()
    return down, up, math.sqrt(energy[rank:].sum().item() / total) if total else 0.0


def covariance_gap(a: Sequence[Tensor], b: Sequence[Tensor], weights: Sequence[float]) -> float:
    """Measure what averaging the factors loses: ``||sum_i w_i (B_i - Bbar)(A_i - Abar)|| / ||sum_i w_i B_i A_i||``.

    Args:
        a: ``(r, in)`` each.
        b: ``(out, r)`` each.
        weights: ``w_i``, of sum 1.

    Returns:
        At least 0; 0 where the whole is 0.
    """
    a_mean = sum(w * x for w, x in zip(weights, a, strict=True))
    b_mean = sum(w * x for w, x in zip(weights, b, strict=True))
    whole = _norm(*stacked(a, b, weights))
    gap = _norm(*stacked([x - a_mean for x in a], [x - b_mean for x in b], weights))
    return gap / whole if whole else 0.0


def _qr(x: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    # Q as a function: only a few of its columns' combinations are needed, and forming it takes half of the time
    reflectors, tau = torch.geqrf(x)
    k = len(tau)

    def apply(u: Tensor) -> Tensor:
        padded = torch.nn.functional.pad(u, (0, 0, 0, len(x) - len(u)))
        return torch.ormqr(reflectors[:, :k], tau, padded)

    return apply, reflectors[:k].triu()


def _norm(a: Tensor, b: Tensor) -> float:
    # ||B A||^2 = trace((B^T B)(A A^T)), which never forms the product
    square = ((b.T @ b).double() * (a @ a.T).double()).sum().item()
    return math.sqrt(max(square, 0.0))
