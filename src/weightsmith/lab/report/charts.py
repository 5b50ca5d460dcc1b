"""Pictures as Vega-Lite specifications.

Colours are the page's CSS variables and ``currentColor``: one specification serves light, dark and print, and follows a
switch between them without being drawn again.
"""

import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import altair as alt

from weightsmith.lab.claim import Chart, Metric
from weightsmith.lab.report import words
from weightsmith.lab.report.model import Report, listed
from weightsmith.lab.report.series import (
    MOST_DOTS,
    Row,
    Seeds,
    cloud,
    collect,
    curve,
    frame,
    places,
    room,
    until_first_end,
)
from weightsmith.lab.stats import Judgement

COLOURS = 8
"""Arms beyond these share a colour with an earlier one and are told apart by dashes."""

_DASHES = ([1, 0], [6, 3], [2, 2])
_FEW_POINTS = 30
_SOFT = {"labelColor": "currentColor", "titleColor": "currentColor", "domainColor": "currentColor"} | {
    "gridColor": "currentColor", "tickColor": "currentColor", "labelOpacity": 0.75, "titleOpacity": 0.75,
    "domainOpacity": 0.25, "tickOpacity": 0.25, "gridOpacity": 0.1, "titleFontWeight": "normal",
    "labelFontSize": 11, "titleFontSize": 12, "titlePadding": 8, "labelPadding": 6, "tickSize": 4,
    "labelFlush": False,
}  # fmt: skip
_CONFIG = {
    "background": None,
    "font": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif",
    "view": {"stroke": None},
    "axis": _SOFT,
}


@dataclass(frozen=True, slots=True)
class Figure:
    """A picture for the page.

    Attributes:
        title: Heading above it.
        spec: The Vega-Lite specification, or ``None`` when there is nothing to draw.
        note: What a reader has to know to read it right.
    """

    title: str
    spec: dict[str, Any] | None
    note: str = ""


