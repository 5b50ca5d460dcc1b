"""A training step with meta-rescaling beside a plain one and beside the same step with ``higher``, on two networks.

    OMP_NUM_THREADS=1 python benchmarks/meta.py [--rounds N] [--only steps|features]

Every mode of the gradient through the virtual step, with one pass per batch; three passes; a rescaler that learns at
every fourth step. The peer differentiates through the virtual step with the library ``higher``. Then the features of a
batch, for several numbers of classes.
"""

import argparse
import copy
import importlib
from collections.abc import Callable
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile

from _timing import interleave, show
from weightsmith.lab.models.text import TextTransformer
from weightsmith.reweight import LossRescaler, MetaRescaler, SampleStatsMemory, rescaler_features

Batch = tuple[Tensor, Tensor]
LR = 0.1
ARMS: dict[str, dict[str, Any]] = {
    "finite_difference": {"meta_grad": "finite_difference"},
    "jvp": {"meta_grad": "jvp"},
    "double_backward": {"meta_grad": "double_backward"},
    "head": {"meta_grad": "head"},
    "none": {"meta_grad": "none"},
    "finite_difference, every 4th step": {"meta_grad": "finite_difference", "meta_every": 4},
    "finite_difference, 3 passes": {"meta_grad": "finite_difference", "passes": 3},
}


def networks() -> dict[str, tuple[nn.Module, Batch, Batch]]:
    """Two networks with 0.67 million weights, and two batches each."""
    torch.manual_seed(0)
    mlp = nn.Sequential(nn.Linear(784, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10))
    images = [(torch.randn(64, 784), torch.randint(10, (64,))) for _ in range(2)]
    transformer = TextTransformer(vocabulary=1000, length=32, classes=10, width=104, depth=4, heads=4)
    texts = [(torch.randint(1000, (32, 32)), torch.randint(10, (32,))) for _ in range(2)]
    return {
        "MLP, 64 images": (mlp, *images),
        "transformer of 4 layers, 32 texts of 32 tokens": (transformer, *texts),
    }


def plain_step(model: nn.Module, batch: Batch) -> Callable[[], object]:
    """Forward, backward and step of SGD."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)

    def step() -> None:
        optimizer.zero_grad()
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def rescaled_step(model: nn.Module, batch: Batch, val: Batch, **options: Any) -> Callable[[], object]:
    """The same with a step of the rescaler; four of them where it learns at every fourth."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    rescaler = LossRescaler(10, class_separation=False)
    meta = MetaRescaler(model, optimizer, rescaler, virtual_lr=LR, normalize="none", **({"passes": 1} | options))
    return lambda: meta.step(batch, val)


def peer_step(model: nn.Module, batch: Batch, val: Batch) -> Callable[[], object]:
    """The two-phase step, with ``higher`` differentiating through the virtual step of gradient descent."""
    higher: Any = importlib.import_module("higher")
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    virtual = torch.optim.SGD(model.parameters(), lr=LR)
    rescaler = LossRescaler(10, class_separation=False)
    teacher = torch.optim.Adam(rescaler.parameters(), lr=1e-2)
    memories = [SampleStatsMemory(10, class_separation=False) for _ in range(2)]

    def weighed(logits: Tensor, y: Tensor, memory: SampleStatsMemory) -> tuple[Tensor, Tensor]:
        losses = F.cross_entropy(logits, y, reduction="none")
        features = rescaler_features(losses.detach()[None], logits.detach()[None], y, memory, clamp=1e4)
        return rescaler(features, y), losses

    def step() -> None:
        with sdpa_kernel(SDPBackend.MATH), higher.innerloop_ctx(model, virtual, copy_initial_weights=False) as (f, d):
            w, losses = weighed(f(batch[0]), batch[1], memories[0])
            d.step((w * losses).mean())
            w_val, val_losses = weighed(f(val[0]), val[1], memories[1])
            teacher.zero_grad()
            gradients = torch.autograd.grad((w_val * val_losses).mean(), list(rescaler.parameters()))
        for p, g in zip(rescaler.parameters(), gradients, strict=True):
            p.grad = g
        teacher.step()
        optimizer.zero_grad()
        (w.detach() * F.cross_entropy(model(batch[0]), batch[1], reduction="none")).mean().backward()
        optimizer.step()

    return step


def extra_memory(step: Callable[[], object]) -> float:
    """Most MB that a step has allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]")) / 2**20


def compare_steps(rounds: int) -> None:
    """Print a table of steps per network, and what they allocate."""
    for name, (model, batch, val) in networks().items():
        steps = {"plain": plain_step(model, batch)}
        steps |= {arm: rescaled_step(model, batch, val, **options) for arm, options in ARMS.items()}
        steps["higher 0.2.1"] = peer_step(model, batch, val)
        memory = {arm: extra_memory(step) for arm, step in steps.items()}
        fourth = steps["finite_difference, every 4th step"]

        def four(step: Callable[[], object] = fourth) -> None:
            for _ in range(4):
                step()

        def four_plain(step: Callable[[], object] = steps["plain"]) -> None:
            for _ in range(4):
                step()

        del steps["finite_difference, every 4th step"]
        weights = sum(p.numel() for p in model.parameters()) / 1e6
        title = f"{name}: {weights:.2f} M weights, {torch.get_num_threads()} threads"
        show(title, interleave(steps, rounds=rounds), baseline="plain")
        four_steps = {"plain, 4 steps": four_plain, "finite_difference, every 4th step": four}
        show(title, interleave(four_steps, rounds=max(3, rounds // 3)), baseline="plain, 4 steps")
        print("MB allocated at once: " + ", ".join(f"{arm} {mb:.1f}" for arm, mb in memory.items()) + "\n")


def compare_features(rounds: int) -> None:
    """Print how long the features of a batch take."""
    calls = {}
    for size, classes in ((32, 2), (32, 10), (128, 10), (128, 100), (128, 1000)):
        logits, labels = torch.randn(3, size, classes), torch.randint(classes, (size,))
        losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(3), reduction="none").view(3, size)
        memory = SampleStatsMemory(classes, 1, size)
        calls[f"{size} samples, {classes} classes"] = lambda found=(losses, logits, labels, memory): rescaler_features(
            *found
        )
    show("features of a batch", interleave(calls, rounds=10 * rounds), baseline="32 samples, 2 classes")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--only", choices=("steps", "features"))
    arguments = parser.parse_args()
    if arguments.only != "features":
        compare_steps(arguments.rounds)
    if arguments.only != "steps":
        compare_features(arguments.rounds)


if __name__ == "__main__":
    main()
