"""What the average of LCIA adds to a training step: time beside the authors' loop, and memory.

    OMP_NUM_THREADS=1 python benchmarks/lcia.py [--model FOLDER] [--rank N] [--rounds N]

Average: tensors in the shapes of LoRA factors. Step: forward, backward and AdamW of a language model with LoRA; the
default has the shapes of SmolLM2-135M with random weights, so that nothing is downloaded.
"""

import argparse
import copy
from collections.abc import Callable
from itertools import accumulate

import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import AutoModelForCausalLM, LlamaConfig

from _timing import interleave, show
from weightsmith.continual import DynamicEMA

TENSORS, RANK, WIDTH = 300, 16, 728  # 3.5 M parameters


def textbook(parameters: list[nn.Parameter], kappa: float) -> Callable[[], None]:
    """The rule tensor by tensor, with a number read back for each, as the authors' loop does it."""
    average = [p.detach().clone() for p in parameters]
    previous: list[torch.Tensor] = []

    def step() -> None:
        nonlocal previous
        for i, p in enumerate(parameters):
            alpha = 0.01
            if previous and p.grad is not None:
                a, b = (p.detach() - average[i]).abs().sum(), p.grad.abs().sum()
                raw = float(kappa * (1 + b) / (a * (p.grad - previous[i]).abs().sum()))
                alpha = raw if 0 < raw < 1 else alpha
            average[i] = (1 - alpha) * average[i] + alpha * p.detach()
        previous = copy.deepcopy([p.grad for p in parameters])

    return step


def compare_averages(rounds: int) -> None:
    """The authors' loop, the average here, and a fixed one of torch's fused operations."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(RANK, WIDTH) if i % 2 else (WIDTH, RANK) for i in range(TENSORS)]
    parameters = [nn.Parameter(torch.randn(shape, generator=generator)) for shape in shapes]
    for p in parameters:
        p.grad = torch.randn(p.shape, generator=generator)
    ema = DynamicEMA(parameters, kappa=0.5)
    fixed, live = [p.detach().clone() for p in parameters], [p.detach() for p in parameters]
    calls: dict[str, Callable[[], object]] = {
        "tensor by tensor": textbook(parameters, 0.5),
        "DynamicEMA": ema.step,
        "fixed, foreach lerp": lambda: torch._foreach_lerp_(fixed, live, 0.01),
    }
    show(f"Average: {TENSORS} tensors, 3.5 M parameters", interleave(calls, rounds=rounds), baseline="tensor by tensor")


def compare_steps(folder: str, rank: int, rounds: int) -> None:
    """A step of LoRA without an average and with it."""
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32) if folder else _smollm2()
    settings = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(base, settings).train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    ids = torch.randint(1000, (8, 64), generator=torch.Generator().manual_seed(0))
    ema = DynamicEMA(model, kappa=0.01)

    def step(averaged: bool) -> None:
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        if averaged:
            ema.step()
        optimizer.zero_grad()

    def without_gradients_cleared() -> None:
        model(input_ids=ids, labels=ids).loss.backward()

    timings = interleave({"step": lambda: step(False), "step and average": lambda: step(True)}, rounds=rounds, warmup=1)
    show(f"LoRA of rank {rank}, batch of 8 x 64 tokens", timings, baseline="step")
    without_gradients_cleared()
    alone = interleave({"average": ema.step}, rounds=rounds)["average"]
    size = sum(p.nbytes for p in trained)
    print(f"average alone: {alone.min * 1e3:.1f} ms, {alone.min / timings['step'].min:.1%} of a step")
    print(f"{len(trained)} tensors, {size / 2**20:.1f} MiB; state {ema.nbytes / size:.2f} copies of them,")
    print(f"and {extra_memory(ema.step) / size:.2f} while a step runs")


def extra_memory(step: Callable[[], object]) -> float:
    """Most bytes that a step has allocated at once."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = recorded.profiler.kineto_results.events()
    return max(accumulate(event.nbytes() for event in events if event.name() == "[memory]"))


def _smollm2() -> nn.Module:
    config = LlamaConfig(
        vocab_size=49152, hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9,
        num_key_value_heads=3, tie_word_embeddings=True, use_cache=False,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config)


def main() -> None:
    """Print both tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="", help="folder of a causal language model")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=10)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    compare_averages(arguments.rounds)
    compare_steps(arguments.model, arguments.rank, max(3, arguments.rounds // 3))


if __name__ == "__main__":
    main()
