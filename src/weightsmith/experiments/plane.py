"""A loss of two weights that depends on their direction alone: where momentum makes the norm grow, it can be seen."""

from collections.abc import Callable

import torch
from torch import Tensor

from weightsmith.lab.job import Job
from weightsmith.lab.minimize import minimize

ALIGNED = 0.999  # cosine from which on the optimum counts as reached
_STEPS, _LR, _STARTS = 200, 0.1, 8


def solve(optimizer_of: Callable[[list[Tensor], float], torch.optim.Optimizer], job: Job) -> dict[str, float]:
    """Minimize ``-cos(w, (1, 0))`` from several points of the unit circle, far from the optimum; means over them.

    Args:
        optimizer_of: Parameters and learning rate to the optimizer; its weight decay is not used.
        job: Gives the seed, and records norm and cosine at every step.
    """
    generator = torch.Generator().manual_seed(job.seed)
    angles = 2.0 + torch.rand(_STARTS, generator=generator, dtype=torch.float64)
    points = [torch.stack([angle.cos(), angle.sin()])[None].requires_grad_() for angle in angles]
    optimizer = optimizer_of(list(points), _LR)
    for group in optimizer.param_groups:
        group["weight_decay"] = 0.0  # the problem is about the norm that momentum adds
    rows: list[tuple[float, Tensor]] = []

    def loss(step: int) -> Tensor:
        w = torch.cat(points)
        cosine = w[:, 0] / w.norm(dim=1)
        rows.append((w.norm(dim=1).mean().item(), cosine.detach()))
        job.record({"step": step, "norm": rows[-1][0], "cosine": cosine.mean().item()}, phase="plane")
        total: Tensor = -cosine.sum()
        return total

    minimize(optimizer, loss, steps=_STEPS + 1)
    aligned = torch.stack([cosine > ALIGNED for _, cosine in rows[:-1]] + [torch.ones(_STARTS, dtype=torch.bool)])
    return {"plane_norm": rows[-1][0], "plane_steps": aligned.int().argmax(0).float().mean().item()}
