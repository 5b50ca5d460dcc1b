"""The report in the terminal: verdicts and the table, in short."""

import textwrap
from bisect import bisect
from dataclasses import dataclass
from itertools import accumulate

from rich import box
from rich.console import Console, ConsoleOptions, Group, RenderableType, RenderResult
from rich.table import Table
from rich.text import Text

from weightsmith.lab.experiment import Metric
from weightsmith.lab.report import words
from weightsmith.lab.report.model import Report

_GAP = 3
_STYLES = {
    "supported": "bold green",
    "refuted": "bold red",
    "no relevant effect": "bold blue",
    "undecided": "bold yellow",
    "not run": "dim",
}


def to_terminal(report: Report) -> RenderableType:
    """Lay a report out for a terminal of 80 columns or more.

    Args:
        report: From `weightsmith.lab.report.load`.

    Returns:
        Something that `rich.console.Console.print` shows.
    """
    first, *findings, advice = words.answer(report)
    parts: list[RenderableType] = [Text(report.run["title"], "bold"), Text(first, "dim")]
    parts += [Text(sentence) for sentence in findings] + [Text(advice, "bold")]
    parts += [Text(notice, "yellow") for notice in words.notices(report)]
    if report.judgements:
        parts += [Text(), _claims(report)]
    note = "Mean ± standard deviation over seeds; * ahead by a supported claim"
    return Group(*parts, _Results(report), Text(f"{note}; {words.NONE} not measured or not finite.", "dim"))


def _claims(report: Report) -> Table:
    grid = Table.grid(padding=(0, 2, 0, 0))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for judgement in (*report.gates, *report.primary, *report.mechanism):
        if grid.row_count:
            grid.add_row()
        verdict = Text(f"{words.SYMBOLS[judgement.verdict]} {judgement.verdict}", _STYLES[judgement.verdict])
        found = words.evidence(report, judgement)
        compared, difference = found.pop("Compared"), found.pop("Difference")
        lines = [f"{compared} = {difference}; " + "; ".join(f"{k[:1].lower()}{k[1:]}: {v}" for k, v in found.items())]
        lines += [f"Why: {words.why(judgement)}"] if words.why(judgement) else []
        grid.add_row(verdict, Text.assemble(judgement.claim.text, ("\n" + "\n".join(lines), "dim")))
    return grid


@dataclass(frozen=True, slots=True)
class _Column:
    head: str
    cells: list[tuple[str, ...]]
    best: list[bool]

    def text(self, stacked: bool) -> list[str]:
        return [("\n" if stacked else " ").join(part for part in cell if part) for cell in self.cells]

    def width(self, stacked: bool) -> int:
        # a heading may wrap between words, a number may not
        parts = self.head.split(" ") + [line for text in self.text(stacked) for line in text.splitlines()]
        return max(map(len, parts))


@dataclass(frozen=True, slots=True)
class _Results:
    """Arms x metrics; mean over spread when one line is too long, several tables when one is too wide."""

    report: Report

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        columns = [self._column(metric) for metric in self.report.shown]
        names = max([*(len(arm.label) for arm in self.report.planned_arms), 3])
        room = options.max_width - min(names, 24) - 14  # names, seeds, and the gaps around both
        stacked = sum(column.width(False) + _GAP for column in columns) > room
        while columns:
            ends = list(accumulate(column.width(stacked) + _GAP for column in columns))
            taken = max(1, bisect(ends, room))
            yield self._table(columns[:taken], stacked)
            columns = columns[taken:]

    def _column(self, metric: Metric) -> _Column:
        best = self.report.best(metric)
        cells: list[tuple[str, ...]] = []
        for arm in self.report.planned_arms:
            mean, sd = words.mean_and_sd(self.report.table[arm.name][metric.name], metric.format)
            few = words.fewer(self.report, arm.name, metric)
            cells.append(("*" * (arm.name in best) + mean, sd, few and f"({few})"))
        return _Column(
            metric.label + words.ARROWS[metric.better], cells, [arm.name in best for arm in self.report.planned_arms]
        )

    def _table(self, columns: list[_Column], stacked: bool) -> Table:
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        table.add_column("Arm", overflow="fold", max_width=24)
        table.add_column("Seeds", justify="right", no_wrap=True)
        for column in columns:
            head = textwrap.fill(column.head, column.width(stacked), break_long_words=False)
            table.add_column(Text(head), justify="right", no_wrap=True)
        cells = [column.text(stacked) for column in columns]
        for row, arm in enumerate(self.report.planned_arms):
            values = [
                Text(texts[row], "bold" if column.best[row] else "")
                for texts, column in zip(cells, columns, strict=True)
            ]
            table.add_row(Text(arm.label), words.seeds_of(self.report, arm.name), *values)
        return table
