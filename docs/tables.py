"""Write what README and docs repeat of the technique cards between their markers; ``--check`` only compares."""

import sys
from pathlib import Path

from weightsmith.techniques import TECHNIQUES

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- techniques: written by `make tables` -->", "<!-- /techniques -->"
PAGES = {"README.md": "docs/techniques/", "docs/techniques/index.md": ""}


def table(cards: str) -> str:
    """The techniques as Markdown; ``cards`` is the path from the page to the method cards."""
    lines = ["| lifecycle | technique | what it is for | paper | state |", "|---|---|---|---|---|"]
    for card in TECHNIQUES:
        name = f"[`{card.slug}`]({cards}{card.slug}.md)" if card.available else f"`{card.slug}`"
        paper = f"[{card.venue} {card.year}](https://arxiv.org/abs/{card.arxiv})"
        state = "**available**" if card.available else "announced"
        lines.append(f"| {card.stage} | {name} | {card.purpose} | {paper} | {state} |")
    return "\n".join(lines)


def updated(page: str) -> str:
    """A page with its table as it should be."""
    text = (ROOT / page).read_text()
    head, rest = text.split(BEGIN)
    return f"{head}{BEGIN}\n{table(PAGES[page])}\n{END}{rest.split(END)[1]}"


def main() -> None:
    """Write every page that has drifted, or report it."""
    stale = [page for page in PAGES if updated(page) != (ROOT / page).read_text()]
    if "--check" in sys.argv:
        sys.exit(f"run make tables: {', '.join(stale)}" if stale else 0)
    for page in stale:
        (ROOT / page).write_text(updated(page))


if __name__ == "__main__":
    main()
