"""Hand a run's records to an experiment tracker that Accelerate knows: TensorBoard, W&B, MLflow and others."""

import contextlib
import os
from pathlib import Path
from typing import Any

from weightsmith.core.errors import UsageError, unknown
from weightsmith.lab import record
from weightsmith.lab.run import Run


def check_tracker(name: str) -> None:
    """Make sure that a tracker exists and is installed, before hours are spent.

    Raises:
        UsageError: Accelerate does not know it, or its package is not installed.
    """
    from accelerate import tracking

    if name not in tracking.LOGGER_TYPE_TO_CLASS:
        raise unknown("tracker", name, tracking.LOGGER_TYPE_TO_CLASS)
    installed = {str(found.value) for found in tracking.get_available_trackers()}
    if name not in installed:
        raise UsageError(f"tracker {name!r} needs its package: pip install {name}")


def track(run: Run, name: str) -> None:
    """Log the jobs that a run has just finished, each as a run of its own named ``<arm>-seed-<k>``.

    Args:
        run: What `weightsmith.lab.run.run` returned.
        name: The tracker, checked by `check_tracker`.
    """
    from accelerate import PartialState, tracking

    PartialState()
    kind = tracking.LOGGER_TYPE_TO_CLASS[name]
    for arm, seed in run.finished:
        job = record.read_job(record.job_folder(run.folder, arm, seed))
        options: dict[str, Any] = (
            {"logging_dir": str(run.folder / "tracker")} if kind.requires_logging_directory else {}
        )
        with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
            tracker = kind(f"{arm}-seed-{seed}", **options)
            if hasattr(tracker, "start"):
                tracker.start()
        for step, row in enumerate(job.rows):
            tracker.log({key: value for key, value in row.items() if isinstance(value, int | float)}, step=step)
        tracker.log({f"final/{key}": value for key, value in job.metrics.items()}, step=len(job.rows))
        tracker.finish()
