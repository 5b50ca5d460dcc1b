"""Errors that say what is wrong and what to do, worded in the same way everywhere."""

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType

_MOST_COMPARED = 200


class MissingExtra(ImportError):
    """An optional dependency is needed and not installed; the message holds the command that installs it."""


class UsageError(ValueError):
    """What the user asked for cannot be done as asked; the message names the argument, its value and how to fix it."""


class WeightsmithWarning(UserWarning):
    """Something the library did that the user should know of, although the call went through."""


def require(module: str, *, extra: str, purpose: str) -> ModuleType:
    """Import an optional module, or say which extra brings it.

    Args:
        module: Dotted name to import, for example ``"trl"``.
        extra: The extra of this package that installs it, for example ``"hf"``.
        purpose: What it is needed for; ends the sentence "``module`` is needed for ...".

    Raises:
        MissingExtra: The module is not installed.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or module.split(".")[0] != error.name.split(".")[0]:
            raise  # the module is there, but something that it needs is not: hide nothing
        name = module.split(".")[0]
        raise MissingExtra(f'{name} is needed for {purpose}: pip install "weightsmith[{extra}]"') from error


def brief(value: object, most: int = 80) -> str:
    """Show a value out of a file, in one line of limited length."""
    text = ascii(value)
    return text if len(text) <= most else f"{text[: most - 3]}..."


def reason(error: BaseException, most: int = 300) -> str:
    """Word another library's error in one line of limited length."""
    first = str(error).strip().partition("\n")[0].rstrip()
    text = f"{type(error).__name__}: {first}" if first else type(error).__name__
    return text if len(text) <= most else f"{text[: most - 3]}..."


def near(name: str, known: Iterable[str], *, most: int = 5) -> str:
    """Word the known names that resemble ``name``, or the first few when none does."""
    names = list(dict.fromkeys(known))
    if not names:
        return "there are none"
    close = difflib.get_close_matches(name[:_MOST_COMPARED], names, n=most, cutoff=0.5)
    if close:
        return "did you mean " + " or ".join(map(brief, close)) + "?"
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return "known: " + ", ".join(map(brief, names[:most])) + more


def unknown(argument: str, value: str, known: Iterable[str], *, most: int = 20) -> UsageError:
    """Build the error for a name that is none of the known ones."""
    return UsageError(f"{argument} {brief(value)} is not known: {near(value, known, most=most)}")
