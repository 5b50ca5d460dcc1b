"""Forward and backward of one adapted linear layer beside PEFT's, at equal numbers of trained parameters.

    OMP_NUM_THREADS=1 python benchmarks/bone.py [--sizes 2048x2048 ...] [--tokens N] [--rounds N]
    OMP_NUM_THREADS=1 python benchmarks/bone.py --model FOLDER    # whole training steps of a causal language model

Saved: what autograd keeps between the two passes, in MiB, without the parameters themselves.
"""

import argparse
import math
from collections.abc import Callable

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from _timing import Timing, interleave
from _timing import show as show_ratios
from weightsmith.adapt import BoneConfig, accelerate_peft_, apply_bone_
from weightsmith.lab.machine import saved_activations

R = 64


def layer(width: int, out: int) -> nn.Sequential:
    """One frozen linear layer, the same each time."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(width, out, bias=False)).requires_grad_(False)


def contenders(width: int, out: int) -> dict[str, nn.Module]:
    """The layer plain, under PEFT's adapters and under ours."""
    one = {"target_modules": ["0"]}
    lora = peft.LoraConfig(r=max(1, round(R * width / (width + out))), lora_dropout=0.0, **one)
    miss, bat = peft.MissConfig(r=R, **one), peft.MissConfig(r=R, init_weights="bat", **one)
    return {
        "frozen": layer(width, out),
        "LoRA (PEFT)": peft.get_peft_model(layer(width, out), lora),
        "miss (PEFT)": peft.get_peft_model(layer(width, out), miss),
        "miss": apply_bone_(layer(width, out), BoneConfig(r=R)),
        "miss (PEFT, accelerated)": accelerate_peft_(peft.get_peft_model(layer(width, out), miss)),
        "row": apply_bone_(layer(width, out), BoneConfig(r=R, variant="row")),
        "bat (PEFT)": peft.get_peft_model(layer(width, out), bat),
        "col": apply_bone_(layer(width, out), BoneConfig(r=R, variant="col")),
        "bat (PEFT, accelerated)": accelerate_peft_(peft.get_peft_model(layer(width, out), bat)),
    }


def step(model: nn.Module, x: Tensor, dy: Tensor) -> Callable[[], object]:
    """One pass forward and one back, the gradient of the input included."""
    return lambda: model(x).backward(dy)


def saved_mib(model: nn.Module, x: Tensor) -> float:
    """What autograd keeps, each storage once, the model's own left out."""
    with saved_activations(model) as kept:
        y = model(x)
    del y
    return sum(kept.values()) / 2**20


def show(title: str, timings: dict[str, Timing], saved: dict[str, float]) -> None:
    """Print times, ratios to the frozen layer and to the peer, and what is saved."""
    peers = {"row": "LoRA (PEFT)", "miss": "miss (PEFT)", "col": "bat (PEFT)"}
    peers |= {f"{name} (PEFT, accelerated)": f"{name} (PEFT)" for name in ("miss", "bat")}
    table = Table(title=title)
    for heading in ("", "min ms", "median ms", "to frozen", "to its peer: min", "median", "saved MiB", "of its peer's"):
        table.add_column(heading, justify="right" if heading else "left")
    for name, timing in timings.items():
        peer = peers.get(name, name)
        table.add_row(
            name,
            f"{1e3 * timing.min:.2f}",
            f"{1e3 * timing.median:.2f}",
            f"{timing.min / timings['frozen'].min:.2f}x",
            f"{timing.min / timings[peer].min:.2f}x",
            f"{timing.median / timings[peer].median:.2f}x",
            f"{saved[name]:.2f}",
            f"1/{saved[peer] / saved[name]:.1f}" if saved[name] else "",
        )
    Console(width=max(120, Console().width)).print(table)


def training(model: nn.Module, tokens: Tensor) -> Callable[[], object]:
    """A whole step of AdamW on what trains."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4)

    def run() -> None:
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()

    return run


def whole_model(folder: str, batch: int, length: int, rounds: int) -> None:
    """Print the steps of one model under every adapter, put on all its linear layers but the head."""
    from transformers import AutoModelForCausalLM

    def load() -> nn.Module:
        return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    first = load()
    targets = [
        n for n, m in first.named_modules() if isinstance(m, nn.Linear) and m is not first.get_output_embeddings()
    ]
    one = {"target_modules": targets}
    models = {
        "LoRA (PEFT)": peft.get_peft_model(first, peft.LoraConfig(r=R // 2, **one)),
        "miss (PEFT)": peft.get_peft_model(load(), peft.MissConfig(r=R, **one)),
        "bat (PEFT)": peft.get_peft_model(load(), peft.MissConfig(r=R, init_weights="bat", **one)),
        **{v: apply_bone_(load(), BoneConfig(r=R, variant=v, where=targets)) for v in ("miss", "row", "col")},
    }
    tokens = torch.randint(1000, (batch, length))
    timings = interleave({n: training(m, tokens) for n, m in models.items()}, rounds=rounds, warmup=1)
    show_ratios(f"a training step, {batch} x {length} tokens", timings, baseline="LoRA (PEFT)")


def main() -> None:
    """Print one table per size, or one for a model."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["576x576", "576x1536", "2048x2048", "2048x8192"])
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--model")
    arguments = parser.parse_args()
    if arguments.model:
        return whole_model(arguments.model, 4, arguments.tokens // 4, 5)
    for size in arguments.sizes:
        width, out = map(int, size.split("x"))
        x, dy = torch.randn(arguments.tokens, width, requires_grad=True), torch.randn(arguments.tokens, out)
        models = contenders(width, out)
        trained = {name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in models.items()}
        saved = {name: saved_mib(model, x) for name, model in models.items()}
        rounds = math.ceil(arguments.rounds * max(1, 2**22 / (width * out)))
        timings = interleave({name: step(model, x, dy) for name, model in models.items()}, rounds=rounds)
        title = f"{width} to {out}, {arguments.tokens} tokens, {torch.get_num_threads()} threads; trained: "
        show(
            title + ", ".join(f"{n} {c}" for n, c in trained.items() if n in ("LoRA (PEFT)", "row", "miss")),
            timings,
            saved,
        )


if __name__ == "__main__":
    main()
