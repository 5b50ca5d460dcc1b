"""Bounds beside a plain forward pass and a plain training step, on CNN7 and on a small network.

The peer, auto_LiRPA 0.7.1, is not on the Python index (0.3 is there, and was not tried), so its times are not
measured here: the table names the ratios to the same plain pass that were measured for it on another machine.
"""

import torch
from torch import nn
from torch.nn import functional as F

from _timing import interleave, show
from weightsmith.certify import BoundOptions, margins, robust_cross_entropy, trace
from weightsmith.lab.models import build_model

_PEER = {
    "CNN7, evaluation": "auto_LiRPA, clean and IBP: 5.65x; target: at most 3.0x",
    "CNN7, training": "auto_LiRPA, clean-batch statistics: 3.85x; target: at most that",
    "small network": "auto_LiRPA: IBP 14x (target 7x), CROWN-IBP 45x to 170x (32x), CROWN 1640x to 2450x (820x)",
}


def evaluation(batch: int = 64) -> None:
    """IBP margins of CNN7 at width 64 in evaluation mode."""
    model, x, y = _cnn7(batch)
    model.eval()
    traced = trace(model, x)

    def plain() -> object:
        with torch.no_grad():
            return model(x)

    def bounded() -> object:
        with torch.no_grad():
            return margins(traced, x, y, 8 / 255, lower=0.0, upper=1.0)

    _report("CNN7, evaluation", {"plain forward": plain, "IBP margins": bounded}, rounds=4)


def training(batch: int = 64) -> None:
    """A step of IBP training, by where batch norm has its statistics from."""
    model, x, y = _cnn7(batch)
    model.train()
    traced = trace(model, x)

    def step(loss: torch.Tensor) -> None:
        model.zero_grad()
        loss.backward()

    def robust(**options: object) -> None:
        found = margins(traced, x, y, 8 / 255, lower=0.0, upper=1.0, options=BoundOptions(**options))
        step(robust_cross_entropy(found.lower))

    calls = {
        "plain step": lambda: step(F.cross_entropy(model(x), y)),
        "IBP, clean statistics": robust,
        "IBP, detached statistics": lambda: robust(detach_statistics=True),
    }
    _report("CNN7, training", calls, rounds=4)


def small() -> None:
    """Lower margins of a network 784-100-100-10, batch 32."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(784, 100), nn.ReLU(), nn.Linear(100, 100), nn.ReLU(), nn.Linear(100, 10)).eval()
    x, y = torch.rand(32, 784), torch.randint(10, (32,))
    traced = trace(model, x)

    def bounded(method: str) -> object:
        with torch.no_grad():
            return margins(traced, x, y, 0.02, lower=0.0, upper=1.0, method=method)

    def plain() -> object:
        with torch.no_grad():
            return model(x)

    calls = {"plain forward": plain} | {m: lambda m=m: bounded(m) for m in ("ibp", "crown-ibp", "crown")}
    _report("small network", calls, rounds=40)


def _cnn7(batch: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    model = build_model("cnn7", channels=3, size=32, classes=10)
    return model, torch.rand(batch, 3, 32, 32), torch.randint(10, (batch,))


def _report(title: str, calls: dict, rounds: int) -> None:
    times = interleave(calls, rounds=rounds, warmup=1)
    show(f"{title} ({_PEER[title]})", times, baseline=next(iter(calls)))


def main() -> None:
    """Time all three."""
    torch.set_num_threads(1)
    small()
    evaluation()
    training()


if __name__ == "__main__":
    main()
