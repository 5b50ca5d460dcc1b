"""Batches on their way from a split to the model, read in this process or by workers."""

import os
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from weightsmith.lab.task import Batch, Batches

Pass = tuple[int, Sequence[Tensor]]
"""One pass over some examples: the seed of its augmentation, and the indices ``(B,)`` of each batch."""


def read(batches: Batches, passes: Iterable[Pass], rank: int, processes: int, device: torch.device) -> Iterator[Batch]:
    """Read this process's share of each batch: every ``processes``-th example, from number ``rank``."""
    for batches.seed, order in passes:
        shares = [indices[rank::processes] for indices in order]
        for batch in (
            _decoded_by_workers(batches, shares, processes) if batches.slow else map(batches.__getitems__, shares)
        ):
            yield batch.to(device)


def _decoded_by_workers(batches: Any, shares: Sequence[Tensor], processes: int) -> DataLoader[Batch]:
    return DataLoader(
        batches,
        batch_sampler=[indices.tolist() for indices in shares],
        collate_fn=_as_it_is,
        num_workers=min(8, (os.cpu_count() or 1) // processes),
        generator=torch.Generator(),  # leaves the global one alone
    )


def _as_it_is(batch: Any) -> Any:
    return batch
