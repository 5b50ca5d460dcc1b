"""The table of operations: how each one bounds its output, forward and backward."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from weightsmith.core.errors import UsageError

Ibp = Callable[..., Any]
"""``(call, args, kwargs) -> Interval``: ``args`` hold an Interval wherever an argument is not known exactly."""


@dataclass(frozen=True, slots=True)
class Lines:
    """A linear function below and one above an elementwise operation of one input, on its interval.

    ``below * x + below_at <= f(x) <= above * x + above_at``; an offset of ``None`` is 0. All have the input's shape.
    """

    below: Tensor
    below_at: Tensor | None
    above: Tensor
    above_at: Tensor | None


@dataclass(frozen=True, slots=True)
class Planes:
    """A function below and one above an operation, both affine in all inputs that are not known exactly.

    Attributes:
        below: Takes one tensor per such input, in the order of the arguments.
        above: Likewise.
    """

    below: Callable[..., Tensor]
    above: Callable[..., Tensor]


Crown = Callable[..., Lines | Planes]
"""``(call, args, kwargs) -> Lines | Planes``."""


@dataclass(frozen=True, slots=True)
class Rule:
    """How an operation is bounded.

    Attributes:
        ibp: Interval of the output.
        crown: Linear functions around it; ``None``: there are none, CROWN methods refuse the operation.
        affine: It is affine in all inputs that are not known exactly, so that ``crown`` is not needed.
        reshapes: It only moves, repeats or drops elements.
        rounding: ``(call, args, kwargs, out) -> error`` of ``ibp`` in floating point, for outward rounding; ``None``:
            not analyzed.
    """

    ibp: Ibp
    crown: Crown | None = None
    affine: bool = False
    reshapes: bool = False
    rounding: Callable[..., Tensor] | None = None


RULES: dict[Any, Rule] = {}
"""Rules by name of the operation, or by module class or function."""


def register(*names: str, **parts: Any) -> Callable[[Ibp], Ibp]:
    """Enter a forward rule, with its other parts, under one or several names."""

    def enter(ibp: Ibp) -> Ibp:
        for name in names:
            RULES[name] = Rule(ibp, **parts)
        return ibp

    return enter


def register_bound(
    op: type | Callable[..., Any], *, ibp: Callable[..., Any], crown: Callable[..., Planes | Lines] | None = None
) -> None:
    """Tell how an operation of your own is bounded.

    Args:
        op: A module class, which is then not looked into, or a function that models call.
        ibp: ``(*args, **kwargs) -> Interval`` with an `Interval` for every argument that is not known exactly;
            for a module class the module comes first. It must contain every value that the operation can take.
        crown: Likewise, returning `Lines` or `Planes` around the operation on these intervals; ``None``:
            the methods ``"crown"`` and ``"crown-ibp"`` refuse the operation.

    Raises:
        UsageError: ``op`` is neither a class nor a function.

    Example:
        >>> import torch
        >>> from weightsmith.certify import Interval, register_bound
        >>> def cube(x): return x ** 3
        >>> register_bound(cube, ibp=lambda x: Interval(cube(x.lower), cube(x.upper)))
    """
    if not callable(op):
        raise UsageError(f"op must be a module class or a function, got {op!r}")

    def forward(call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return ibp(*args, **kwargs)

    def around(call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Lines | Planes:
        assert crown is not None
        return crown(*args, **kwargs)

    RULES[op] = Rule(forward, around if crown is not None else None)


def own_operations() -> list[Any]:
    """What users have registered."""
    return [op for op in RULES if not isinstance(op, str)]
