"""One step of AdamP beside torch's fused AdamW and the authors' package, on the shapes of two networks.

    OMP_NUM_THREADS=1 python benchmarks/adamp.py [--compile] [--rounds N] [--only steps|training]

Steps: the learning rate is 0, so weights stay where they are and gradients made orthogonal to them stay orthogonal.
Training: forward, backward and step of whole networks, on small batches, where the step weighs most.
"""

import argparse
import copy
import importlib
import sys
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import GPT2Config, GPT2LMHeadModel, ResNetConfig, ResNetForImageClassification

from _timing import interleave, show
from weightsmith.optim import AdamP

Shapes = list[tuple[int, ...]]
# let inductor compute the step twice rather than store it for every tensor at once
RECOMPUTE = {"realize_reads_threshold": 16, "realize_opcount_threshold": 200}


def resnet50() -> Shapes:
    """161 tensors, 25.6 M elements."""
    shapes: Shapes = [(64, 3, 7, 7), (64,), (64,)]
    inputs = 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            kernels: Shapes = [(width, inputs, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            kernels += [(4 * width, inputs, 1, 1)] * (block == 0)
            shapes += [shape for kernel in kernels for shape in (kernel, kernel[:1], kernel[:1])]
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def gpt(depth: int = 8, width: int = 512, words: int = 16384) -> Shapes:
    """100 tensors, 33.9 M elements."""
    w = width
    block: Shapes = [(w,), (w,), (3 * w, w), (3 * w,), (w, w), (w,), (w,), (w,), (4 * w, w), (4 * w,), (w, 4 * w), (w,)]
    return [(words, w), (w, w), *block * depth, (w,), (w,)]


def parameters(shapes: Shapes) -> list[nn.Parameter]:
    """Random weights and gradients; gradients of kernels (4-D) are orthogonal to their weights, row by row."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in shapes:
        p = nn.Parameter(0.05 * torch.randn(shape, generator=generator))
        g = 0.01 * torch.randn(shape, generator=generator)
        if g.dim() == 4:
            rows, weights = g.flatten(1), p.detach().flatten(1)
            g = (rows - (rows * weights).sum(1, True) / weights.square().sum(1, True) * weights).view_as(g)
        p.grad = g
        made.append(p)
    return made


def official() -> ModuleType:
    """The authors' package, which has the same name as this file."""
    sys.path = [path for path in sys.path if Path(path).resolve() != Path(__file__).resolve().parent]
    return importlib.import_module("adamp")


def training() -> dict[str, tuple[nn.Module, dict[str, torch.Tensor]]]:
    """Networks with a small batch each."""
    generator = torch.Generator().manual_seed(0)
    images = {"pixel_values": torch.randn(8, 3, 96, 96, generator=generator), "labels": torch.arange(8)}
    ids = torch.randint(8192, (4, 128), generator=generator)
    config = GPT2Config(vocab_size=8192, n_positions=128, n_embd=384, n_layer=6, n_head=6)
    return {
        "ResNet-50, 8 images of 96 x 96": (ResNetForImageClassification(ResNetConfig(num_labels=1000)), images),
        "GPT, 4 x 128 tokens": (GPT2LMHeadModel(config), {"input_ids": ids, "labels": ids}),
    }


def train_once(
    model: nn.Module, batch: dict[str, torch.Tensor], make: Callable[..., torch.optim.Optimizer]
) -> Callable[[], object]:
    """A whole training step of a copy of the model."""
    model = copy.deepcopy(model).train()
    optimizer = make(model.parameters(), lr=1e-4, weight_decay=0.01)

    def step() -> None:
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()

    return step


def extra_memory(step: Callable[[], object]) -> float:
    """Most MB that a step has allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]")) / 2**20


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="also torch.compile(optimizer.step); takes minutes")
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--only", choices=("steps", "training"))
    arguments = parser.parse_args()
    if arguments.only != "training":
        compare_steps(arguments)
    if arguments.only != "steps":
        compare_training(arguments.rounds)


def compare_steps(arguments: argparse.Namespace) -> None:
    """Print a table of optimizer steps per list of tensors."""
    options = {"lr": 0.0, "weight_decay": 0.01}
    for name, shapes in (("ResNet-50", resnet50()), ("GPT-like", gpt())):
        ours = AdamP(parameters(shapes), **options)
        ours.step()  # allocates the state
        memory = extra_memory(ours.step)
        steps = {
            "torch AdamW fused": torch.optim.AdamW(parameters(shapes), fused=True, **options).step,
            "AdamP": ours.step,
            "adamp 0.3.0": official().AdamP(parameters(shapes), **options).step,
        }
        if arguments.compile:
            capturable = AdamP(parameters(shapes), capturable=True, **options)
            steps["AdamP compiled"] = torch.compile(capturable.step, options=RECOMPUTE)
        elements = sum(torch.Size(shape).numel() for shape in shapes) / 1e6
        title = f"{name}: {len(shapes)} tensors, {elements:.1f} M, {torch.get_num_threads()} threads"
        show(title, interleave(steps, rounds=arguments.rounds), baseline="torch AdamW fused")
        print(f"a step of AdamP needed {memory:.1f} MB beside its state; {ours.projection_stats()[0]}\n")


def compare_training(rounds: int) -> None:
    """Print a table of training steps per network."""
    makers = {"torch AdamW fused": partial(torch.optim.AdamW, fused=True), "AdamP": AdamP}
    for name, (model, batch) in training().items():
        steps = {optimizer: train_once(model, batch, make) for optimizer, make in makers.items()}
        elements = sum(p.numel() for p in model.parameters()) / 1e6
        title = f"training {name}: {elements:.1f} M, {torch.get_num_threads()} threads"
        show(title, interleave(steps, rounds=rounds), baseline="torch AdamW fused")


if __name__ == "__main__":
    main()
