"""What a step of FlexRound costs on one block of a language model, beside auto-round and beside plain operations.

The block has the shape of SmolLM2's (hidden 576, 9 heads, 3 key-value heads, intermediate 1536), 4 bits per channel. A
step is rounding all weights, forward, loss, backward, optimizer and schedule. The auto-round arms are put together from
its own wrapper, quantization function (also compiled, its default) and SignSGD; its copy of the best parameters is left
out. Peak memory is that of a process that makes steps of one arm only, above the process before its first step.

    OMP_NUM_THREADS=1 python benchmarks/flexround.py
    OMP_NUM_THREADS=1 python benchmarks/flexround.py --model FOLDER --data FOLDER [--bits 3] [--lr 3e-3] [--seeds 3]

The second form rounds a whole causal language model by each, to the same grid, from the same windows of the texts in
``train.jsonl`` and in the same number of steps, and shows the perplexity on ``test.jsonl``.

For the auto-round arms: ``pip install --no-deps auto-round py-cpuinfo pydantic pydantic-core annotated-types
typing-inspection``. Targets: a step at most as long as auto-round's; the weight path at least 1.5 times as fast as
plain operations.
"""

import argparse
import math
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from _timing import interleave, show
from weightsmith.core.rounding import round_ste
from weightsmith.experiments.auto_round import auto_round_, installed
from weightsmith.quantize import FlexRound, Grid, flexround_, round_to_nearest_
from weightsmith.quantize.after_training.rtn import RoundToNearest
from weightsmith.quantize.after_training.targets import choose_targets, written
from weightsmith.tools.quantize.calibration import read_texts

SHAPES = ((2, 256), (2, 1024))
ROUNDS = 10
GRID = Grid(4, search="minmax")
LR = 1e-3
AUTO_ROUND = installed()
WINDOWS, LENGTH, BATCH = 64, 128, 2  # calibration of a whole model

Step = Callable[[], object]


class Unfused(FlexRound):
    """The same rounding with autograd through plain operations."""

    def soft(self, units: Tensor) -> Tensor:
        """The rounded weight."""
        s1 = self.scale * self.log_s1.exp()
        divisor = (self.log_s1 + self.log_S2 + self.log_s3).exp()
        return s1 * round_ste(units / divisor).clamp(*self.limits)


COMPILED = partial(FlexRound, compiled=True)


def tokens_of(tokenizer: Any, folder: str, split: str, count: int, length: int) -> Tensor:
    """Windows ``(count, length)`` from the beginning of a file's texts."""
    texts = read_texts(Path(folder) / f"{split}.jsonl")
    return tokenizer("\n\n".join(texts), return_tensors="pt").input_ids[0, : count * length].view(count, length)


def block() -> nn.Module:
    """A decoder layer with random weights."""
    torch.manual_seed(0)
    return LlamaDecoderLayer(config(), layer_idx=0).eval().requires_grad_(False)


def config() -> LlamaConfig:
    """SmolLM2-135M's."""
    return LlamaConfig(
        hidden_size=576,
        intermediate_size=1536,
        num_attention_heads=9,
        num_key_value_heads=3,
        max_position_embeddings=2048,
        attn_implementation="sdpa",
    )


def data(batch: int, length: int) -> tuple[Tensor, dict[str, tuple[Tensor, Tensor]]]:
    """Hidden states and the rotary tables of their positions."""
    torch.manual_seed(1)
    x = torch.randn(batch, length, 576)
    return x, {"position_embeddings": LlamaRotaryEmbedding(config())(x, torch.arange(length)[None])}


def ours(kind: Callable[..., FlexRound], batch: int, length: int) -> Step:
    """One step of `flexround_`."""
    module, (x, options) = block(), data(batch, length)
    target = module(x, **options)
    layers = choose_targets(module, None)
    roundings = {name: kind(layer.weight, GRID) for name, layer in layers.items()}
    units = {name: rounding.units(layers[name].weight) for name, rounding in roundings.items()}
    optimizer = torch.optim.Adam([p for r in roundings.values() for p in r.parameters()], lr=LR, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 5000)

    def step() -> None:
        values = {
            name: rounding.join(rounding.soft(units[name]), layers[name].weight) for name, rounding in roundings.items()
        }
        with written(layers, values):
            loss = F.mse_loss(module(x, **options), target) * length
        loss.item()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()

    return step


def auto_round(compiled: bool, batch: int, length: int) -> Step:
    """One step of auto-round, W4 asymmetric per channel."""
    from auto_round.algorithms.quantization.sign_round.sign_sgd import SignSGD
    from auto_round.wrapper import wrapper_block

    module, (x, options) = block(), data(batch, length)
    target = module(x, **options)
    for inner in module.modules():
        if isinstance(inner, nn.Linear):
            settings = {"bits": 4, "group_size": -1, "sym": False, "data_type": "int", "scale_dtype": torch.float32}
            for name, value in {**settings, "act_bits": 16, "act_dynamic": True}.items():
                setattr(inner, name, value)
    wrapper_block(module, True, False, enable_torch_compile=compiled, device="cpu")
    params = [p for inner in module.modules() if hasattr(inner, "orig_layer") for p in inner.params.values()]
    optimizer = SignSGD([{"params": params}], lr=torch.tensor(LR), weight_decay=0)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, 5000)

    def step() -> None:
        loss = F.mse_loss(module(x, **options), target)
        loss.item()
        (loss * 1000).backward()
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()

    return step


