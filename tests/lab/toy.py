"""A synthetic experiment for the engine's own tests: no training, known numbers."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

from weightsmith.core.errors import UsageError
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric


@dataclass(frozen=True)
class Config:
    gain: float = 1.0
    """How far the better arm is ahead."""
    steps: int = 3
    """Rows per job."""
    sizes: tuple[float, ...] = (1.0, 2.0)
    """Not used; here to be parsed."""
    data: str = "digits"
    """Not used; here to be parsed."""
    broken: str = ""
    """Name of an arm that raises."""
    counter: str = ""
    """Folder in which every job leaves a file, so that tests can count calls."""
    kill: int = -1
    """Seed at which the process kills its parent or itself."""
    seconds: float = 0.0
    """How long a job takes."""


def check(config):
    if config.data != "digits":
        raise UsageError(f"data {config.data!r} is not known")


def job(config, job):
    arm, seed = job.arm, job.seed
    time.sleep(config.seconds)
    if config.counter:
        (Path(config.counter) / f"{arm}-{seed}-{time.monotonic_ns()}").touch()
    if arm == config.broken:
        raise RuntimeError(f"{arm} is broken")
    if seed == config.kill:
        os.kill(os.getpid(), signal.SIGKILL)
    for step in range(config.steps):
        job.record({"step": step, "loss": 1.0 / (step + 1)}, phase="train")
    noise = ((seed * 7919) % 13) / 100
    return {"score": noise + (config.gain if arm == "better" else 0.0), "cost": 1.0}


EXPERIMENT = Experiment(
    slug="toy",
    title="A toy",
    question="Does the engine work?",
    presets={"smoke": Config(steps=1), "laptop": Config(), "paper": Config(steps=100)},
    arms=lambda config: (Arm("better", "ahead by the gain"), Arm("plain", "the baseline")),
    claims=lambda config: (
        Claim(text="better beats plain", metric="score", winner="better", loser="plain", primary=True, paper="+1"),
    ),
    metrics=lambda config: (Metric("score", "score", "higher"), Metric("cost", "cost", "lower")),
    charts=(Chart(title="Loss", x="step", y="loss", phase="train"),),
    job=job,
    check=check,
)
