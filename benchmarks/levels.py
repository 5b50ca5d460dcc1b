"""Make the table of nominal levels: ``SCALES`` of ``weightsmith.lab.stats.levels``.

For one claim of a family of ``m``, all levels ``0.05 * share_j / m`` are scaled so that the claim is rejected at any of
the looks with probability ``0.05 / m`` when there is no effect. Ten million runs of normal differences; about two
minutes.
"""

import numpy as np

from weightsmith.lab.stats.effect import p_value, t_statistic
from weightsmith.lab.stats.levels import ALPHA, LOOKS, SHARES

LARGEST = 8
BLOCKS, BLOCK = 40, 250_000


def smallest_scaled_p(generator: np.random.Generator, runs: int) -> np.ndarray:
    """``min_j p_j / share_j`` of ``(runs,)`` runs without an effect: a run crosses at scale ``c`` where it is below."""
    differences = generator.standard_normal((runs, LOOKS[-1]))
    scaled = [p_value(t_statistic(differences[:, :n]), n) / share for n, share in zip(LOOKS, SHARES, strict=True)]
    return np.min(scaled, axis=0)


def scales(blocks: int = BLOCKS, block: int = BLOCK, seed: int = 0) -> list[float]:
    """The factor for families of 1 to ``LARGEST`` claims."""
    generator = np.random.default_rng(seed)
    found = np.concatenate([smallest_scaled_p(generator, block) for _ in range(blocks)])
    return [float(np.quantile(found, ALPHA / m)) / (ALPHA / m) for m in range(1, LARGEST + 1)]


if __name__ == "__main__":
    print("SCALES = (" + ", ".join(f"{scale:.3f}" for scale in scales()) + ")")
