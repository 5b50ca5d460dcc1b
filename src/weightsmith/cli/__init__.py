"""The command line: ``weightsmith run``, ``compare`` and others around the lab, and jobs on model files.

Exit codes: 0 it ran, whatever the verdict; 1 it failed; 2 it was asked for something that cannot be done; 130 it was
interrupted; 141 nobody reads its output any more.
"""

import importlib
import sys
from collections.abc import Callable, Sequence

import tyro

from weightsmith.cli.console import UNREAD, finish, open_streams, print_line
from weightsmith.core.errors import MissingExtra, UsageError

_COMMANDS = {
    "techniques": ("weightsmith.cli.cards", "List the fifteen techniques, one line each."),
    "show": ("weightsmith.cli.cards", "Show a technique's card: what it is, when to use it, how, what was measured."),
    "suggest": (
        "weightsmith.cli.suggest",
        "List which techniques apply to a model, to which layers, and why the others do not.",
    ),
    "run": ("weightsmith.cli.run", "Find out whether a technique helps: run its experiment, judge its claims."),
    "compare": ("weightsmith.cli.compare", "Compare your own training with and without techniques, or any commands."),
    "report": ("weightsmith.cli.reports", "Rebuild the report of one or several run folders."),
    "verify": ("weightsmith.cli.reports", "Repeat one seed of a committed result and compare."),
    "certify": (
        "weightsmith.tools.certify",
        "Measure for how many images no small change of the pixels can change a classifier's answer.",
    ),
    "diagnose": (
        "weightsmith.tools.diagnose",
        "Measure how far a model has moved between two checkpoints: lazily, or by learning features.",
    ),
    "merge": ("weightsmith.tools.merge", "Merge the checkpoints of one training run, weighted by what it has logged."),
    "prune": (
        "weightsmith.tools.prune",
        "Set the smallest weights of a checkpoint folder to zero; write a smaller file beside it if you like.",
    ),
    "quantize": (
        "weightsmith.tools.quantize",
        "Quantize a Hugging Face model folder, block by block, into integer weights that load elsewhere.",
    ),
    "restore": ("weightsmith.tools.restore", "Take noise, haze or rain off an image with a trained network."),
}


def _command(name: str, arguments: list[str]) -> Callable[..., int]:
    """A command's function; that of a command which is not asked for only has its description."""
    module, text = _COMMANDS[name]
    if arguments[0] == name:
        loaded = importlib.import_module(module)
        prepare = getattr(loaded, f"prepare_{name}", None)
        command: Callable[..., int] = prepare(arguments) if prepare is not None else getattr(loaded, name)
        return command

    def listed() -> int:
        raise NotImplementedError(name)

    listed.__doc__ = text
    return listed


def _dispatch(arguments: list[str]) -> int:
    arguments = arguments or ["--help"]
    if arguments == ["--version"]:
        from weightsmith import __version__

        print_line(f"weightsmith {__version__}")
        return 0
    code: int = tyro.extras.subcommand_cli_from_dict(
        {name: _command(name, arguments) for name in _COMMANDS},
        args=arguments,
        prog="weightsmith",
        description="Will this trick help my model? Find out with one command, keep it with one line.",
    )
    return code


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the ``weightsmith`` command.

    Args:
        arguments: Words after the program's name; ``None``: those of this process. ``--debug`` shows tracebacks.
    """
    open_streams()
    words = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in words
    words = [word for word in words if word != "--debug"]
    message = ""
    try:
        code = _dispatch(words)
    except KeyboardInterrupt:
        code = 130
        message = "interrupted; what was finished is kept, and the same command continues from there"
    except SystemExit as stop:  # of the parser, of a user's file, or of rich because nobody reads
        code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        code = UNREAD if isinstance(stop.__context__, BrokenPipeError) else code
        message = stop.code if isinstance(stop.code, str) else ""
    except BrokenPipeError:
        code = UNREAD
    except Exception as error:
        if debug:
            raise
        code = 2 if isinstance(error, UsageError) else 1
        message = str(error) if isinstance(error, UsageError | MissingExtra) else f"{type(error).__name__}: {error}"
    sys.exit(finish(code, message))
