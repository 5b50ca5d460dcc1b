"""Every committed result is shown, with its command, in the gallery and in its method card."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("path", sorted((ROOT / "docs/measured").glob("*/*.json")), ids=lambda path: path.parent.name)
def test_committed_results_are_shown(path: Path) -> None:
    command = f"$ {json.loads(path.read_text())['command']}\n"
    assert command in (ROOT / "docs/gallery.md").read_text()
    assert command in (ROOT / f"src/weightsmith/cards/{path.parent.name}.md").read_text()
