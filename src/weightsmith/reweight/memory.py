"""The samples that a model saw last, class by class: what a sample's behavior is compared with."""

from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError


class SampleStatsMemory:
    """The samples seen last, class by class.

    Args:
        num_classes: Number of labels.
        window: How many batches of samples each class keeps; 0: those of the current batch only.
        batch_size: Samples per batch; ``None``: as many as the first batch has.
        class_separation: A memory per class; ``False``: one for all.

    Raises:
        UsageError: A number is out of range.
    """

    def __init__(
        self, num_classes: int, window: int = 1, batch_size: int | None = None, *, class_separation: bool = True
    ) -> None:
        if num_classes < 2:
            raise UsageError(f"num_classes must be at least 2, got {num_classes}")
        if window < 0:
            raise UsageError(f"window must be 0 or more, got {window}")
        if batch_size is not None and batch_size < 1:
            raise UsageError(f"batch_size must be at least 1, got {batch_size}")
        self.num_classes, self.window, self.batch_size = num_classes, window, batch_size
        self.class_separation = class_separation
        self._values: Tensor | None = None  # (classes, slots, 5), a ring per class
        self._seen: Tensor | None = None  # (classes,), samples that ever came in

    def reset(self) -> None:
        """Forget all samples; done at the start of every epoch."""
        self._values = self._seen = None

    def groups(self, labels: Tensor) -> Tensor:
        """The memory that each sample belongs to, ``(B,)``."""
        return labels if self.class_separation else torch.zeros_like(labels)

    def add(self, values: Tensor, labels: Tensor) -> Tensor:
        """Append the samples of a batch, in order.

        Args:
            values: ``(B, 5)``, see `Signals.stored`.
            labels: ``(B,)``, int64.

        Returns:
            ``(B,)``, their places in the rings of their classes.
        """
        rows = max(self.window * (self.batch_size or len(labels)), len(labels))
        if self.window == 0 or self._values is None or rows > self._values.shape[1]:
            self._grow(rows, values)
        assert self._values is not None
        assert self._seen is not None
        group = self.groups(labels)
        one_hot = torch.nn.functional.one_hot(group, len(self._seen))
        rank = one_hot.cumsum(0).gather(1, group[:, None]).squeeze(1) - 1
        at = (self._seen[group] + rank) % self._values.shape[1]
        self._values[group, at] = values.to(self._values.dtype)
        self._seen += one_hot.sum(0)
        return at

    def _grow(self, rows: int, values: Tensor) -> None:
        old, seen = self._values, self._seen
        classes = self.num_classes if self.class_separation else 1
        fresh = values.new_zeros(classes, rows, values.shape[1])
        self._values, self._seen = fresh, torch.zeros(classes, dtype=torch.int64, device=values.device)
        if self.window == 0 or old is None or seen is None:
            return
        for index, count in enumerate(seen.tolist()):  # rare: after a batch that was smaller than the next
            have, slots = min(count, old.shape[1]), old.shape[1]
            order = torch.arange(count - have, count, device=old.device) % slots
            fresh[index, :have] = old[index, order]
            self._seen[index] = have

    def members(self, group: Tensor, agreement: Tensor) -> tuple[Tensor, Tensor]:
        """The stored samples of some groups.

        Args:
            group: ``(U,)``, which memory.
            agreement: ``(U,)``, 0 or 1.

        Returns:
            Values ``(U, slots, 4)``, and which of them count ``(U, slots)``.
        """
        assert self._values is not None
        assert self._seen is not None
        values = self._values[group]
        filled = torch.arange(values.shape[1], device=values.device) < self._seen[group, None]
        return values[..., :4], filled & (values[..., 4] == agreement[:, None])

    def state_dict(self) -> dict[str, Any]:
        """The samples that are kept."""
        return {
            "values": None if self._values is None else self._values.clone(),
            "seen": None if self._seen is None else self._seen.clone(),
        }

    def load_state_dict(self, state: dict[str, Any], device: torch.device | None = None) -> None:
        """Take the samples of `state_dict` back.

        Raises:
            UsageError: They are those of another number of classes.
        """
        values, seen = state["values"], state["seen"]
        classes = self.num_classes if self.class_separation else 1
        if values is not None and len(values) != classes:
            raise UsageError(f"the saved memory has {len(values)} classes, this one has {classes}")
        self._values = None if values is None else values.to(device, copy=True)
        self._seen = None if seen is None else seen.to(device, copy=True)
