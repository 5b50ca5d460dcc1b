"""What the lab costs: the training loop beside one written by hand, a job, a report, the first line of help.

Targets: ``fit`` within 3 % of the loop; at most 50 ms per job with 2 workers after they have started; a report of 200
jobs in 3 s; ``weightsmith --help`` in 0.4 s.
"""

import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from _timing import interleave, show
from weightsmith.lab import report
from weightsmith.lab.experiment import Arm, Claim, Experiment, Metric
from weightsmith.lab.models import build_model
from weightsmith.lab.models.text import TextTransformer
from weightsmith.lab.run import run
from weightsmith.lab.tasks import from_datasets
from weightsmith.lab.train import fit

STEPS = 8


def by_hand(model: nn.Module, x: torch.Tensor, y: torch.Tensor, batch: int) -> None:
    """Cross-entropy, SGD, a cosine: what anybody would write."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9)
    order = torch.randperm(len(x)).split(batch)
    model.train()
    for step in range(STEPS):
        rows = order[step % len(order)]
        for group in optimizer.param_groups:
            group["lr"] = 0.01 * 0.5 * (1 + math.cos(math.pi * step / STEPS))
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x[rows]).flatten(0, -2), y[rows].flatten())
        loss.backward()
        if not math.isfinite(loss.item()):
            break
        optimizer.step()


@dataclass
class Pairs:
    """A dataset that gives whole batches, as in-memory tasks do."""

    x: torch.Tensor
    y: torch.Tensor

    def __len__(self) -> int:
        return len(self.x)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        return self.x[index], self.y[index]


def loops(name: str, build: Callable[[], nn.Module], x: torch.Tensor, y: torch.Tensor, batch: int) -> None:
    """Time both loops on one model."""

    def losses(output: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        each = nn.functional.cross_entropy(output.flatten(0, -2), targets.flatten(), reduction="none")
        return each.view(len(targets), -1).mean(1)

    task = from_datasets(build, Pairs(x, y), Pairs(x, y), Pairs(x, y), loss=losses, metric=losses, better="lower")
    hand, ours = build(), build()
    optimizer = torch.optim.SGD(ours.parameters(), lr=0.01, momentum=0.9)
    timings = interleave(
        {
            "by hand": lambda: by_hand(hand, x, y, batch),
            "fit": lambda: fit(ours, optimizer, task, steps=STEPS, batch_size=batch, seed=0, validate="never"),
        },
        rounds=8,
    )
    show(f"{STEPS} steps of {name}", timings, baseline="by hand")


def toy_job(_: object, job: object) -> dict[str, float]:
    """No work at all."""
    return {"score": float(job.seed % 7)}  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Config:
    """Nothing to set."""

    size: int = 1


TOY = Experiment(
    slug="overhead",
    title="Overhead",
    question="What does a job cost?",
    presets={"laptop": Config()},
    arms=lambda _: (Arm("new", "new"), Arm("old", "old")),
    claims=lambda _: (Claim(text="New beats old", metric="score", winner="new", loser="old", primary=True),),
    metrics=lambda _: (Metric("score", "score", "higher"),),
    job=toy_job,
)


def jobs(out: Path) -> None:
    """Time 200 jobs, and the report of them."""
    times = []
    for seeds in (1, 101):
        begin = time.perf_counter()
        done = run(TOY, Config(), seeds=seeds, out=out, workers=2, fresh=True)
        times.append(time.perf_counter() - begin)
    print(f"per job with 2 workers: {1e3 * (times[1] - times[0]) / 200:.1f} ms (start of the pool {times[0]:.1f} s)")
    begin = time.perf_counter()
    report.write(done.folder)
    print(f"report of 200 jobs: {time.perf_counter() - begin:.2f} s")


def help_text() -> None:
    """Time the first thing that a user types."""
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        subprocess.run([sys.executable, "-m", "weightsmith.cli", "--help"], capture_output=True, check=True)
        times.append(time.perf_counter() - begin)
    print(f"weightsmith --help: {sorted(times)[2]:.2f} s")


def main() -> None:
    """Print every figure."""
    torch.set_num_threads(1)
    images, labels = torch.randn(256, 3, 32, 32), torch.randint(10, (256,))
    loops("ResNet-20, 32 images", lambda: build_model("resnet20", channels=3, size=32, classes=10), images, labels, 32)
    tokens = torch.randint(200, (64, 129))
    loops(
        "a small GPT, 8 x 128 tokens",
        lambda: TextTransformer(vocabulary=200, length=128, width=128, depth=4),
        tokens[:, :-1],
        tokens[:, 1:],
        8,
    )
    with tempfile.TemporaryDirectory() as out:
        jobs(Path(out))
    help_text()


if __name__ == "__main__":
    main()
