"""The report as one HTML page that needs nothing else: no file beside it, no network."""

import functools
from typing import Any

import altair as alt
import jinja2
import vl_convert
from altair.utils.schemapi import debug_mode

from weightsmith.lab.report import charts, words
from weightsmith.lab.report.model import Report


def to_html(report: Report) -> str:
    """Lay a report out as a self-contained page, for light and dark, phone, desktop and paper.

    Args:
        report: From `weightsmith.lab.report.load`.

    Returns:
        The whole page, about a megabyte, most of it the plotting script.
    """
    with debug_mode(False):  # specifications are built from parts that the tests validate
        return _render(report)


def _render(report: Report) -> str:
    return fill(
        "report.html",
        report=report,
        run=report.run,
        colors=charts.COLORS,
        dash=charts.dash,
        best={metric.name: report.best(metric) for metric in report.shown},
        claims=[(judgement, charts.claim_figure(report, judgement)) for judgement in report.judgements],
        panels=[(metric, charts.seeds_figure(report, metric)) for metric in report.shown],
        pictures=[figure for chart in report.charts if (figure := charts.chart_figure(report, chart)).spec],
        tuning=charts.tuning_figures(report),
        static=charts.static_svg,
        script=_script(),
    )


def fill(template: str, **values: Any) -> str:
    """Lay values out by one of the templates; all of them can call what puts numbers into words."""
    environment = jinja2.Environment(
        loader=jinja2.PackageLoader("weightsmith.lab"), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template(template).render(words=words, **values)


@functools.cache
def _script() -> str:
    # the plotting script must be of the version that altair writes specifications for
    version = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    return vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;", version)
