"""A few examples of every class seen so far."""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import TensorDataset

from weightsmith.continual.classes import check_integers
from weightsmith.continual.herding import herding
from weightsmith.core.errors import UsageError, unknown

Selection = Literal["herding", "random"]


class ExemplarMemory:
    """Stored examples by class, in the order in which they were chosen, on the CPU.

    With a total budget ``M`` every one of ``n`` seen classes keeps ``M // n``: `add` shortens the earlier ones to
    the first part of their order. What is stored is up to the caller: pixels as uint8, token ids, or the indices of
    examples in a data set of the caller's own.

    Args:
        total: Examples of all classes together; the authors take 20 per class of the whole problem.
        per_class: Instead: examples of each class, never shortened.
        selection: ``"herding"``, or ``"random"``.
        seed: Of the random selection.

    Raises:
        UsageError: Not exactly one budget of at least 1 is given, or the selection is not known.
    """

    def __init__(
        self, total: int | None = None, *, per_class: int | None = None, selection: Selection = "herding", seed: int = 0
    ) -> None:
        if (total is None) == (per_class is None):
            raise UsageError("give either total= or per_class=, the number of examples to keep")
        name, budget = ("total", total) if total is not None else ("per_class", per_class)
        if isinstance(budget, bool) or not isinstance(budget, int) or budget < 1:
            raise UsageError(f"{name} must be an integer of at least 1, got {budget!r}")
        if selection not in ("herding", "random"):
            raise unknown("selection", selection, ["herding", "random"])
        self.total, self.per_class, self.selection = total, per_class, selection
        self._generator = torch.Generator().manual_seed(seed)
        self._held: dict[int, Tensor] = {}

    @property
    def counts(self) -> dict[int, int]:
        """Stored examples by class."""
        return {label: len(examples) for label, examples in self._held.items()}

    @property
    def nbytes(self) -> int:
        """Bytes of all stored examples."""
        return sum(examples.nbytes for examples in self._held.values())

    def __len__(self) -> int:
        return sum(self.counts.values())

    def room(self, n_classes: int) -> int:
        """How many examples a class keeps when ``n_classes`` have been seen.

        Raises:
            UsageError: Not one.
        """
        if self.per_class is not None:
            return self.per_class
        assert self.total is not None
        if self.total < n_classes:
            raise UsageError(f"total must be at least the {n_classes} classes seen, got {self.total}")
        return self.total // n_classes

    def add(self, inputs: Tensor, labels: Tensor, features: Tensor | None = None) -> None:
        """Choose examples of new classes, and shorten the earlier ones to the budget.

        Args:
            inputs: ``(N, ...)``: what to store, all examples of the new classes.
            labels: ``(N,)``: their head indices.
            features: ``(N, d)``: what the head takes, in evaluation mode, after the step; for herding.

        Raises:
            UsageError: A class is stored already, the sizes differ, features are missing, or the budget is smaller than
                the number of classes.
            TypeError: The labels are no integers, or the inputs no tensor.
        """
        new = self.check(inputs, labels, features)
        m = self.room(len(self._held) + len(new))
        chosen = {}
        for label in new:
            members = (labels == label).nonzero().flatten()
            if self.selection == "herding":
                assert features is not None
                order = herding(features[members.to(features.device)], m).to(members.device)
            else:
                order = torch.randperm(len(members), generator=self._generator)[:m].to(members.device)
            chosen[label] = inputs[members[order].to(inputs.device)].detach().to("cpu", copy=True)
        self._held = {label: examples[:m].clone() for label, examples in self._held.items()} | chosen

    def check(self, inputs: Tensor, labels: Tensor, features: Tensor | None = None) -> list[int]:
        """Refuse what `add` would refuse, and change nothing.

        Returns:
            The new classes.

        Raises:
            UsageError: See `add`.
            TypeError: See `add`.
        """
        if not isinstance(inputs, Tensor):
            raise TypeError(f"inputs must be a tensor, got {type(inputs).__name__}: store indices, torch.arange(N)")
        if len(inputs) != len(labels) or labels.dim() != 1 or not len(labels):
            raise UsageError(f"inputs and labels must be equally many, got {len(inputs)} and {tuple(labels.shape)}")
        if self.selection == "herding" and (features is None or len(features) != len(labels)):
            got = "none" if features is None else str(len(features))
            raise UsageError(f"herding needs features of all {len(labels)} examples, got {got}")
        check_integers(labels)
        new = sorted({int(label) for label in labels})
        known = [label for label in new if label in self._held]
        if known:
            raise UsageError(f"class {known[0]} is stored already")
        self.room(len(self._held) + len(new))
        return new

    def tensors(self) -> tuple[Tensor, Tensor]:
        """All stored examples ``(N, ...)`` and their labels ``(N,)``, by class, best first.

        Raises:
            UsageError: Nothing is stored yet.
        """
        if not self._held:
            raise UsageError("the memory is empty: nothing was added")
        labels = [torch.full((len(examples),), label) for label, examples in self._held.items()]
        return torch.cat(list(self._held.values())), torch.cat(labels)

    def dataset(self) -> TensorDataset:
        """The same as a data set, to concatenate with the new data."""
        return TensorDataset(*self.tensors())

    def state_dict(self) -> dict[str, Any]:
        """What is stored, and where the random selection stands."""
        return {"held": dict(self._held), "generator": self._generator.get_state()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self._held = {int(label): examples.cpu() for label, examples in state["held"].items()}
        self._generator.set_state(state["generator"])
