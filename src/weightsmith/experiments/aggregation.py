"""Rules of TorchJD that combine the gradients of several rewards, as rivals of weights that move."""

import logging
from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from weightsmith.core.errors import require
from weightsmith.lab.experiment import Arm
from weightsmith.reweight import FixedWeights

_RULES = {
    "UPGrad": (Arm("upgrad", "projects each gradient so that it worsens no other (TorchJD)", "UPGrad"), "quadprog"),
    "MGDA": (Arm("mgda", "the shortest convex combination of the gradients (TorchJD)", "MGDA"), "torchjd"),
}


def rivals() -> list[Arm]:
    """The arms whose packages are installed."""
    return [arm for arm, module in _RULES.values() if find_spec("torchjd") and find_spec(module)]


def report_missing() -> None:
    """Say in one line which arms are left out."""
    there = rivals()
    if lacking := [arm.label for arm, _ in _RULES.values() if arm not in there]:
        logging.getLogger(__name__).warning(
            'left out, because TorchJD or its solver is not installed: %s; pip install "weightsmith[rl]"',
            ", ".join(lacking),
        )


class Aggregation(FixedWeights):
    """Combine the objectives' losses with weights that a rule finds anew from their gradients, at every update.

    Args:
        rule: ``"UPGrad"`` or ``"MGDA"``.
        n_objectives: ``K``.

    Attributes:
        weights: Those of the latest update, scaled to sum 1.

    Raises:
        MissingExtra: TorchJD is not installed.
    """

    def __init__(self, rule: str, n_objectives: int) -> None:
        super().__init__([1 / n_objectives] * n_objectives)
        torchjd = require("torchjd.aggregation", extra="rl", purpose=f"the rule {rule}")
        self._find = getattr(torchjd, f"{rule}Weighting")()

    def loss(self, losses: Sequence[Tensor], params: Sequence[Tensor]) -> Tensor:
        """The weighted sum of the losses; its gradient is what the rule makes of theirs."""
        rows = [torch.autograd.grad(loss, params, retain_graph=True) for loss in losses]
        jacobian = torch.stack([torch.cat([part.flatten() for part in row]) for row in rows]).double()
        found = self._find(jacobian @ jacobian.T)
        if found.sum() > 0:
            self.weights = (found / found.sum()).cpu()
        weighted: Tensor = torch.stack(list(losses)) @ found.to(losses[0])
        return weighted
