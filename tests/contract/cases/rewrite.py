"""What a verb that changes how weights are written promises."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from torch import nn

from weightsmith import fold_


@dataclass(frozen=True)
class Rewrite:
    """A verb that changes how weights are written, and the verb that makes them plain again.

    Attributes:
        begin: ``(model, inputs, where=...) -> model``.
        end: ``model -> model``.
        change_at_begin: How far outputs may move when it begins; ``None``: it is meant to change them.
        change_at_end: How far outputs may move when it ends.
        ends_plain: Whether the model then has the modules and the keys that it came with.
        refuses: Models that it does not take, with what the error says.
    """

    begin: Callable[..., nn.Module]
    end: Callable[[nn.Module], nn.Module] = fold_
    change_at_begin: float | None = None
    change_at_end: float = 0.0
    ends_plain: bool = True
    refuses: Mapping[str, str] = field(default_factory=dict)
