"""One job: an arm with a seed, where it writes, and what the arms of a seed share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from weightsmith.lab.record import Recorder


@dataclass(slots=True)
class Job:
    """What an experiment's ``job`` function is given beside the configuration.

    Attributes:
        arm: The arm's name.
        seed: The seed.
        record: Takes rows of numbers, for curves.
        folder: A folder of this job's own, kept when the job is killed and removed when it has finished: hand it to
            ``fit`` so that training resumes.
        device: Where to compute.
        start: What the experiment's ``start`` returned for this seed, read back from disk; ``None`` without one.
        diverged: Set it when training did not stay finite: a winner that diverged supports nothing.
    """

    arm: str
    seed: int
    record: Recorder
    folder: Path
    device: torch.device
    start: Any = None
    diverged: bool = False

    @property
    def keep(self) -> Path:
        """A folder whose files stay beside the result when the job has finished."""
        return self.folder / "keep"
