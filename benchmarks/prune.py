"""Pruning the published PromptIR (35.6 M parameters) beside ``torch.nn.utils.prune.global_unstructured``.

Also: what masking costs per training step, and how large a sparse file is beside its formula.
"""

import argparse
import copy
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from torch.nn.utils import prune as torch_prune

from _timing import interleave, show
from weightsmith.lab.models.promptir import PromptIR
from weightsmith.prune import MagnitudePruner, save_sparse
from weightsmith.prune.targets import find_weights


def peak_extra(call: Callable[[], object]) -> float:
    """Largest resident memory while it runs above that before, MiB; sampled every millisecond."""
    found, stop = [_resident()], threading.Event()

    def watch() -> None:
        while not stop.is_set():
            found.append(_resident())
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    call()
    stop.set()
    watcher.join()
    return (max(found) - found[0]) / 2**20


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def ours(model: nn.Module) -> MagnitudePruner:
    """Prune 20 % globally."""
    pruner = MagnitudePruner(model)
    pruner.prune_(0.2)
    return pruner


def theirs(model: nn.Module) -> None:
    """The same with torch's own function, on the same weights."""
    slots, _ = find_weights(model, None)
    layers = [(slot.module, slot.attribute) for slot in slots.values()]
    torch_prune.global_unstructured(layers, torch_prune.L1Unstructured, amount=0.2)


def main() -> None:
    """Run all three measurements."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--dim", type=int, default=48, help="width of the network")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    model = PromptIR(options.dim)
    # first of all: later calls would be served from memory that earlier ones gave back
    one, other = copy.deepcopy(model), copy.deepcopy(model)
    print(f"peak extra memory, MiB: MagnitudePruner {peak_extra(lambda: ours(one)):.0f}", end=", ")
    print(f"torch.nn.utils.prune {peak_extra(lambda: theirs(other)):.0f}")
    # every call prunes a network that nothing has pruned before; copying it is not timed
    fresh = [copy.deepcopy(model) for _ in range(2 * (options.rounds + 1))]
    calls = {
        "torch.nn.utils.prune": lambda: theirs(fresh.pop()),
        "MagnitudePruner": lambda: ours(fresh.pop()),
    }
    show(
        "Prune 20 % of all weights", interleave(calls, rounds=options.rounds, warmup=1), baseline="torch.nn.utils.prune"
    )
    x = torch.rand(1, 3, 64, 64)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    pruner = ours(model)

    def step() -> None:
        optimizer.zero_grad()
        (model(x) - x).abs().mean().backward()
        optimizer.step()

    both = {"training step": step, "masking": pruner.apply_}
    show(
        "Masks beside a training step, 1 image of 64 x 64",
        interleave(both, rounds=3, warmup=1),
        baseline="training step",
    )

    with tempfile.TemporaryDirectory() as folder:
        size = save_sparse(model, Path(folder) / "m.safetensors", masks=pruner.masks).stat().st_size
    report = pruner.report()
    formula = sum(t.numel * (1 / 8 + 4 * t.density) if t.prunable else 4 * t.numel for t in report.tensors)
    print(f"sparse file {size / 2**20:.2f} MiB, formula {formula / 2**20:.2f} MiB, ratio {size / formula:.4f}")


if __name__ == "__main__":
    main()
