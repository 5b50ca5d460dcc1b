"""A report where a notebook or a terminal shows it, and its pictures as files."""

import html
import re
from pathlib import Path

from rich.console import Console

from weightsmith.core.errors import UsageError
from weightsmith.core.files import write_atomically
from weightsmith.lab.report import charts
from weightsmith.lab.report.disk import load
from weightsmith.lab.report.html import to_html
from weightsmith.lab.report.terminal import to_terminal


def show(run_folder: Path | str, height: int = 900) -> None:
    """Show a report in a notebook, or print it where there is none.

    Args:
        run_folder: A run folder.
        height: Of the frame in a notebook, in pixels.
    """
    report = load(Path(run_folder))
    try:
        from IPython import get_ipython
        from IPython.display import HTML, display
    except ImportError:
        get_ipython = lambda: None  # noqa: E731
    if get_ipython() is None:
        Console().print(to_terminal(report))
        return
    page = html.escape(to_html(report), quote=True)
    display(HTML(f'<iframe srcdoc="{page}" style="width:100%;height:{height}px;border:0"></iframe>'))


def export_figures(run_folder: Path, folder: Path, kind: str) -> list[Path]:
    """Write every picture of a report as a file.

    Args:
        run_folder: A run folder.
        folder: Where the files go.
        kind: ``"svg"`` or ``"png"``.

    Returns:
        The files.

    Raises:
        UsageError: ``kind`` is another one.
    """
    if kind not in ("svg", "png"):
        raise UsageError(f"figures must be svg or png, got {kind!r}")
    report = load(run_folder)
    figures = [charts.claim_figure(report, judgement) for judgement in report.judgements]
    figures += [charts.seeds_figure(report, metric) for metric in report.shown]
    figures += [charts.chart_figure(report, chart) for chart in report.charts] + charts.tuning_figures(report)
    written = []
    for number, figure in enumerate(figure for figure in figures if figure.spec):
        name = re.sub(r"[^a-z0-9]+", "-", figure.title.lower()).strip("-")[:60]
        path = folder / f"{number:02d}-{name}.{kind}"
        write_atomically(path, charts.export(figure, kind))
        written.append(path)
    return written
