"""Charts of what happened from step to step, and how they are written."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from weightsmith.core.errors import UsageError
from weightsmith.core.files import file_atomically

_FORMATS = (".html", ".svg", ".png", ".json")
_PANELS = {
    "mean norm of rows, before aligning": {"mean_norm_old": "old classes", "mean_norm_new": "new classes"},
    "factor of new rows": {"gamma": "gamma"},
    "predictions of the newest classes %": {
        "newest_share_before": "before aligning", "newest_share": "after aligning", "true_share": "true share",
    },
    "accuracy %": {"accuracy_before": "before aligning", "accuracy": "after aligning"},
}  # fmt: skip


def check_chart_path(path: Path | str) -> Path:
    """Refuse a file ending that no chart has.

    Raises:
        UsageError: It is none of ``.html``, ``.svg``, ``.png`` and ``.json``.
    """
    target = Path(path)
    if target.suffix not in _FORMATS:
        raise UsageError(f"path must end in {', '.join(_FORMATS)}, got {str(path)!r}")
    return target


def save_chart(chart: Any, target: Path) -> None:
    """Write an Altair chart; missing parent folders are made."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with file_atomically(target) as fresh:
        # the temporary name has the ending too; a page has to work without a network
        chart.save(str(fresh), format=target.suffix[1:], **({"inline": True} if target.suffix == ".html" else {}))


def aligning_chart(history: Sequence[Mapping[str, float]]) -> Any:
    """What aligning did at each step: a panel per kind of number that the history has."""
    import altair as alt  # takes a while to import, and aligning needs it not

    panels = []
    for title, names in _PANELS.items():
        points = [
            {"step": int(row["step"]) + 1, "what": text, "value": row[key]}
            for row in history
            for key, text in names.items()
            if key in row
        ]
        if points:
            color = alt.Color("what:N", sort=list(names.values()), title=None)
            lines = alt.Chart(alt.InlineData(points)).mark_line(point=True)
            lines = lines.encode(
                x=alt.X("step:O", title="step", axis=alt.Axis(labelAngle=0)),
                y=alt.Y("value:Q", title=title),
                color=color,
            )
            panels.append(lines.properties(width=240, height=180))
    chart = alt.hconcat(*panels).resolve_scale(color="independent")
    return chart.properties(title="What aligning did at each step")
