"""Pictures as Vega-Lite specifications.

Colors are the page's CSS variables and ``currentColor``: one specification serves light, dark and print, and follows a
switch between them without being drawn again.
"""

import json
import math
from collections import Counter
from dataclasses import dataclass
from typing import Any

import altair as alt
import numpy as np

from weightsmith.lab.experiment import Chart, Metric
from weightsmith.lab.report import words
from weightsmith.lab.report.model import Report, listed
from weightsmith.lab.report.series import (
    MOST_DOTS,
    Row,
    Seeds,
    at_edge,
    cloud,
    collect,
    curve,
    frame,
    late,
    places,
    room,
    trials_of,
    until_first_end,
)
from weightsmith.lab.stats import LEVEL, Judgement
from weightsmith.lab.stats.intervals import over_seeds

LIGHT = {
    "arm-0": "#0072b2", "arm-1": "#d55e00", "arm-2": "#009e73", "arm-3": "#c7689b",
    "arm-4": "#4fa8dc", "arm-5": "#d99400", "arm-6": "#7b7f86", "arm-7": "#882255",
    "supported": "#0b7a5b", "refuted": "#b3401a", "no-relevant-effect": "#3b5b92", "undecided": "#6a6f7a",
}  # fmt: skip
"""The page's colors in its light form; the page has these and their dark counterparts."""

COLORS = 8
"""Arms beyond these share a color with an earlier one."""

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
        text: What it shows, in words, for those who do not see it.
    """

    title: str
    spec: dict[str, Any] | None
    note: str = ""
    text: str = ""


def dash(index: int) -> list[int]:
    """The dash pattern of the arm at this position; neighbors differ, so that curves on each other are told apart."""
    return _DASHES[index % len(_DASHES)]


def claim_figure(report: Report, judgement: Judgement) -> Figure:
    """The difference with its interval, against zero and against what the claim needs."""
    found = words.evidence(report, judgement)
    if not math.isfinite(judgement.low):
        return Figure(found["Compared"], None)
    metric = report.metric(judgement.claim)
    color = f"var(--{judgement.verdict.replace(' ', '-')})"
    row = {
        "x": judgement.difference,
        "low": judgement.low,
        "high": judgement.high,
        "needed": judgement.threshold,
        "zero": 0,
    }
    base = alt.Chart(alt.Data(values=[row]))
    interval = next(value for name, value in found.items() if name.endswith("interval"))
    tip = alt.TooltipValue(f"{found['Difference']} ({interval})")
    x = alt.X("x:Q", title="Difference (right: in the claim's favor)", axis=_axis(metric))
    layers = [
        base.mark_rule(color="currentColor", opacity=0.5).encode(x="zero:Q"),
        base.mark_rule(color=color, strokeWidth=3, strokeCap="round").encode(
            x=alt.X("low:Q"), x2="high:Q", y=alt.value(22), tooltip=tip
        ),
        base.mark_point(color=color, filled=True, size=110, opacity=1).encode(x=x, y=alt.value(22), tooltip=tip),
    ]
    if judgement.threshold:
        layers.insert(1, base.mark_rule(color="currentColor", strokeDash=[3, 3], opacity=0.7).encode(x="needed:Q"))
    note = "Solid line: no difference." if judgement.threshold or judgement.worth else ""
    note += " Dashed line: what the claim needs." if judgement.threshold else ""
    if judgement.worth is not None:
        row |= {"least": judgement.threshold - judgement.worth, "most": judgement.threshold + judgement.worth}
        band = base.mark_rect(color="currentColor", opacity=0.08).encode(x=alt.X("least:Q"), x2="most:Q")
        layers.insert(0, band)
        note += " Shaded: smaller than the smallest relevant effect."
    text = f"{found['Compared']}: {found['Difference']}, interval {interval}"
    return Figure(found["Compared"], _spec(alt.layer(*layers), 44), note.strip(), text)


def seeds_figure(report: Report, metric: Metric) -> Figure:
    """One dot per seed, arms down the side, a tick at the mean."""
    dots: list[Row] = []
    lost: dict[str, list[int]] = {}
    for job in report.jobs:
        value = job.metrics.get(metric.name)
        if value is None:
            continue
        if math.isfinite(value):
            dots.append(
                {"arm": report.label(job.arm), "x": value, "seed": job.seed, "text": words.number(value, metric.format)}
            )
        else:
            lost.setdefault(report.label(job.arm), []).append(job.seed)
    note = f"No finite value: {listed(lost)}." if lost else ""
    title = metric.label + words.ARROWS[metric.better]
    if not dots:
        return Figure(title, None, note)
    means: list[Row] = [
        {"arm": arm.label, "x": summary.mean, "text": words.number(summary.mean, metric.format)}
        for arm in report.arms
        if (summary := report.table[arm.name][metric.name]).n
    ]
    names = list(dict.fromkeys(row["arm"] for row in means))
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
    marks = alt.Chart(alt.Data(values=dots)).mark_circle(size=48).encode(x, y, yOffset=seed, color=_color(report))
    marks = marks.encode(opacity=opacity, tooltip=_tips(arm="arm:N", seed="seed:N", value="text:N"))
    ticks = alt.Chart(alt.Data(values=means)).mark_tick(thickness=2, height=20, color="currentColor").encode(x, y)
    ticks = ticks.encode(opacity=opacity, tooltip=_tips(arm="arm:N", mean="text:N"))
    text = "; ".join(f"{row['arm']} {row['text']}" for row in means)
    return Figure(title, _spec(ticks + marks, 26 * len(names) + 8), note, f"Means: {text}")


def chart_figure(report: Report, chart: Chart) -> Figure:
    """A declared picture: curves with a band, or one dot per recorded row."""
    names = [arm.name for arm in report.arms if not chart.arms or arm.name in chart.arms]
    found = {name: collect(report, chart, name) for name in names}
    series = {report.label(name): seeds for name, seeds in found.items() if seeds}
    if not series:
        return Figure(chart.title, None, f"No job recorded numbers for {chart.x} and {chart.y}.")
    notes = []
    if absent := listed({report.label(n): sorted(report.finished(n) - seeds.keys()) for n, seeds in found.items()}):
        notes.append(f"Nothing to draw for {absent}.")
    rows, more = _curves(series, chart) if chart.kind == "line" else _clouds(series)
    notes += more
    limits = None if chart.log_y else frame(rows)
    if limits:
        notes.append("The vertical axis is cut: values far beyond the other arms' leave the picture.")
    elif chart.kind == "line" and not chart.log_y and (limits := late(rows)):
        notes.append("The vertical axis shows what moves after the first fifth.")

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
        color=_color(report),
    )
    clip = limits is not None
    layers = _line_layers(base, report, rows, clip) if chart.kind == "line" else [_dots(base, clip)]
    ends = {row["arm"]: row["y"] for row in rows}
    text = "; ".join(f"{arm} {value:.4g}" for arm, value in ends.items())
    what = "last values" if chart.kind == "line" else "last dots"
    return Figure(chart.title, _spec(alt.layer(*layers), 280), " ".join(notes), f"{chart.y}, {what}: {text}")


def tuning_figures(report: Report) -> list[Figure]:
    """Per claim whose metric sweeps have recorded: the difference against the number of trials of each arm."""
    return [figure for judgement in report.judgements if (figure := _tuning(report, judgement)) is not None]


def _tuning(report: Report, judgement: Judgement) -> Figure | None:
    claim, metric = judgement.claim, report.metric(judgement.claim)
    trials = trials_of(report, claim.winner, metric.name), trials_of(report, claim.loser, metric.name)
    sign = -1 if metric.better == "lower" else 1
    counts = sorted(set(trials[0]) & set(trials[1]))
    rows: list[Row] = []
    for count in counts:
        first, second = trials[0][count], trials[1][count]
        differences = np.array([sign * (first[seed] - second[seed]) for seed in first.keys() & second.keys()])
        if len(differences) >= 2:
            half = float(
                over_seeds(differences).half_width(judgement.level if math.isfinite(judgement.level) else LEVEL)
            )
            mean = float(differences.mean())
            rows.append({"x": count, "y": mean, "low": mean - half, "high": mean + half, "zero": 0.0})
    if len(rows) < 2:
        return None
    base = alt.Chart(alt.Data(values=rows))
    x = alt.X("x:Q", title="trials of each arm", axis=alt.Axis(tickMinStep=1, grid=False))
    layers = [
        base.mark_rule(opacity=0.5, color="currentColor").encode(
            y=alt.Y("zero:Q", title=f"difference, {metric.label}")
        ),
        base.mark_rule(strokeWidth=2, color="var(--arm-0)").encode(x, y=alt.Y("low:Q"), y2="high:Q"),
        base.mark_point(filled=True, size=70, color="var(--arm-0)", opacity=1).encode(x, y="y:Q"),
    ]
    text = "; ".join(f"{row['x']} trials: {row['y']:+.4g}" for row in rows)
    edge = sorted({report.label(a) for a in (claim.winner, claim.loser) if at_edge(report, a)})
    note = f"The best value lies at the edge of what was tried for {', '.join(edge)}." if edge else ""
    return Figure(
        f"{claim.text}: the difference against the number of trials", _spec(alt.layer(*layers), 180), note, text
    )


def static_svg(figure: Figure) -> str:
    """The picture as SVG, for pages without JavaScript; colors stay the page's."""
    import vl_convert

    version = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    return vl_convert.vegalite_to_svg({**(figure.spec or {}), "width": 420}, vl_version=version)


