"""``weightsmith techniques`` and ``weightsmith show``."""

from pathlib import Path

import tyro
from rich.markdown import Markdown
from rich.table import Table

import weightsmith
from weightsmith.cli.console import console
from weightsmith.techniques import TECHNIQUES, technique


def techniques() -> int:
    """List the fifteen techniques, one line each."""
    table = Table(box=None, pad_edge=False, show_header=False)
    for card in TECHNIQUES:
        table.add_row("[green]●[/]" if card.available else "[dim]○[/]", f"[bold]{card.slug}[/]", card.purpose)
    console.print(table)
    console.print("\n● available  ○ announced, not in this version yet", style="dim")
    console.print("weightsmith show NAME tells more; weightsmith run NAME finds out whether it helps", style="dim")
    return 0


def show(slug: tyro.conf.Positional[str], /) -> int:
    """Show a technique's card: what it is, when to use it, how, the paper's claim, what was measured.

    Args:
        slug: A name from `weightsmith techniques`.
    """
    card = technique(slug)
    body = Path(weightsmith.__file__).parent / "cards" / f"{slug}.md"
    if body.is_file():
        console.print(Markdown(body.read_text("utf-8"), hyperlinks=False))
    else:
        console.print(Markdown(f"# {card.title}\n\n{card.purpose}.\n\n*Announced: not in this version yet.*"))
    facts = Table(box=None, pad_edge=False, show_header=False)
    facts.add_column(style="bold", no_wrap=True)
    facts.add_column()
    facts.add_row("claim", card.claim)
    facts.add_row("paper", f"{card.paper}. {card.venue} {card.year}, arXiv {card.arxiv}")
    facts.add_row("official code", card.code or "none published")
    if card.available:
        facts.add_row("names", "\n".join(card.names))
        facts.add_row("try it", f"weightsmith run {card.slug}")
    console.print()
    console.print(facts)
    return 0
