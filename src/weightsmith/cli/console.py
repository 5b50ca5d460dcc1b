"""Where the command line prints."""

from rich.console import Console

from weightsmith.core.display import markup

console = Console()
errors = Console(stderr=True)


def print_line(text: str, style: str = "") -> None:
    """Print a line as it is: no markup in it is read, and it is not broken."""
    console.print("\n".join(map(markup, text.split("\n"))), style=style, highlight=False, soft_wrap=True)


def complain(message: str) -> None:
    """Print an error."""
    lines = "\n".join(map(markup, message.split("\n")))
    errors.print(f"[bold red]error:[/] {lines}", highlight=False, soft_wrap=True)
