"""A comparison of two checkpoints in the terminal and as a page."""

import math
from typing import Any

import altair as alt
from rich.console import Console
from rich.table import Table

from weightsmith.core.display import markup
from weightsmith.diagnose import LazinessReport
from weightsmith.lab.report.charts import Figure, static_svg
from weightsmith.lab.report.html import fill

_READING = (
    "Alignments near 1: the model has stayed as it was and learnt lazily, in its readout. Towards 0: it has learnt "
    "features. A large change of weights is rich too, but depends on their scale."
)
_MOST_BARS = 60


def terminal(found: LazinessReport, console: Console) -> None:
    """Print it."""
    for line in _lines(found):
        console.print(markup(line), soft_wrap=True, highlight=False)
    for _, columns, rows in _tables(found):
        table = Table(box=None, pad_edge=False)
        for index, column in enumerate(columns):
            table.add_column(column, justify="right" if index else "left")
        for row in rows:
            table.add_row(*map(markup, row))
        console.print()
        console.print(table)


def page(found: LazinessReport, title: str) -> str:
    """Lay it out as one page that needs nothing else."""
    return fill(
        "measures.html", title=title, lines=[*_lines(found), _READING], figures=_figures(found), tables=_tables(found),
        static=static_svg,
    )  # fmt: skip


def _lines(found: LazinessReport) -> list[str]:
    lines = [f"Weights changed by {found.weight_change:.4g}, {found.relative_weight_change:.2%} of their norm."]
    if found.plan is not None:
        error = f" ± {found.kernel_alignment_error:.2g} (standard error)" if found.kernel_alignment_error else ""
        lines += [f"Kernel alignment {found.kernel_alignment:.4f}{error}.", f"Kernel: {found.plan}."]
    if found.samples:
        lines.append(f"Activity of {found.samples} samples.")
    if found.not_finite:
        lines.append(f"Not a number, after divergence or where a layer is silent: {', '.join(found.not_finite)}.")
    return lines


def _tables(found: LazinessReport) -> list[tuple[str, list[str], list[list[str]]]]:
    tables = []
    if found.representation_alignment:
        layers = list(dict.fromkeys([*found.representation_alignment, *found.per_layer]))
        columns = ["layer", "representation", "centered (CKA)", "equal signs", "kernel"]
        parts = (found.representation_alignment, found.centered_alignment, found.sign_similarity, found.per_layer)
        rows = [[name or "(model)", *(_number(part.get(name), ".4f") for part in parts)] for name in layers]
        tables.append(("Alignment by layer", columns, rows))
    columns = ["parameter", "change", "relative", f"effective rank ({found.rank_kind}), before", "after"]
    rows = []
    for name, (change, relative) in found.weight_changes.items():
        first, second = found.effective_rank.get(name, (None, None))
        share = "from 0" if math.isnan(relative) and math.isfinite(change) else _number(relative, ".2%")
        rows.append([name, _number(change, ".4g"), share, _number(first, ".4g"), _number(second, ".4g")])
    tables.append(("Weights", columns, rows))
    return tables


def _figures(found: LazinessReport) -> list[Figure]:
    alignments = [
        {"name": name or "(model)", "what": what, "value": value}
        for what, part in (("representation", found.representation_alignment), ("kernel", found.per_layer))
        for name, value in part.items()
    ]
    changes = [
        {"name": name, "what": "relative change", "value": relative}
        for name, (_, relative) in found.weight_changes.items()
    ]
    ranks = [
        {"name": name, "what": what, "value": value}
        for name, pair in found.effective_rank.items()
        for what, value in zip(("before", "after"), pair, strict=True)
    ]
    pictures = (
        ("Alignment by layer", alignments, "alignment (1: lazy, 0: rich)"),
        ("Relative change of weights", changes, "|W1 - W0| / |W0|"),
        (f"Effective rank ({found.rank_kind})", ranks, "effective rank"),
    )
    return [figure for title, rows, label in pictures if (figure := _dots(title, rows, label)) is not None]


def _dots(title: str, rows: list[dict[str, Any]], label: str) -> Figure | None:
    drawn = [row for row in rows if math.isfinite(row["value"])]
    names = list(dict.fromkeys(row["name"] for row in drawn))
    if not names:
        return None
    shown = set(names[:_MOST_BARS])
    kinds = list(dict.fromkeys(row["what"] for row in drawn))
    colors = [f"var(--arm-{index})" for index in range(len(kinds))]
    chart = (
        alt.Chart(alt.Data(values=[row for row in drawn if row["name"] in shown]))
        .mark_point(filled=True, size=60, opacity=0.9)
        .encode(
            x=alt.X("value:Q", title=label, scale=alt.Scale(zero=True)),
            y=alt.Y("name:N", title=None, sort=names, axis=alt.Axis(grid=True, labelLimit=260)),
            color=alt.Color("what:N", title=None, scale=alt.Scale(domain=kinds, range=colors)),
        )
        .properties(height=alt.Step(18))
        .configure(background="transparent")
        .configure_view(stroke=None)
        .configure_axis(
            labelColor="currentColor",
            titleColor="currentColor",
            gridOpacity=0.15,
            domainOpacity=0.3,
            titleFontWeight="normal",
        )
        .configure_legend(labelColor="currentColor", orient="top")
    )
    note = f"The first {_MOST_BARS} of {len(names)}; all are in the table." if len(names) > _MOST_BARS else ""
    return Figure(title, chart.to_dict(), note)


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
