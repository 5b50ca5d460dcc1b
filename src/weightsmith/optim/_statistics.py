"""What the last step of a projected optimizer did."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn.parameter import is_lazy

from weightsmith.optim.projection import View


@dataclass(frozen=True, slots=True)
class ProjectionStats:
    """What the last step did to the tensors of one parameter group that have two dimensions or more.

    Attributes:
        channel: How many were projected row by row.
        layer: How many were projected as a whole.
        none: How many moved freely.
        mean_norm: Mean norm of the group's tensors of two dimensions or more, as they are now; NaN if there are none.
    """

    channel: int
    layer: int
    none: int
    mean_norm: float


def statistics(params: Iterable[Tensor], seen: Sequence[View | Tensor]) -> ProjectionStats:
    """Count what was seen in one parameter group; it waits for the device, and for the other ranks of shards."""
    views = [int(_whole(view)) for view in seen]
    matrices = [p.detach() for p in params if not is_lazy(p) and p.dim() >= 2 and p.numel()]
    norms = [float(_whole(torch.linalg.vector_norm(p))) for p in matrices]
    return ProjectionStats(
        channel=views.count(View.CHANNEL),
        layer=views.count(View.LAYER),
        none=views.count(View.NONE),
        mean_norm=sum(norms) / len(norms) if norms else float("nan"),
    )


def _whole(value: Any) -> Any:
    # float() of a distributed tensor is the share of this rank
    return value.full_tensor() if hasattr(value, "full_tensor") else value