def weight_path(kind: Callable[..., FlexRound]) -> Step:
    """Rounding all weights of the block, and its backward pass, alone."""
    weights = [inner.weight for inner in block().modules() if isinstance(inner, nn.Linear)]
    roundings = [kind(weight, GRID) for weight in weights]
    units = [rounding.units(weight) for rounding, weight in zip(roundings, weights, strict=True)]
    upstream = [torch.randn_like(unit) for unit in units]

    def step() -> None:
        for rounding, unit, grad in zip(roundings, units, upstream, strict=True):
            rounding.zero_grad()
            rounding.soft(unit).backward(grad)

    return step


def arms(batch: int, length: int) -> dict[str, Callable[[], Step]]:
    """What is compared, by name."""
    found: dict[str, Callable[[], Step]] = {
        "FlexRound": lambda: ours(FlexRound, batch, length),
        "FlexRound, compiled": lambda: ours(COMPILED, batch, length),
        "FlexRound, plain operations": lambda: ours(Unfused, batch, length),
    }
    if AUTO_ROUND:
        found["auto-round"] = lambda: auto_round(False, batch, length)
        found["auto-round, compiled"] = lambda: auto_round(True, batch, length)
    return found


def resident(key: str) -> float:
    """Resident memory of this process in MB: now (``VmRSS``) or at its peak (``VmHWM``)."""
    with open("/proc/self/status") as file:  # noqa: PTH123  (no file in the usual sense)
        return next(int(line.split()[1]) for line in file if line.startswith(key)) / 1024


def peak_of(name: str, batch: int, length: int) -> None:
    """Print how far the memory of this process rises in three steps of one arm."""
    step = arms(batch, length)[name]()
    before = resident("VmRSS")
    for _ in range(3):
        step()
    print(f"{resident('VmHWM') - before:.0f}")


def whole_model(folder: str, data: str, bits: int, lr: float, iterations: int, seeds: int) -> None:
    """Print the perplexity that each method leaves, and how long it took."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    windows = tokens_of(tokenizer, data, "train", WINDOWS, LENGTH)
    tested = tokens_of(tokenizer, data, "test", 12, 256)
    grid = Grid(bits, search="minmax")
    options = {"iterations": iterations, "lr": lr, "batch_size": BATCH}

    def fresh() -> Any:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def perplexity(model: Any) -> float:
        with torch.inference_mode():
            losses = [model(input_ids=window[None], labels=window[None]).loss for window in tested]
        return math.exp(torch.stack(losses).mean())

    def by_flexround(model: Any, calibration: Tensor, seed: int) -> Any:
        flexround_(model, calibration, grid, seed=seed, **options)
        return model

    def by_auto_round(model: Any, calibration: Tensor, seed: int) -> Any:
        given = {"tokenizer": tokenizer, "iterations": iterations, "batch_size": BATCH, "seed": seed}
        return auto_round_(model, {"input_ids": calibration}, grid, **given).model

    methods: dict[str, Callable[[Any, Tensor, int], Any]] = {"FlexRound": by_flexround}
    if AUTO_ROUND:
        methods["auto-round"] = by_auto_round
    nearest = fresh()
    round_to_nearest_(nearest, windows[:BATCH], grid)
    print(f"perplexity: trained {perplexity(fresh()):.3f}, rounded to nearest {perplexity(nearest):.3f}")
    table = Table("", "perplexity by seed", "mean", "seconds", title=f"{bits} bits, {iterations} steps for each block")
    for name, rounded in methods.items():
        found, seconds = [], []
        for seed in range(seeds):
            order = torch.randperm(len(windows), generator=torch.Generator().manual_seed(seed))
            model, start = fresh(), time.perf_counter()
            model = rounded(model, windows[order], seed)
            seconds.append(time.perf_counter() - start)
            found.append(perplexity(model))
        each = "  ".join(f"{value:.3f}" for value in found)
        table.add_row(name, each, f"{statistics.mean(found):.3f}", f"{min(seconds):.0f}")
    Console().print(table)


def main() -> None:
    """Time every arm, measure its memory and show the tables; or compare what they make of a whole model."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--model", help="folder of a causal language model")
    parser.add_argument("--data", help="folder with train.jsonl and test.jsonl")
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--lr", type=float, default=LR, help="FlexRound's")
    parser.add_argument("--iterations", type=int, default=100)
    parser.add_argument("--seeds", type=int, default=3)
    given = parser.parse_args()
    if given.peak:
        name, *shape = given.peak
        return peak_of(name, *map(int, shape))
    torch.set_num_threads(1)
    if given.model:
        return whole_model(given.model, given.data, given.bits, given.lr, given.iterations, given.seeds)
    weights = {
        "fused": weight_path(FlexRound),
        "compiled": weight_path(COMPILED),
        "plain operations": weight_path(Unfused),
    }
    show(
        "weight path: 3.5 M weights, forward and backward",
        interleave(weights, rounds=3 * ROUNDS),
        baseline="plain operations",
    )
    baseline = "auto-round" if "auto-round" in arms(2, 2) else "FlexRound, plain operations"
    for batch, length in SHAPES:
        made = {name: make() for name, make in arms(batch, length).items()}
        show(f"a step, {batch} x {length} tokens", interleave(made, rounds=ROUNDS), baseline=baseline)
        del made
        for name in arms(batch, length):
            command = [sys.executable, __file__, "--peak", name, str(batch), str(length)]
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            found = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
            print(f"peak memory above start, {batch} x {length} tokens, {name}: {found.stdout.split()[-1]} MB")
    values = block().mlp.up_proj.weight
    searches = {
        search: (lambda search=search: RoundToNearest(values, Grid(4, search=search)))
        for search in ("minmax", "shrink", "search")
    }
    show("finding the steps of a 1536 x 576 matrix, 4 bits", interleave(searches, rounds=3), baseline="shrink")


if __name__ == "__main__":
    main()
