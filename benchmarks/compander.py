"""What companding costs: a training step and folded inference of ResNet-20 (CIFAR shapes), beside torch's weight_norm.

Run ``OMP_NUM_THREADS=1 python benchmarks/compander.py``; all arms are interleaved in one process, on one thread.
Targets: a companded step costs at most 10 % more than a plain one and at most 1.3x a ``weight_norm`` one, and a
folded model is the plain one in time and output.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from _timing import interleave, show
from weightsmith import fold_
from weightsmith.reparam import InWeightSpace, add_weight_decay_grad_, compand_, param_groups

BATCHES = (64, 128)
ROUNDS = 15
DECAY = 5e-4


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut, which pads channels where the shape changes."""

    def __init__(self, wide_in: int, wide_out: int) -> None:
        super().__init__()
        stride = 1 if wide_in == wide_out else 2
        self.body = nn.Sequential(
            nn.Conv2d(wide_in, wide_out, 3, stride, 1, bias=False),
            nn.BatchNorm2d(wide_out),
            nn.ReLU(),
            nn.Conv2d(wide_out, wide_out, 3, 1, 1, bias=False),
            nn.BatchNorm2d(wide_out),
        )
        self.stride, self.pad = stride, wide_out - wide_in

    def forward(self, x: Tensor) -> Tensor:
        """Map (N, wide_in, H, W) to (N, wide_out, H / stride, W / stride)."""
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.pad))
        return F.relu(self.body(x) + shortcut)


def resnet20() -> nn.Sequential:
    """0.27 M weights."""
    torch.manual_seed(0)
    widths = (16, 16, 16, 16, 32, 32, 32, 64, 64, 64)
    blocks = [Block(before, after) for before, after in pairwise(widths)]
    stem = (nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
    return nn.Sequential(*stem, *blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


def sgd_step(model: nn.Module, batch: int, decay: float = 0.0) -> Callable[[], None]:
    """One step of SGD with momentum; ``decay`` acts on companded weights, the optimizer's own on the rest."""
    return step(model, batch, torch.optim.SGD(param_groups(model, DECAY), lr=0.01, momentum=0.9), decay)


def step(model: nn.Module, batch: int, optimizer: torch.optim.Optimizer, decay: float = 0.0) -> Callable[[], None]:
    """One training step on fixed random data."""
    x, y = torch.randn(batch, 3, 32, 32), torch.randint(10, (batch,))

    def run() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        if decay:
            add_weight_decay_grad_(model, decay)
        optimizer.step()

    return run


def normed() -> nn.Module:
    """The same network under torch's own weight_norm."""
    model = resnet20()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            weight_norm(module)
    return model


def wrapped(batch: int) -> Callable[[], None]:
    """AdamW in weight space."""
    model = compand_(resnet20())
    return step(model, batch, InWeightSpace(torch.optim.AdamW(model.parameters()), model))


def adamw(batch: int) -> Callable[[], None]:
    """AdamW on a plain model."""
    model = resnet20()
    return step(model, batch, torch.optim.AdamW(model.parameters()))


def inference(model: nn.Module, x: Tensor) -> Callable[[], Tensor]:
    """A forward pass without gradients."""
    return torch.inference_mode()(lambda: model(x))


def main() -> None:
    """Time every arm and show the tables."""
    torch.set_num_threads(1)
    for batch in BATCHES:
        arms = {
            "plain": sgd_step(resnet20(), batch),
            "weight_norm": sgd_step(normed(), batch),
            "companded": sgd_step(compand_(resnet20()), batch),
            "same, decay on w": sgd_step(compand_(resnet20()), batch, DECAY),
            "same, learnt pairs": sgd_step(compand_(resnet20(), learnable=True), batch),
            "AdamW": adamw(batch),
            "companded, InWeightSpace(AdamW)": wrapped(batch),
        }
        show(f"training step, batch {batch}", interleave(arms, rounds=ROUNDS), baseline="plain")

    x = torch.randn(BATCHES[0], 3, 32, 32)
    plain, companded, folded = resnet20().eval(), compand_(resnet20()).eval(), fold_(compand_(resnet20())).eval()
    arms = {"plain": inference(plain, x), "companded": inference(companded, x), "folded": inference(folded, x)}
    show(f"inference, batch {BATCHES[0]}", interleave(arms, rounds=ROUNDS), baseline="plain")
    if not torch.equal(arms["folded"](), arms["companded"]()):
        raise SystemExit("folding has changed the output")


if __name__ == "__main__":
    main()
