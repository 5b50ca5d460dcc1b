"""Progress bars for a run: the whole on top, below it a line for every job at work."""

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from rich.console import Console
from rich.markup import escape
from rich.progress import Progress, TaskID

from weightsmith.core.bars import bars_on
from weightsmith.lab.run import Run

_SECONDS_BETWEEN_LOOKS = 0.5
_SHOWN = ("rate", "epoch", "step", "train_loss", "validation_loss", "generation", "individual", "best", "left")
_STALE = 3600  # seconds: a job that has recorded nothing for an hour was probably killed


@contextlib.contextmanager
def watching(console: Console, run: Run, total: int) -> Iterator[Callable[[], None]]:
    """Show how far a run is.

    Args:
        console: Where to draw.
        run: The run as it fills.
        total: How many jobs the run has at most, with those done before.

    Yields:
        A function to call after every job.
    """
    ended = threading.Event()
    with bars_on(console) as bars:
        whole = bars.add_task("jobs, at most", total=total)

        def step() -> None:
            bars.update(whole, completed=len(run.skipped) + len(run.finished) + len(run.failures))

        step()
        watcher = threading.Thread(target=_follow, args=(bars, run.folder / "work", ended), daemon=True)
        watcher.start()
        try:
            yield step
        finally:
            ended.set()
            watcher.join()


def _follow(bars: Progress, work: Path, ended: threading.Event) -> None:
    lines: dict[str, TaskID] = {}
    while not ended.wait(_SECONDS_BETWEEN_LOOKS):
        running = {path.parent.name: path for path in sorted(work.glob("*/rows.jsonl")) if _fresh(path)}
        for job in lines.keys() - running.keys():
            bars.remove_task(lines.pop(job))
        for job, path in running.items():
            if job not in lines:
                lines[job] = bars.add_task(escape(job), total=None)
            bars.update(lines[job], description=escape(f"  {job}: {_last(path)}"))
    for line in lines.values():
        bars.remove_task(line)


def _fresh(path: Path) -> bool:
    try:
        return time.time() - path.stat().st_mtime < _STALE
    except OSError:  # just ended
        return False


def _last(path: Path) -> str:
    try:
        row = json.loads(path.read_text().splitlines()[-1])
    except (OSError, ValueError, IndexError):  # just ended, or a row half written
        return "..."
    shown = {key.replace("validation_", ""): row[key] for key in _SHOWN if key in row}
    return ", ".join(
        f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in shown.items()
    )
