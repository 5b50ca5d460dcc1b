"""What the documentation says is true: its snippets run, its tables match the cards, its cards exist."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from weightsmith.techniques import TECHNIQUES

ROOT = Path(__file__).parents[2]
PAGES = [
    ROOT / "README.md",
    *sorted((ROOT / "docs").glob("*.md")),
    *sorted((ROOT / "src/weightsmith/cards").glob("*.md")),
]
SNIPPET = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize(
    "page", [page for page in PAGES if SNIPPET.search(page.read_text())], ids=lambda page: page.name
)
def test_every_snippet_of_a_page_runs_in_order(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "snippet"}
    for snippet in SNIPPET.findall(page.read_text()):
        exec(compile(snippet, page.name, "exec"), namespace)


def test_tables_match_the_cards():
    subprocess.run([sys.executable, ROOT / "docs/tables.py", "--check"], check=True)


@pytest.mark.parametrize("card", [card for card in TECHNIQUES if card.available], ids=lambda card: card.slug)
def test_an_available_technique_has_a_method_card_and_a_page(card):
    text = (ROOT / f"src/weightsmith/cards/{card.slug}.md").read_text()
    for heading in ("## When to use it", "## How", "## Measured", "## Source"):
        assert heading in text
    assert card.arxiv in text
    page = f"techniques/{card.slug}.md"
    assert (ROOT / "docs" / page).is_file()
    assert page in (ROOT / "mkdocs.yml").read_text()


def test_there_are_fifteen_techniques_with_names_of_their_own():
    assert len({card.slug for card in TECHNIQUES}) == len(TECHNIQUES) == 15
