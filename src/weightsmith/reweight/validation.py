"""Validation batches for the meta step, drawn from the same noisy data."""

from collections.abc import Callable
from typing import Any

import torch

from weightsmith.core.errors import UsageError


class RandomBatches:
    """Draws batches uniformly with replacement; calling it gives the next one.

    Args:
        dataset: Anything with a length and items.
        batch_size: Samples per batch.
        seed: Of the draws.
        collate_fn: Makes a batch of a list of items; ``None``: torch's default.

    Raises:
        UsageError: The data set is empty or ``batch_size`` is below 1.
    """

    def __init__(
        self, dataset: Any, batch_size: int, *, seed: int = 0, collate_fn: Callable[[list[Any]], Any] | None = None
    ) -> None:
        if batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        if not len(dataset):
            raise UsageError("dataset must hold samples to validate on, it is empty")
        self.dataset, self.batch_size = dataset, batch_size
        self.collate_fn = collate_fn or torch.utils.data.default_collate
        self._generator = torch.Generator().manual_seed(seed)

    def __call__(self) -> Any:
        """Draw a batch."""
        rows = torch.randint(len(self.dataset), (self.batch_size,), generator=self._generator)
        return self.collate_fn([self.dataset[row] for row in rows.tolist()])

    def state_dict(self) -> dict[str, Any]:
        """Where the draws are."""
        return {"generator": self._generator.get_state()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from there."""
        self._generator.set_state(state["generator"].cpu())
