"""From the rows that jobs record to as many points as a picture can show."""

import math
from typing import Any

import numpy as np

from weightsmith.lab.experiment import Chart
from weightsmith.lab.report.model import Report

MOST_POINTS = 200
MOST_DOTS = 500

Row = dict[str, Any]
Seeds = dict[int, np.ndarray]
"""Finite ``(x, y)`` sorted by x, ``(rows, 2)``, by seed."""


def collect(report: Report, chart: Chart, arm: str) -> Seeds:
    """What the arm's jobs recorded for a chart; a seed without anything to draw is absent."""
    found = {}
    for job in report.jobs:
        if job.arm != arm:
            continue
        points = [
            (float(row[chart.x]), float(row[chart.y]))
            for row in job.rows
            if chart.phase in (None, row.get("phase"))
            and _drawable(row.get(chart.x), chart.log_x)
            and _drawable(row.get(chart.y), chart.log_y)
        ]
        if points:
            found[job.seed] = np.array(sorted(points))
    return found


def _drawable(value: Any, log: bool) -> bool:
    return isinstance(value, int | float) and math.isfinite(value) and (value > 0 or not log)


def places(seeds: Seeds) -> np.ndarray:
    """Every x at which any seed has a point, ``(places,)``."""
    return np.unique(np.concatenate([points[:, 0] for points in seeds.values()]))


def room(seeds: Seeds) -> int:
    """How many points a curve gets: as many as its longest seed, 200 at most.

    Seeds that record at different x (say, seconds of wall time) share bins; else a curve would jump between them.
    """
    return min(MOST_POINTS, max(len(np.unique(points[:, 0])) for points in seeds.values()))


def until_first_end(seeds: Seeds) -> Seeds:
    """Cut all seeds where the shortest ends: a mean over the others would show only those that did not diverge."""
    end = min(points[-1, 0] for points in seeds.values())
    cut = {seed: points[points[:, 0] <= end] for seed, points in seeds.items()}
    return {seed: points for seed, points in cut.items() if len(points)}


def curve(seeds: Seeds, *, log_x: bool) -> list[Row]:
    """Mean and sample standard deviation over seeds, at each x or in bins of x where there are more than `room`.

    Returns:
        Rows with ``x``, ``y`` (the mean), ``low`` and ``high`` (one standard deviation away), ``sd``, ``n`` (seeds).
    """
    centers = places(seeds)
    if len(centers) > room(seeds):
        centers = (np.geomspace if log_x else np.linspace)(centers[0], centers[-1], room(seeds))
    borders = np.sqrt(centers[1:] * centers[:-1]) if log_x else (centers[1:] + centers[:-1]) / 2
    means: dict[int, list[float]] = {}
    for points in seeds.values():
        bins = np.searchsorted(borders, points[:, 0])
        for index in np.unique(bins):
            means.setdefault(int(index), []).append(float(points[bins == index, 1].mean()))
    rows = []
    for index in sorted(means):
        values = np.array(means[index])
        mean, sd = float(values.mean()), float(values.std(ddof=1)) if len(values) > 1 else 0.0
        rows.append(
            {"x": float(centers[index]), "y": mean, "low": mean - sd, "high": mean + sd, "sd": sd, "n": len(values)}
        )
    return rows


def cloud(seeds: Seeds) -> list[Row]:
    """Every point with ``x``, ``y`` and ``seed``, or 500 evenly spaced ones."""
    rows = [{"x": float(x), "y": float(y), "seed": seed} for seed, points in seeds.items() for x, y in points]
    if len(rows) <= MOST_DOTS:
        return rows
    return [rows[index] for index in np.linspace(0, len(rows) - 1, MOST_DOTS).astype(int)]


def frame(rows: list[Row]) -> list[float] | None:
    """Limits for y that keep one diverged arm from flattening all others; ``None`` when there is no such arm."""
    sizes: dict[str, float] = {}
    for row in rows:
        sizes[row["arm"]] = max(sizes.get(row["arm"], 0.0), abs(row["y"]))
    ordered = sorted(sizes.values())
    usual = ordered[(len(ordered) - 1) // 2]
    if ordered[-1] <= 30 * usual or usual == 0:
        return None
    values = [row["y"] for row in rows]
    return [max(min(values), -3 * usual), min(max(values), 3 * usual)]


def late(rows: list[Row]) -> list[float] | None:
    """Limits for y that show what moves after the first fifth of x, where that is a small part of the whole range."""
    ends = min(row["x"] for row in rows), max(row["x"] for row in rows)
    rest = [row for row in rows if row["x"] >= ends[0] + 0.2 * (ends[1] - ends[0])]
    if len(rest) < 4:
        return None
    low, high = min(row["low"] for row in rest), max(row["high"] for row in rest)
    whole = max(row["high"] for row in rows) - min(row["low"] for row in rows)
    room = 0.05 * (high - low)
    return [low - room, high + room] if 0 < high - low < whole / 3 else None


def trials_of(report: Report, arm: str, metric: str) -> dict[int, dict[int, float]]:
    """By number of trials, then seed: the metric of the best trial so far, from the rows that sweeps record."""
    found: dict[int, dict[int, float]] = {}
    for job in report.jobs:
        if job.arm == arm:
            for row in job.rows:
                if row.get("phase") == "sweep" and isinstance(row.get(metric), int | float) and "trial" in row:
                    found.setdefault(int(row["trial"]), {})[job.seed] = float(row[metric])
    return found


def at_edge(report: Report, arm: str) -> bool:
    """Whether an arm's best value was the smallest or largest that was tried, for most seeds."""
    flags = [row["at_edge"] for job in report.jobs if job.arm == arm for row in job.rows if "at_edge" in row]
    return bool(flags) and sum(map(bool, flags)) > len(flags) / 2
