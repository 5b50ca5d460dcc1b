"""How far the outputs of a changed network are from those of the network that it was."""

import torch
from torch import nn

from weightsmith.core.outputs import logits_of
from weightsmith.lab.task import Batch, Batches, forward


def batches_of(split: Batches, most: int | None = None, *, size: int = 32) -> list[Batch]:
    """Read the examples of a split in their order, at most ``most``."""
    rows = torch.arange(len(split))[:most]
    return [split.__getitems__(part) for part in rows.split(size)]


@torch.no_grad()
def relative_error(changed: nn.Module, model: nn.Module, batches: list[Batch]) -> float:
    """``||q - fp||^2 / ||fp||^2`` over all outputs, ``q`` of the changed network and ``fp`` of the network it was."""
    device = next(model.parameters()).device
    off, full = torch.zeros((), dtype=torch.float64), torch.zeros((), dtype=torch.float64)
    for batch in batches:
        there = batch.to(device)
        q, fp = (logits_of(forward(network, there)).double() for network in (changed, model))
        off += (q - fp).square().sum().cpu()
        full += fp.square().sum().cpu()
    return float(off / full)
