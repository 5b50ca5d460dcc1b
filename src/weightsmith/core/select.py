"""``where=``: which modules and parameters a verb touches.

Every verb takes the same argument, read by this one file:

- ``None``: the technique's own choice (its docstring says which);
- a glob over qualified names, for example ``"blocks.*.mlp.fc1"`` (``*`` also crosses dots);
- a list of globs, of which a leading ``!`` excludes: ``["blocks.*", "!*.attn.*"]``; exclusions alone start from the
  technique's own choice;
- a predicate ``(name, module) -> bool``.

The small matrices that an adapter library (PEFT) hangs on a layer are no layers of the model: only a predicate chooses
them, so that ``"*.q_proj*"`` means the same with and without adapters.
"""

from collections.abc import Callable, Sequence
from fnmatch import fnmatchcase

from torch import nn

from weightsmith.core.errors import UsageError, near

Predicate = Callable[[str, nn.Module], bool]
Where = str | Sequence[str] | Predicate | None


def select(
    model: nn.Module, where: Where = None, *, default: Predicate, supported: Predicate | None = None
) -> dict[str, nn.Module]:
    """Choose modules of a model by name, in the model's own order.

    Args:
        model: The model whose ``named_modules()`` are looked through; a module used in several places counts once.
        where: ``None``, a glob, a list of globs, or a predicate; see the module docstring.
        default: What ``where=None`` means.
        supported: What the caller can handle at all; modules outside are never chosen. ``None``: same as ``default``.

    Returns:
        The chosen modules by qualified name; the root module has the name ``""``.

    Raises:
        TypeError: ``where`` is none of the accepted forms.
        UsageError: Nothing matches (a ``ValueError``); the message lists near names.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
        >>> list(select(net, "2", default=lambda name, module: isinstance(module, nn.Linear)))
        ['2']
    """
    can, wanted = supported or default, _predicate(where, default)
    inside = () if callable(where) else _adapters(model)
    candidates = {
        name: module for name, module in model.named_modules() if can(name, module) and not name.startswith(inside)
    }
    chosen = {name: module for name, module in candidates.items() if wanted(name, module)}
    if not chosen:
        if where is None:
            raise UsageError(f"where=None matches nothing: {type(model).__name__} has no module this can be applied to")
        pattern = where if isinstance(where, str) else next(iter(where), "") if isinstance(where, Sequence) else ""
        raise UsageError(f"where={where!r} matches nothing that this can be applied to; {near(pattern, candidates)}")
    return chosen


def _adapters(model: nn.Module) -> tuple[str, ...]:
    """Prefixes of the names of what adapters have added to layers; whole layers that they train in place stay in."""
    return tuple(
        f"{name}.{added}.".lstrip(".")
        for name, module in model.named_modules()
        for added in getattr(module, "adapter_layer_names", ())  # PEFT's layers say so
        if added != "modules_to_save"
    )


def _predicate(where: Where, default: Predicate) -> Predicate:
    if where is None:
        return default
    if isinstance(where, str):
        where = [where]
    if callable(where):
        return where
    if not isinstance(where, Sequence) or not all(isinstance(glob, str) for glob in where):
        raise TypeError(
            f"where must be None, a glob, a list of globs or a predicate (name, module) -> bool, got {where!r}"
        )
    wanted = [glob for glob in where if not glob.startswith("!")]
    excluded = [glob[1:] for glob in where if glob.startswith("!")]

    def matches(name: str, module: nn.Module) -> bool:
        included = any(fnmatchcase(name, glob) for glob in wanted) if wanted else default(name, module)
        return included and not any(fnmatchcase(name, glob) for glob in excluded)

    return matches
