"""Inception Score, Fréchet distance and kernel distance of features, by their exact definitions, in double precision.

The functions take features and probabilities of any network. With those of the Inception graph of 2015-12-05 the
results are IS (arXiv 1606.03498), FID (arXiv 1706.08500) and KID (arXiv 1801.01401).
"""

import warnings
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, WeightsmithWarning

_SMALLEST = 1e-12  # p ln p is 0 at p = 0, where the formula in floating point is NaN


def inception_score(probabilities: Tensor, *, splits: int = 10) -> tuple[float, float]:
    """``exp(mean_n KL(p_n || mean p))`` per split; mean and population standard deviation over splits.

    Split ``i`` is the rows from ``floor(i N / S)`` to ``floor((i + 1) N / S)``, in the order given.

    Args:
        probabilities: ``(N, K)``, rows sum to 1.
        splits: How many parts; at most ``N``.

    Returns:
        Mean and standard deviation (divided by ``splits``).

    Raises:
        UsageError: There are fewer rows than splits, or values that are no probabilities.
    """
    p = probabilities.detach().double().cpu()
    if p.dim() != 2 or not 1 <= splits <= len(p):
        raise UsageError(f"splits must be between 1 and the number of rows, got {splits} for shape {tuple(p.shape)}")
    if not torch.isfinite(p).all() or p.min() < 0 or (p.sum(1) - 1).abs().max() > 1e-3:
        raise UsageError("probabilities must be finite, at least 0 and sum to 1 in every row: pass softmax outputs")
    p = p.clamp_min(_SMALLEST)
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        scores.append((part * (part.log() - part.mean(0).log())).sum(1).mean().exp())
    found = torch.stack(scores)
    return found.mean().item(), found.std(correction=0).item()


@dataclass(frozen=True, slots=True)
class Moments:
    """Mean ``(D,)`` and covariance ``(D, D)`` of features, divided by ``N - 1``, in float64; ``samples`` is ``N``."""

    mean: Tensor
    covariance: Tensor
    samples: int


def moments(features: Tensor) -> Moments:
    """Mean and covariance of features.

    Args:
        features: ``(N, D)``, ``N`` at least 2.

    Raises:
        UsageError: There are fewer than two rows.

    Warns:
        WeightsmithWarning: There are at most ``D`` rows, so that the covariance is singular.
    """
    if features.dim() != 2 or len(features) < 2:
        raise UsageError(f"features must be (N, D) with N of at least 2, got {tuple(features.shape)}")
    x = features.detach().double().cpu()
    if len(x) <= x.shape[1]:
        warnings.warn(
            f"{len(x)} samples for {x.shape[1]} features give a singular covariance: a Fréchet distance from so few "
            "samples is far too high",
            WeightsmithWarning,
            stacklevel=2,
        )
    centered = x - x.mean(0)
    return Moments(x.mean(0), centered.T @ centered / (len(x) - 1), len(x))


def frechet_distance(one: Moments, other: Moments) -> float:
    """``|m1 - m2|^2 + Tr S1 + Tr S2 - 2 Tr sqrt(S1 S2)``.

    ``S1 S2`` and ``sqrt(S1) S2 sqrt(S1)`` have the same eigenvalues, and the second is symmetric: the trace of the root
    is the sum of the square roots of its eigenvalues, negative ones from rounding set to 0.

    Args:
        one: Of one set of features.
        other: Of the other; the dimension must agree.

    Returns:
        The distance; infinite or NaN when the features are not finite.
    """
    if one.mean.shape != other.mean.shape:
        raise UsageError(f"both sets need equal feature dimensions, got {one.mean.numel()} and {other.mean.numel()}")
    if not all(bool(torch.isfinite(part).all()) for part in (one.covariance, other.covariance, one.mean, other.mean)):
        return float("nan")
    values, vectors = torch.linalg.eigh(one.covariance)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    trace = torch.linalg.eigvalsh(root @ other.covariance @ root).clamp_min(0).sqrt().sum()
    found = (one.mean - other.mean).square().sum() + one.covariance.trace() + other.covariance.trace() - 2 * trace
    distance: float = found.item()
    return distance


def kernel_distance(
    one: Tensor, other: Tensor, *, subsets: int = 100, subset_size: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Squared maximum mean discrepancy with the kernel ``(x . y / D + 1)^3``, unbiased, over random subsets.

    Args:
        one: ``(N, D)`` features.
        other: ``(M, D)`` features.
        subsets: How many pairs of subsets.
        subset_size: Rows of each, drawn without replacement; at most ``N`` and ``M``.
        seed: Of the draws.

    Returns:
        Mean and population standard deviation over subsets. The mean may be below 0.

    Raises:
        UsageError: ``subset_size`` is out of range.
    """
    if not 2 <= subset_size <= min(len(one), len(other)) or subsets < 1:
        raise UsageError(
            f"subset_size must be between 2 and the number of rows ({min(len(one), len(other))}), got {subset_size}"
        )
    a, b = one.detach().double().cpu(), other.detach().double().cpu()
    generator = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(subsets):
        x = a[torch.randperm(len(a), generator=generator)[:subset_size]]
        y = b[torch.randperm(len(b), generator=generator)[:subset_size]]
        found.append(_discrepancy(x, y))
    result = torch.stack(found)
    return result.mean().item(), result.std(correction=0).item()


def _discrepancy(x: Tensor, y: Tensor) -> Tensor:
    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1) ** 3

    n, xx, yy = len(x), kernel(x, x), kernel(y, y)
    within = (xx.sum() - xx.diagonal().sum() + yy.sum() - yy.diagonal().sum()) / (n * (n - 1))
    return within - 2 * kernel(x, y).mean()
