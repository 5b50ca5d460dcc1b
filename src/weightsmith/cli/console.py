"""Where the command line prints."""

import io
import os
import sys
from pathlib import Path
from typing import TextIO

from rich.console import Console

from weightsmith.core.display import markup

console = Console()
errors = Console(stderr=True)

UNREAD = 141
"""Exit code once a reader has gone: what a shell shows for a program that SIGPIPE ended."""


def open_streams() -> None:
    """Make standard output and standard error fit to be written to, also where one is closed."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w"))  # noqa: SIM115  # as long as the process
        elif isinstance(stream, io.TextIOWrapper):  # a character that the terminal lacks must not end the command
            stream.reconfigure(errors="replace")


def finish(code: int, message: str = "") -> int:
    """Write what is buffered and then the error; gives the exit code, another one where the output was lost.

    Args:
        code: What the command ended with.
        message: What went wrong; ``""``: nothing.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except BrokenPipeError:
            code, message = UNREAD, ""
            _discard(stream)
        except OSError as error:
            code, message = 1, f"the output cannot be written: {error.strerror}"
            _discard(stream)
    if message:
        try:
            complain(message)
        except (OSError, SystemExit):  # nobody is left to tell
            _discard(sys.stderr)
    return code


def _discard(stream: TextIO) -> None:
    """Lose what is buffered and what follows, or the interpreter would complain of it at its end."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def print_line(text: str, style: str = "") -> None:
    """Print a line as it is: no markup in it is read, and it is not broken."""
    console.print("\n".join(map(markup, text.split("\n"))), style=style, highlight=False, soft_wrap=True)


def complain(message: str) -> None:
    """Print an error."""
    lines = "\n".join(map(markup, message.split("\n")))
    errors.print(f"[bold red]error:[/] {lines}", highlight=False, soft_wrap=True)
