"""The report of a run: from its folder to the terminal, to Markdown, and to one self-contained HTML page."""

from weightsmith.lab.report.disk import load, write
from weightsmith.lab.report.html import to_html
from weightsmith.lab.report.markdown import to_markdown
from weightsmith.lab.report.model import Report
from weightsmith.lab.report.terminal import to_terminal

__all__ = ["Report", "load", "to_html", "to_markdown", "to_terminal", "write"]
