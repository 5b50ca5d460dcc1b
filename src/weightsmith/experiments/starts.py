"""How the arms about rich and lazy learning fill a weight; all of a seed start from the same random matrix."""

import torch
from torch import Tensor

from weightsmith.init import low_rank_, soft_rank_

_HALVINGS = 60


def start_(w: Tensor, arm: str, gain: float, generator: torch.Generator) -> Tensor:
    """Fill a weight as an arm says: ``full``, ``orthogonal``, or ``r<rank>-<norm>``.

    Args:
        w: ``(out, in, ...)``.
        arm: Its norm is what a cut keeps: ``frobenius``, ``spectral``, or ``both``.
        gain: Standard deviation of the random matrix times the root of its width.
        generator: Draws that matrix.
    """
    most = min(w.shape[0], w.numel() // w.shape[0])
    if arm == "orthogonal":
        return soft_rank_(w, most, gain=gain, generator=generator)
    if arm == "full":
        return low_rank_(w, most, gain=gain, generator=generator)
    name, _, norm = arm.removeprefix("r").partition("-")
    rank = min(int(name), most)
    if norm == "both":
        return _cut_at_both_norms_(low_rank_(w, most, gain=gain, generator=generator), rank)
    return low_rank_(w, rank, gain=gain, norm=norm, generator=generator)  # type: ignore[arg-type]


@torch.no_grad()
def _cut_at_both_norms_(w: Tensor, rank: int) -> Tensor:
    """Cut to a rank, and raise all that is left but the largest until the Frobenius norm is what it was.

    None is raised above the largest, so a rank too low to hold the norm ends with equal singular values below it.
    """
    u, s, v = torch.linalg.svd(w.double().flatten(1), full_matrices=False)
    kept, norm = s[:rank], s.norm()
    low, high = 1.0, float(s[0] / kept[-1])
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        low, high = (middle, high) if (middle * kept).clamp(max=s[0]).norm() < norm else (low, middle)
    return w.copy_(((u[:, :rank] * (high * kept).clamp(max=s[0])) @ v[:rank]).view_as(w))
