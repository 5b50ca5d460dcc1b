"""What pruning left."""

from dataclasses import dataclass, field

from torch import nn


@dataclass(frozen=True, slots=True)
class TensorDensity:
    """One tensor.

    Attributes:
        name: Qualified name.
        shape: Its shape.
        kept: Entries that the mask keeps; all of them where nothing is pruned.
        dead_rows: Output channels without any entry left.
        prunable: Whether it takes part in pruning.
    """

    name: str
    shape: tuple[int, ...]
    kept: int
    dead_rows: int = 0
    prunable: bool = True

    @property
    def numel(self) -> int:
        """Number of entries."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    @property
    def density(self) -> float:
        """Share of entries that are kept; 1 for an empty tensor."""
        return self.kept / self.numel if self.numel else 1.0


@dataclass(frozen=True, slots=True)
class PruneReport:
    """Densities by tensor, and both totals: of what could be pruned, and of all parameters.

    Attributes:
        model: The model; ``None`` for a folder.
        tensors: Every parameter once.
        left_out: Why weights that look prunable are not, by name.
    """

    model: nn.Module | None
    tensors: tuple[TensorDensity, ...]
    left_out: dict[str, str] = field(default_factory=dict)

    @property
    def density(self) -> float:
        """Share of prunable entries that are kept."""
        return _share([tensor for tensor in self.tensors if tensor.prunable])

    @property
    def density_of_all(self) -> float:
        """Share of all parameters that are kept."""
        return _share(list(self.tensors))

    @property
    def empty(self) -> tuple[str, ...]:
        """Tensors of which nothing is left: their layer passes nothing on."""
        return tuple(tensor.name for tensor in self.tensors if tensor.prunable and tensor.numel and not tensor.kept)

    def __str__(self) -> str:
        lines = [
            f"{self.density:.2%} of prunable weights kept, {self.density_of_all:.2%} of all parameters",
            *(
                f"  {t.name} {tuple(t.shape)}: {t.density:.2%}, {t.dead_rows} dead rows"
                for t in self.tensors
                if t.prunable
            ),
        ]
        if self.empty:
            lines.append(f"nothing left of {', '.join(self.empty)}")
        return "\n".join(lines)


def _share(tensors: list[TensorDensity]) -> float:
    total = sum(tensor.numel for tensor in tensors)
    return sum(tensor.kept for tensor in tensors) / total if total else 1.0
