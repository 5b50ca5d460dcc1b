"""Herding beside the textbook loop: one class of 1,300 examples, 512 features, 20 exemplars."""

import numpy as np
import torch

from _timing import interleave, show
from weightsmith.continual import herding

N, D, M = 1300, 512, 20


def textbook(vectors: np.ndarray) -> list[int]:
    """The rule of iCaRL as it is printed: distances of all candidate means, at every choice."""
    mean, chosen, total = vectors.mean(0), [], np.zeros(D, vectors.dtype)
    left = np.arange(N)
    for k in range(1, M + 1):
        candidates = (vectors[left] + total) / k
        best = int(np.argmin(np.sqrt(((mean - candidates) ** 2).sum(1))))
        chosen.append(int(left[best]))
        total = total + vectors[left[best]]
        left = np.delete(left, best)
    return chosen


def main() -> None:
    """Check that both choose the same, and time them."""
    torch.set_num_threads(1)
    features = torch.randn(N, D, generator=torch.Generator().manual_seed(0))
    vectors = (features / features.norm(dim=1, keepdim=True)).numpy()
    assert herding(features, M).tolist() == textbook(vectors)
    times = interleave({"textbook": lambda: textbook(vectors), "weightsmith": lambda: herding(features, M)}, rounds=20)
    show(f"Herding: {N} examples, {D} features, {M} exemplars", times, baseline="textbook")


if __name__ == "__main__":
    main()
