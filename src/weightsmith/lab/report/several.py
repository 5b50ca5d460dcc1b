"""One page over several runs: what was asked, on what, and what came out."""

import os
from collections.abc import Sequence
from pathlib import Path

from weightsmith.core.files import write_atomically
from weightsmith.lab.report.html import fill
from weightsmith.lab.report.model import Report


def several_to_html(reports: Sequence[tuple[Report, str]]) -> str:
    """Lay several reports out as one self-contained page.

    Args:
        reports: Each with the address of its own page, relative to this one.
    """
    return fill("several.html", reports=reports)


def write_several(folders: Sequence[Path], page: Path) -> Path:
    """Write a page over several run folders.

    Args:
        folders: Run folders whose own reports have been written.
        page: Where it goes.

    Returns:
        ``page``.
    """
    from weightsmith.lab.report.disk import load

    pairs = [(load(folder), os.path.relpath(folder / "report.html", page.parent)) for folder in folders]
    write_atomically(page, several_to_html(pairs))
    return page
