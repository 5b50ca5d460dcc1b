"""Synthetic experiments for the engine's own tests: one with known numbers and no training, one that trains."""

import os
import signal
import time
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from torch import nn
from torch.utils.data import TensorDataset

from weightsmith.core.errors import UsageError
from weightsmith.core.files import file_atomically
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric
from weightsmith.lab.progress import seed_everything
from weightsmith.lab.tasks import from_datasets
from weightsmith.lab.train import Hook, fit


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
    """How long a job takes, or a step of its training."""


def check(config):
    if config.data != "digits":
        raise UsageError(f"data {config.data!r} is not known")


def _kill_once(config):
    once = Path(config.kill_once) if config.kill_once else None
    if once is not None and not once.exists():
        once.touch()
        os.kill(os.getpid(), signal.SIGKILL)


def _call(config, name):
    if config.counter:
        (Path(config.counter) / f"{name}-{time.monotonic_ns()}").touch()


def job(config, job):
    time.sleep(60 if job.arm == config.slow else config.seconds)
    _call(config, f"{job.arm}-{job.seed}")
    if job.arm == config.broken:
        raise RuntimeError(f"{job.arm} is broken")
    _kill_once(config)
    if job.seed == config.kill:
        os.kill(os.getpid(), signal.SIGKILL)
    for step in range(config.steps):
        job.record({"step": step, "loss": 1.0 / (step + 1)}, phase="train")
    noise = ((job.seed * 7919) % 13) / 100
    if config.noise:
        noise = torch.randn((), generator=torch.Generator().manual_seed(2 * job.seed + (job.arm == "plain"))).item()
    return {"score": noise + (config.gain if job.arm == "better" else 0.0), "cost": 1.0}


def writing_job(config, job):
    """Hang while a file is written, unless the marker is there."""
    marker = Path(config.kill_once)
    if not marker.exists():
        with file_atomically(job.folder / "state.pt") as fresh:
            fresh.write_bytes(b"half")
            marker.touch()
            time.sleep(60)
    return {"score": 1.0, "cost": 1.0}


def quick_job(config, job):
    return {"score": 1.0, "cost": 1.0}


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


def task(config):
    x = torch.randn(96, 6, generator=torch.Generator().manual_seed(7))
    y = (x.sum(1) > 0).long()
    parts = TensorDataset(x[:64], y[:64]), TensorDataset(x[64:], y[64:])
    return from_datasets(partial(nn.Linear, 6, 2), *parts, name="sums")


def trained_start(config, seed, folder):
    _call(config, f"start-{seed}")
    seed_everything(seed)
    return {"model": task(config).build().state_dict()}


def trained_job(config, job):
    _call(config, f"{job.arm}-{job.seed}")
    data = task(config)
    model = data.build()
    model.load_state_dict(job.start["model"])
    fitted = fit(
        model,
        torch.optim.SGD(model.parameters(), lr=0.1 if job.arm == "better" else 0.01),
        data,
        steps=config.steps,
        batch_size=8,
        seed=job.seed,
        rows_at=2,
        hooks=[Hook(after_step=partial(time.sleep, config.seconds))],
        record=partial(job.record, phase="train"),
        folder=job.folder,
        checkpoint_seconds=0.0,
    )
    _kill_once(config)
    if job.arm == config.broken and int(os.environ.get("RANK", "0")) >= config.kill:
        raise RuntimeError(f"{job.arm} is broken")
    outcome = data.evaluate(fitted.model, "test")
    job.diverged = fitted.diverged
    return {"score": outcome.value("accuracy"), "cost": outcome.value("loss")}


def keeping_job(config, job):
    (job.keep / "notes").mkdir(parents=True)
    (job.keep / "notes" / "kept.txt").write_text(job.arm)
    return trained_job(config, job)


WRITING = replace(EXPERIMENT, slug="writing", job=writing_job)

TRAINED = replace(
    EXPERIMENT,
    slug="trained",
    task=task,
    start=trained_start,
    job=trained_job,
    steps=lambda config, arm: config.steps,
)
