"""Progress bars for a run: the whole on top, below it a line for every job at work."""

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from weightsmith.lab.run import Run

_SECONDS_BETWEEN_LOOKS = 0.5


@contextlib.contextmanager
def watching(console: Console, run: Run, live: Path | None, total: int) -> Iterator[Callable[[], None]]:
    """Show how far a run is.

    Args:
        console: Where to draw.
        run: The run as it fills.
        live: Folder of the rows of the jobs at work, or ``None`` when they cannot be seen from here.
        total: How many jobs the run has, with those done before.

    Yields:
        A function to call after every job.
    """
    columns = (
        TextColumn("[progress.description]{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    ended = threading.Event()
    with Progress(*columns, console=console) as bars:
        whole = bars.add_task("jobs", total=total, completed=len(run.skipped))

        def step() -> None:
            bars.update(whole, completed=len(run.skipped) + len(run.finished) + len(run.failures))

        watcher = threading.Thread(target=_follow, args=(bars, live, ended), daemon=True)
        if live is not None:
            watcher.start()
        try:
            yield step
        finally:
            ended.set()
            if live is not None:
                watcher.join()


def _follow(bars: Progress, live: Path, ended: threading.Event) -> None:
    lines: dict[str, TaskID] = {}
    while not ended.wait(_SECONDS_BETWEEN_LOOKS):
        running = {path.stem: path for path in sorted(live.glob("*.jsonl"))}
        for job in lines.keys() - running.keys():
            bars.remove_task(lines.pop(job))
        for job, path in running.items():
            if job not in lines:
                lines[job] = bars.add_task(job, total=None)
            bars.update(lines[job], description=f"  {job}: {_last(path)}")
    for line in lines.values():
        bars.remove_task(line)


def _last(path: Path) -> str:
    try:
        row = json.loads(path.read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):  # just ended, or a row half written
        return "..."
    known = ("rate", "epoch", "train_loss", "validation_accuracy")
    shown = {key.replace("validation_", ""): row[key] for key in known if key in row}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )
