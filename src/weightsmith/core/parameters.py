"""``where=`` for parameters: the same forms as in `weightsmith.core.select`, over the names of parameters."""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from weightsmith.core.errors import UsageError, near
from weightsmith.core.weights import Slot, owners

ParameterPredicate = Callable[[str, nn.Parameter], bool]
WhereParameter = str | Sequence[str] | ParameterPredicate | None


def select_parameters(
    model: nn.Module, where: WhereParameter = None, *, default: ParameterPredicate
) -> dict[str, tuple[nn.Parameter, list[Slot]]]:
    """Choose parameters by name, in the model's own order; a tied one counts once and answers to all its names.

    Args:
        model: Whose parameters.
        where: ``None``, a glob over qualified names, a list of globs of which a leading ``!`` excludes, or a predicate
            ``(name, parameter) -> bool``.
        default: What ``None`` means, and what exclusions alone start from.

    Returns:
        By first name: the parameter, and the places that hold it.

    Raises:
        TypeError: ``where`` is none of the accepted forms.
        UsageError: Nothing matches.
    """
    wanted = _predicate(where, default)
    held = list(owners(model).values())
    found: dict[str, tuple[nn.Parameter, list[Slot]]] = {}
    for slots in held:
        parameter = slots[0].module._parameters[slots[0].attribute]
        if parameter is not None and any(wanted(slot.name, parameter) for slot in slots):
            found[slots[0].name] = (parameter, slots)
    if not found:
        pattern = where if isinstance(where, str) else ""
        names = [slot.name for slots in held for slot in slots]
        raise UsageError(f"where={where!r} matches no parameter that this can be applied to; {near(pattern, names)}")
    return found


def _predicate(where: WhereParameter, default: ParameterPredicate) -> ParameterPredicate:
    if where is None:
        return default
    if callable(where):
        return where
    globs = [where] if isinstance(where, str) else where
    if not isinstance(globs, Sequence) or not all(isinstance(glob, str) for glob in globs):
        raise TypeError(
            f"where must be None, a glob, a list of globs or a predicate (name, parameter) -> bool, got {where!r}"
        )
    wanted = [glob for glob in globs if not glob.startswith("!")]
    excluded = [glob[1:] for glob in globs if glob.startswith("!")]

    def matches(name: str, parameter: nn.Parameter) -> bool:
        included = any(fnmatchcase(name, glob) for glob in wanted) if wanted else default(name, parameter)
        return included and not any(fnmatchcase(name, glob) for glob in excluded)

    return matches
