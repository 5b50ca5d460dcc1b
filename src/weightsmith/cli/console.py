"""Where the command line prints."""

from rich.console import Console
from rich.markup import escape

console = Console()
errors = Console(stderr=True)


def print_line(text: str, style: str = "") -> None:
    """Print a line as it is: no markup in it is read, and it is not broken."""
    console.print(escape(text), style=style, highlight=False, soft_wrap=True)


def complain(message: str) -> None:
    """Print an error."""
    errors.print(f"[bold red]error:[/] {escape(message)}", highlight=False, soft_wrap=True)