def dash(index: int) -> list[int]:
    """The dash pattern of the arm at this position."""
    return _DASHES[index // COLOURS % len(_DASHES)]


def claim_figure(report: Report, judgement: Judgement) -> Figure:
    """The difference with its interval, against zero and against what the claim needs."""
    found = words.evidence(report, judgement)
    if not math.isfinite(judgement.low):
        return Figure(found["Compared"], None)
    metric = report.metric(judgement.claim)
    colour = f"var(--{judgement.verdict})"
    row = {
        "x": judgement.difference,
        "low": judgement.low,
        "high": judgement.high,
        "needed": judgement.threshold,
        "zero": 0,
    }
    base = alt.Chart(alt.Data(values=[row]))
    tip = alt.TooltipValue(f"{found['Difference']} ({found['95 % interval']})")
    x = alt.X("x:Q", title="Difference (right: in the claim's favour)", axis=_axis(metric))
    layers = [
        base.mark_rule(color="currentColor", opacity=0.5).encode(x="zero:Q"),
        base.mark_rule(color=colour, strokeWidth=3, strokeCap="round").encode(
            x=alt.X("low:Q"), x2="high:Q", y=alt.value(22), tooltip=tip
        ),
        base.mark_point(color=colour, filled=True, size=110, opacity=1).encode(x=x, y=alt.value(22), tooltip=tip),
    ]
    if judgement.threshold:
        layers.insert(1, base.mark_rule(color="currentColor", strokeDash=[3, 3], opacity=0.7).encode(x="needed:Q"))
    note = "Solid line: no difference. Dashed line: what the claim needs." if judgement.threshold else ""
    return Figure(found["Compared"], _spec(alt.layer(*layers), 44), note)


def seeds_figure(report: Report, metric: Metric) -> Figure:
    """One dot per seed, arms down the side, a tick at the mean."""
    dots: list[Row] = []
    lost: dict[str, list[int]] = {}
    for job in report.jobs:
        value = job.metrics.get(metric.name, math.nan)
        if math.isfinite(value):
            dots.append({"arm": job.arm, "x": value, "seed": job.seed, "text": words.number(value, metric.format)})
        else:
            lost.setdefault(job.arm, []).append(job.seed)
    note = f"No finite value: {listed(lost)}." if lost else ""
    title = metric.label + words.ARROWS[metric.better]
    if not dots:
        return Figure(title, None, note)
    means: list[Row] = [
        {"arm": arm.name, "x": summary.mean, "text": words.number(summary.mean, metric.format)}
        for arm in report.arms
        if (summary := report.table[arm.name][metric.name]).n
    ]
    names = [arm.name for arm in report.arms]
    x = alt.X("x:Q", title=None, scale=alt.Scale(zero=False, nice=True, padding=12), axis=_axis(metric))
    y = alt.Y(
        "arm:N",
        title=None,
        sort=names,
        scale=alt.Scale(domain=names),
        axis=alt.Axis(ticks=False, domain=False, grid=True, labelLimit=180, labelOpacity=1),
    )
    seed = alt.YOffset("seed:N", scale=alt.Scale(paddingOuter=1))
    opacity = _focus(0.85, 0.15)
    marks = alt.Chart(alt.Data(values=dots)).mark_circle(size=48).encode(x, y, yOffset=seed, color=_colour(report))
    marks = marks.encode(opacity=opacity, tooltip=_tips(arm="arm:N", seed="seed:N", value="text:N"))
    ticks = alt.Chart(alt.Data(values=means)).mark_tick(thickness=2, height=20, color="currentColor").encode(x, y)
    ticks = ticks.encode(opacity=opacity, tooltip=_tips(arm="arm:N", mean="text:N"))
    return Figure(title, _spec(ticks + marks, 26 * len(names) + 8), note)


def chart_figure(report: Report, chart: Chart) -> Figure:
    """A declared picture: curves with a band, or one dot per recorded row."""
    names = [arm.name for arm in report.arms if not chart.arms or arm.name in chart.arms]
    found = {name: collect(report, chart, name) for name in names}
    series = {name: seeds for name, seeds in found.items() if seeds}
    if not series:
        return Figure(chart.title, None, f"No job recorded numbers for {chart.x} and {chart.y}.")
    notes = []
    if absent := listed({name: sorted(report.finished(name) - seeds.keys()) for name, seeds in found.items()}):
        notes.append(f"Nothing to draw for {absent}.")
    rows, more = _curves(series, chart) if chart.kind == "line" else _clouds(series)
    notes += more
    limits = None if chart.log_y else frame(rows)
    if limits:
        notes.append("The vertical axis is cut: values far beyond the other arms' leave the picture.")

    base = alt.Chart(alt.Data(values=[{key: _short(value) for key, value in row.items()} for row in rows])).encode(
        x=alt.X(
            "x:Q",
            title=chart.x_label or chart.x,
            scale=alt.Scale(**_scale(chart.log_x), nice=False, padding=10 if chart.kind == "scatter" else 0),
            axis=alt.Axis(grid=False, tickCount=3 if chart.log_x else 6),
        ),
        y=alt.Y(
            "y:Q",
            title=chart.y_label or chart.y,
            scale=alt.Scale(**_scale(chart.log_y), nice=not chart.log_y, **({"domain": limits} if limits else {})),
            axis=alt.Axis(tickCount=3 if chart.log_y else 5, domain=False, ticks=False),
        ),
        color=_colour(report),
    )
    clip = limits is not None
    layers = _line_layers(base, report, rows, clip) if chart.kind == "line" else [_dots(base, clip)]
    return Figure(chart.title, _spec(alt.layer(*layers), 280), " ".join(notes))


def _curves(series: dict[str, Seeds], chart: Chart) -> tuple[list[Row], list[str]]:
    notes = []
    if any(len(places(seeds)) > room(seeds) for seeds in series.values()):
        notes.append("Neighbouring points are averaged.")
    ends = {name: [points[-1, 0] for points in seeds.values()] for name, seeds in series.items()}
    if ended := [name for name, values in ends.items() if min(values) < 0.9 * max(values)]:
        notes.append(f"Curves that end early, with their shortest seed: {', '.join(ended)}.")
    rows: list[Row] = [
        {"arm": name, **row}
        for name, seeds in series.items()
        for row in curve(until_first_end(seeds), log_x=chart.log_x)
    ]
    if chart.log_y:  # a logarithm has no room at and below zero
        lowest = min(row["y"] for row in rows)
        rows = [{**row, "low": max(row["low"], lowest)} for row in rows]
    return rows, notes


def _clouds(series: dict[str, Seeds]) -> tuple[list[Row], list[str]]:
    rows: list[Row] = [{"arm": name, **row} for name, seeds in series.items() for row in cloud(seeds)]
    crowded = any(sum(map(len, seeds.values())) > MOST_DOTS for seeds in series.values())
    return rows, [f"{MOST_DOTS} evenly chosen rows per arm are drawn."] if crowded else []


def _line_layers(base: alt.Chart, report: Report, rows: list[Row], clip: bool) -> list[alt.Chart]:
    names = [arm.name for arm in report.arms]
    dashes = alt.Scale(domain=names, range=[dash(index) for index in range(len(names))])
    few = max(Counter(row["arm"] for row in rows).values()) <= _FEW_POINTS
    return [
        base.mark_area(clip=clip).encode(y=alt.Y("low:Q"), y2="high:Q", opacity=_focus(0.14, 0.02)),
        base.mark_line(clip=clip, strokeWidth=2).encode(
            strokeDash=alt.StrokeDash("arm:N", scale=dashes, legend=None), opacity=_focus(1, 0.12)
        ),
        # invisible where there are many: then they only carry the tooltip
        base.mark_circle(clip=clip, size=40).encode(
            opacity=_focus(1, 0.12) if few else alt.value(0),
            tooltip=_tips(arm="arm:N", x="x:Q", mean="y:Q", sd="sd:Q", seeds="n:Q"),
        ),
    ]


def _dots(base: alt.Chart, clip: bool) -> alt.Chart:
    tips = _tips(arm="arm:N", seed="seed:N", x="x:Q", y="y:Q")
    return base.mark_circle(clip=clip, size=36).encode(opacity=_focus(0.7, 0.06), tooltip=tips)


def _focus(shown: float, faded: float) -> Any:
    """Opacity that follows the page's ``focus``: the arm singled out, or none."""
    return alt.condition("focus == '' || datum.arm == focus", alt.value(shown), alt.value(faded))


def _scale(log: bool) -> dict[str, Any]:
    return {"type": "log" if log else "linear", "zero": False}


def _colour(report: Report) -> alt.Color:
    names = [arm.name for arm in report.arms]
    colours = [f"var(--arm-{index % COLOURS})" for index in range(len(names))]
    return alt.Color("arm:N", scale=alt.Scale(domain=names, range=colours), legend=None)


def _axis(metric: Metric) -> alt.Axis:
    spec = "~%" if metric.format.endswith("%") else "~g"
    return alt.Axis(tickCount=5, domain=False, labelExpr=f"format(datum.value, '{spec}')")


def _tips(**fields: str) -> list[alt.Tooltip]:
    return [alt.Tooltip(field, title=title) for title, field in fields.items()]


def _short(value: Any) -> Any:
    return float(f"{value:.6g}") if isinstance(value, float) else value


def _spec(chart: alt.LayerChart, height: int) -> dict[str, Any]:
    focus = alt.param(name="focus", value="")
    whole = chart.properties(
        width="container", height=height, autosize=alt.AutoSizeParams(type="fit-x", contains="padding")
    )
    return whole.add_params(focus).to_dict() | {"config": _CONFIG}
