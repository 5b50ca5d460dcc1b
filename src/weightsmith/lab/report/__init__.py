"""The report of a run: from its folder to the terminal, to Markdown, and to one self-contained HTML page."""

from weightsmith.lab.report.disk import load, write, write_report
from weightsmith.lab.report.html import to_html
from weightsmith.lab.report.markdown import to_markdown
from weightsmith.lab.report.model import Report
from weightsmith.lab.report.several import write_several
from weightsmith.lab.report.show import export_figures, show
from weightsmith.lab.report.terminal import to_terminal

__all__ = [
    "Report",
    "export_figures",
    "load",
    "show",
    "to_html",
    "to_markdown",
    "to_terminal",
    "write",
    "write_report",
    "write_several",
]
