"""A meter of what a model forgets: scores on all held-out sets after every task, for any model and any training."""

import csv
import io
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.continual.charts import check_chart_path, save_chart
from weightsmith.continual.prediction import prediction_accuracy
from weightsmith.continual.transfer import Better, Transfer, transfer
from weightsmith.core.display import printable
from weightsmith.core.errors import UsageError, brief, unknown
from weightsmith.core.files import write_atomically
from weightsmith.core.json_files import read_text
from weightsmith.core.modes import evaluating

_START = "(before)"
Score = Callable[[nn.Module, Any], float]


@dataclass(frozen=True, slots=True)
class ForgettingReport:
    """Scores after every task, and what follows from them; ``print`` shows a table.

    Attributes:
        sets: Names of the held-out sets.
        rows: After what, and the score on every set; the first may be before all tasks.
        transfer: Final score, forgetting and more; ``None`` before the first task.
        better: Which direction is good.
    """

    sets: tuple[str, ...]
    rows: tuple[tuple[str, tuple[float, ...]], ...]
    transfer: Transfer | None
    better: Better

    def __str__(self) -> str:
        """The scores as a table, changes since the row before in brackets, and the summary."""
        table, before = [["after", *map(printable, self.sets)]], None
        for name, scores in self.rows:
            cells = [f"{score:.2f}" for score in scores]
            if before is not None:
                pairs = zip(cells, scores, before, strict=True)
                cells = [f"{cell} ({score - last:+.2f})" for cell, score, last in pairs]
            table.append([printable(name), *cells])
            before = scores
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in table]
        if self.transfer is not None:
            t = self.transfer
            lines.append(f"final {t.final:.2f}, right after each task {t.new:.2f}, mean over steps {t.over_steps:.2f}")
            if not math.isnan(t.forgetting):
                lines.append(f"forgetting {t.forgetting:.2f}, backward transfer {t.backward:+.2f}")
        return "\n".join(lines)


class ForgettingMeter:
    """Score a model on all held-out sets after every task.

    It knows nothing of how the model is trained: call `record` after every task, in any loop, or give it to
    `weightsmith.integrations.continual.ForgettingCallback`.

    Args:
        held_out: Sets by name. Those named like tasks tell what is forgotten; others, what happens to other skills.
        score: ``(model, set) -> number``; ``None``: `prediction_accuracy`.
        better: Which direction of it is good.
        path: CSV file, written after every record. One that exists is read and continued, so that every task can run in
            a process of its own.

    Raises:
        UsageError: There is no set, one is empty or can be read only once, or the file is damaged or of other sets.

    Example:
        >>> batches = [(torch.randn(8, 4), torch.randint(0, 2, (8,)))]
        >>> meter = ForgettingMeter({"sums": batches, "names": batches})
        >>> model = nn.Linear(4, 2)
        >>> for task in ("sums", "names"):  # train the task, then:
        ...     _ = meter.record(model, task)
        >>> meter.report().transfer.forgetting
        0.0
    """

    def __init__(
        self,
        held_out: Mapping[str, Any],
        score: Score | None = None,
        *,
        better: Better = "higher",
        path: Path | str | None = None,
    ) -> None:
        if not held_out:
            raise UsageError("held_out must hold at least one set")
        if wrong := [name for name in held_out if not isinstance(name, str) or name in ("", _START, "after")]:
            raise UsageError(f"held_out must have names, and none of them 'after' or {_START!r}, got {wrong[0]!r}")
        if better not in ("higher", "lower"):
            raise unknown("better", str(better), ("higher", "lower"))
        for name, data in held_out.items():
            _check_set(name, data, any_kind=score is not None)
        self.held_out, self.better = dict(held_out), better
        self.path = None if path is None else Path(path)
        self._score: Score = score if score is not None else prediction_accuracy
        self._rows: list[tuple[str, dict[str, float]]] = []
        if self.path is not None and self.path.exists():
            self._rows = _read(self.path, list(self.held_out))

    @property
    def tasks(self) -> list[str]:
        """What has been recorded, in order: after a kill a script goes on with the others."""
        return [name for name, _ in self._rows if name != _START]

    @property
    def empty(self) -> bool:
        """Whether nothing has been recorded."""
        return not self._rows

    def check_task(self, task: str) -> None:
        """Refuse a task without a held-out set.

        Raises:
            UsageError: Names it.
        """
        if task not in self.held_out:
            raise unknown("task", str(task), self.held_out)

    def start(self, model: nn.Module, *, write: bool = True) -> dict[str, float]:
        """Score the model before the first task.

        Raises:
            UsageError: Something has been recorded already.
        """
        if self._rows:
            raise UsageError("start must come before the first record")
        return self._add(model, _START, write)

    def record(self, model: nn.Module, task: str, *, write: bool = True) -> dict[str, float]:
        """Score the model after a task.

        Args:
            model: As it is now.
            task: What it has just been trained on.
            write: Write the file; false on all processes but one.

        Returns:
            Scores by set.
        """
        self.check_task(task)
        return self._add(model, task, write)

    def _add(self, model: nn.Module, name: str, write: bool) -> dict[str, float]:
        # a loader or a score draws random numbers, and training has to go on as if nobody had looked
        devices = {p.device for p in model.parameters() if p.device.type == "cuda"}
        with evaluating(model), torch.no_grad(), torch.random.fork_rng(devices):
            scores = {key: self._scored(model, key) for key in self.held_out}
        self._rows.append((name, scores))
        if self.path is not None and write:
            self.to_csv(self.path)
        return scores

    def _scored(self, model: nn.Module, name: str) -> float:
        try:
            return float(self._score(model, self.held_out[name]))
        except UsageError as error:
            raise UsageError(f"held_out {name!r}: {error}") from error

    def report(self) -> ForgettingReport:
        """What has been recorded, and what follows from it."""
        trained = [(name, scores) for name, scores in self._rows if name != _START]
        found = transfer(trained, better=self.better) if trained else None
        rows = tuple((name, tuple(scores.values())) for name, scores in self._rows)
        return ForgettingReport(tuple(self.held_out), rows, found, self.better)

    def matrix(self) -> Tensor:
        """Scores ``(rows, sets)``, float64, without the row before all tasks."""
        rows = [list(scores.values()) for name, scores in self._rows if name != _START]
        return torch.tensor(rows, dtype=torch.float64).reshape(len(rows), len(self.held_out))

    def to_csv(self, path: Path | str) -> None:
        """Write the scores: a line per task, a column per set."""
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerow(["after", *self.held_out])
        writer.writerows([name, *map(repr, scores.values())] for name, scores in self._rows)
        write_atomically(Path(path), text.getvalue())

    def plot(self, path: Path | str) -> None:
        """Draw the scores as a map: what was trained from top to bottom, sets from left to right.

        Args:
            path: ``.html``, ``.svg``, ``.png`` or ``.json`` (Vega-Lite).

        Raises:
            UsageError: The file's ending is another, or there is nothing to draw.
        """
        target = check_chart_path(path)
        if not self._rows:
            raise UsageError("nothing has been recorded: call record after a task")
        save_chart(_chart(self.report()), target)


