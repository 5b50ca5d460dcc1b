"""Write what README and docs repeat of cards and committed results; ``--check`` only compares."""

import importlib
import importlib.util
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import measured

from weightsmith import ROOMS
from weightsmith.techniques import TECHNIQUES

ROOT = Path(__file__).parents[1]
DETAILS = "<details><summary>Announced</summary>\n\n{}\n</details>\n"


def table(cards: str, *, available: bool) -> str:
    """The techniques as Markdown; ``cards`` is the path from the page to the method cards."""
    lines = ["| technique | what it is for | stage | paper |", "|---|---|---|---|"]
    for card in TECHNIQUES:
        if card.available == available:
            name = f"[{card.title}]({cards}{card.slug}.md)" if available else card.title
            paper = f"[{card.venue} {card.year}](https://arxiv.org/abs/{card.arxiv})"
            lines.append(f"| {name} | {card.purpose} | {card.stage} | {paper} |")
    return "\n".join(lines) + "\n"


def lists(text: str, cards: str, announced: str) -> str:
    """A page with the available techniques and, as long as there are any, the announced ones under a heading."""
    text = between(text, "techniques", table(cards, available=True))
    waiting = any(not card.available for card in TECHNIQUES)
    return between(text, "announced", announced.format(table(cards, available=False)) if waiting else "")


def between(text: str, name: str, content: str, mark: str = "<!-- {} -->") -> str:
    """A page with other content between the markers of this name; ``mark`` is how the file writes a comment."""
    begin, end = mark.format(f"{name}: written by `make tables`") + "\n", mark.format(f"/{name}")
    head, rest = text.split(begin)
    return f"{head}{begin}{content}{end}{rest.split(end, 1)[1]}"


def navigation(text: str) -> str:
    """``mkdocs.yml`` with the pages of techniques and rooms."""
    pages = []
    for card in TECHNIQUES:
        if card.available:
            pages.append(f"      - {card.title}: techniques/{card.slug}.md\n")
            for more in sorted((ROOT / "docs/techniques").glob(f"{card.slug}-*.md")):
                title = more.read_text().partition("\n")[0].removeprefix("# ")
                pages.append(f"      - {title}: techniques/{more.name}\n")
    rooms = [f"      - weightsmith.{room}: api/{room}.md\n" for room in ROOMS]
    text = between(text, "techniques", "".join(pages), "      # {}")
    return between(text, "rooms", "".join(rooms), "      # {}")


def reference(room: str) -> str:
    """The API page of a room: what techniques consist of, verbs first, then what supports them, folded."""
    name = f"weightsmith.{room}"
    face = importlib.import_module(name)
    listed = list(dict.fromkeys(re.findall(r"``(\w+)``", face.__doc__ or "")))
    order = {public: position for position, public in enumerate(listed)}
    cards = {public for card in TECHNIQUES for public in card.names}
    names = sorted(face.__all__, key=lambda public: (not public.endswith("_"), order.get(public, len(order)), public))
    leading = [public for public in names if public.endswith("_") or f"{name}.{public}" in cards]
    others = [public for public in names if public not in leading]
    text = f"# {name}\n\n::: {name}\n    options:\n      show_root_heading: false\n      members: false\n"
    below = [public for public in sorted(cards) if public.startswith(f"{name}.") and public.count(".") > 2]
    text += "".join(f"\n::: {found}\n" for found in [*(path(name, public) for public in leading), *below])
    return text + folded("What these take and return", [path(name, public) for public in others])


def path(package: str, public: str) -> str:
    """Where the reference finds a public name; one that is also a module's is named where it is defined."""
    if importlib.util.find_spec(f"{package}.{public}"):
        return f"{getattr(importlib.import_module(package), public).__module__}.{public}"
    return f"{package}.{public}"


def folded(title: str, names: list[str]) -> str:
    """Part of an API page that opens on a click."""
    return f'\n??? note "{title}"\n' + "".join(f"\n    ::: {name}\n" for name in names) if names else ""


def pages() -> dict[Path, str]:
    """Every page that is written, as it should be."""
    readme, index = ROOT / "README.md", ROOT / "docs/techniques/index.md"
    found = {
        readme: between(lists(readme.read_text(), "docs/techniques/", DETAILS), "measured", measured.summary()),
        index: lists(index.read_text(), "", "## Announced\n\n{}"),
        ROOT / "docs/gallery.md": measured.gallery(),
        ROOT / "mkdocs.yml": navigation((ROOT / "mkdocs.yml").read_text()),
    }
    for room in ROOMS:
        found[ROOT / f"docs/api/{room}.md"] = reference(room)
    for technique in TECHNIQUES:
        if technique.available:
            page = ROOT / f"docs/techniques/{technique.slug}.md"
            found[page] = f'--8<-- "src/weightsmith/cards/{technique.slug}.md"\n'
    for slug, results in measured.receipts().items():
        page = ROOT / f"src/weightsmith/cards/{slug}.md"
        found[page] = between(page.read_text(), "measured", measured.card(results))
    return found


def main() -> None:
    """Write every page that has drifted, or report it."""
    stale = {page: text for page, text in pages().items() if not page.is_file() or page.read_text() != text}
    if "--check" in sys.argv:
        names = ", ".join(str(page.relative_to(ROOT)) for page in stale)
        sys.exit(f"run make tables: {names}" if stale else 0)
    for page, text in stale.items():
        page.write_text(text)


if __name__ == "__main__":
    main()
