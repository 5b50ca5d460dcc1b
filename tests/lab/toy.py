"""A synthetic experiment for the engine's own tests: no training, known numbers."""

import os
import signal
import time
from dataclasses import dataclass
from pathlib import Path

import torch

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
    slow: str = ""
    """Name of an arm that takes a minute."""
    counter: str = ""
    """Folder in which every job leaves a file, so that tests can count calls."""
    kill: int = -1
    """Seed at which the process kills itself."""
    kill_once: str = ""
    """A file: the first job that finds it missing makes it and kills its process."""
    noise: bool = False
    """Both arms vary independently."""
    seconds: float = 0.0
    """How long a job takes."""


def check(config):
    if config.data != "digits":
        raise UsageError(f"data {config.data!r} is not known")


def _call(config, name):
    if config.counter:
        (Path(config.counter) / f"{name}-{time.monotonic_ns()}").touch()


def job(config, job):
    time.sleep(60 if job.arm == config.slow else config.seconds)
    _call(config, f"{job.arm}-{job.seed}")
    if job.arm == config.broken:
        raise RuntimeError(f"{job.arm} is broken")
    once = Path(config.kill_once) if config.kill_once else None
    if job.seed == config.kill or (once is not None and not once.exists()):
        if once is not None:
            once.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    for step in range(config.steps):
        job.record({"step": step, "loss": 1.0 / (step + 1)}, phase="train")
    noise = ((job.seed * 7919) % 13) / 100
    if config.noise:
        noise = torch.randn((), generator=torch.Generator().manual_seed(2 * job.seed + (job.arm == "plain"))).item()
    return {"score": noise + (config.gain if job.arm == "better" else 0.0), "cost": 1.0}


def start(config, seed, folder):
    _call(config, f"start-{seed}")
    return {"weights": torch.full((2,), float(seed)), "note": "shared"}


def started_job(config, job):
    return {"score": float(job.start["weights"].sum()), "cost": 1.0}


EXPERIMENT = Experiment(
    slug="toy",
    title="A toy",
    question="Does the engine work?",
    presets={"smoke": Config(steps=1), "laptop": Config(), "paper": Config(steps=100)},
    arms=lambda config: (Arm("better", "ahead by the gain", "Better"), Arm("plain", "the baseline")),
    claims=lambda config: (
        Claim(text="better beats plain", metric="score", winner="better", loser="plain", primary=True, paper="+1"),
    ),
    metrics=lambda config: (Metric("score", "score", "higher"), Metric("cost", "cost", "lower")),
    charts=(Chart(title="Loss", x="step", y="loss", phase="train"),),
    job=job,
    check=check,
)