def export(figure: Figure, kind: str) -> bytes:
    """The picture as a file of its own, in the colors of the light page.

    Args:
        figure: With a specification.
        kind: ``"svg"`` or ``"png"``.
    """
    import vl_convert

    version = ".".join(alt.SCHEMA_VERSION.lstrip("v").split(".")[:2])
    text = json.dumps({**(figure.spec or {}), "width": 420, "background": "white", "title": figure.title})
    for name, color in LIGHT.items():
        text = text.replace(f"var(--{name})", color)
    text = text.replace("currentColor", "#1c1f24")
    if kind == "svg":
        return vl_convert.vegalite_to_svg(text, vl_version=version).encode()
    return vl_convert.vegalite_to_png(text, vl_version=version, scale=2.0)


def _curves(series: dict[str, Seeds], chart: Chart) -> tuple[list[Row], list[str]]:
    notes = []
    if any(len(places(seeds)) > room(seeds) for seeds in series.values()):
        notes.append("Neighboring points are averaged.")
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
    names = [arm.label for arm in report.arms]
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


def _color(report: Report) -> alt.Color:
    names = [arm.label for arm in report.arms]
    colors = [f"var(--arm-{index % COLORS})" for index in range(len(names))]
    return alt.Color("arm:N", scale=alt.Scale(domain=names, range=colors), legend=None)


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
    spec: dict[str, Any] = whole.add_params(focus).to_dict(validate=False) | {"config": _CONFIG}
    return spec
