"""One step of AdamP beside torch's fused AdamW and the authors' package, on the shapes of two networks.

    OMP_NUM_THREADS=1 python benchmarks/adamp.py [--compile] [--rounds N]

The learning rate is 0, so weights stay where they are and gradients made orthogonal to them stay orthogonal.
"""

import argparse
import importlib
import sys
from collections.abc import Callable
from itertools import accumulate
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

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


def extra_memory(step: Callable[[], object]) -> float:
    """Most MB that a step has allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]")) / 2**20


def main() -> None:
    """Print one table per network."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--compile", action="store_true", help="also torch.compile(optimizer.step); takes minutes")
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
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


if __name__ == "__main__":
    main()