def _chart(report: ForgettingReport) -> Any:
    import altair as alt  # takes a while to import, and measuring needs it not

    before = any(name == _START for name, _ in report.rows)
    names = [name if name == _START else f"{at}. {name}" for at, (name, _) in enumerate(report.rows, 1 - before)]
    cells = [
        {"after": after, "set": name, "score": None if math.isnan(score) else score, "text": f"{score:.1f}"}
        for after, (_, scores) in zip(names, report.rows, strict=True)
        for name, score in zip(report.sets, scores, strict=True)
    ]
    base = alt.Chart(alt.InlineData(cells)).encode(
        x=alt.X("set:N", sort=list(report.sets), title="held-out set", axis=alt.Axis(orient="top", labelAngle=0)),
        y=alt.Y("after:N", sort=names, title="after task"),
    )
    scale = alt.Scale(scheme="blues", reverse=report.better == "lower")
    tiles = base.mark_rect().encode(color=alt.Color("score:Q", scale=scale, title="score"))
    numbers = base.mark_text(stroke="white", strokeWidth=3, strokeOpacity=0.7) + base.mark_text(color="black")
    both = (tiles + numbers.encode(text="text:N")).properties(title="Score on every held-out set after each task")
    return both.properties(width=90 * len(report.sets), height=36 * len(names))


def _read(path: Path, sets: Sequence[str]) -> list[tuple[str, dict[str, float]]]:
    try:
        lines = list(csv.reader(io.StringIO(read_text(path), newline=""), strict=True))
    except csv.Error as error:
        raise UsageError(f"{path} is damaged: {error}") from error
    if not lines or lines[0] != ["after", *sets]:
        held = ", ".join(map(brief, lines[0][1:])) if lines else "nothing"
        raise UsageError(f"{path} is of other sets ({brief(held)}): give another path, or the same sets in their order")
    rows: list[tuple[str, dict[str, float]]] = []
    for at, line in enumerate(lines[1:], 2):
        try:
            name, *values = line
            scores = dict(zip(sets, map(float, values), strict=True))
        except ValueError as error:
            raise UsageError(f"{path}, line {at}, must hold a name and {len(sets)} numbers: {brief(line)}") from error
        if name not in (*sets, _START) or (name == _START and rows):
            raise UsageError(f"{path}, line {at}, is of a task without a held-out set: {brief(name)}")
        rows.append((name, scores))
    return rows


def _check_set(name: str, data: Any, *, any_kind: bool) -> None:
    """Refuse what cannot be scored after every task, before any is trained; a score of one's own takes any kind."""
    if not (any_kind or isinstance(data, Iterable)) or isinstance(data, Iterator):
        raise UsageError(
            f"held_out {name!r} must hold batches that can be read after every task, such as a list or a DataLoader, "
            f"got {type(data).__name__}"
        )
    try:
        empty = isinstance(data, Sized) and not len(data)
    except TypeError:  # a DataLoader of a stream has the method, but no length
        empty = False
    if empty and not any_kind:
        raise UsageError(f"held_out {name!r} is empty")
