"""Log-probabilities and entropies of sampled tokens: our fused head beside full logits and beside TRL's chunks.

    OMP_NUM_THREADS=1 python benchmarks/logprob.py [--rows N] [--vocabulary V] [--rounds R]

Forward and backward, with gradients of hidden states and head, one thread. Time is that of the CPU, so that other
processes disturb less; memory is the largest resident size of a fresh process above its set-up.
"""

import argparse
import resource
import subprocess
import sys
import time
from collections.abc import Callable

import torch

from weightsmith.reweight import fused_linear_logprob

WIDTH = 576
FULL, OURS, TRL = "full logits", "ours", "TRL's chunks"


def full_logits(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """What everybody writes first."""
    log_p = (hidden @ weight.T).log_softmax(-1)
    with torch.no_grad():
        (log_p.exp() * log_p).sum(-1).neg()
    return log_p.gather(1, targets[:, None])[:, 0]


def ours(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """With entropy and second moment."""
    return fused_linear_logprob(hidden, weight, targets, return_second_moment=True)[0]


def trl_chunks(hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """TRL's function with its own tile sizes, log-probability and entropy."""
    from trl.trainer import utils

    outputs = ("log_probs", "entropy")
    size = utils._CHUNKED_LOGPROB_CHUNK_SIZE
    return utils._ChunkedLogProbFunction.apply(hidden, weight, None, targets, 1.0, size, None, 1.0, outputs)[0]


VARIANTS: dict[str, Callable[..., torch.Tensor]] = {FULL: full_logits, OURS: ours, TRL: trl_chunks}


def measure(name: str, rows: int, vocabulary: int, rounds: int) -> tuple[float, float]:
    """Least CPU seconds of a forward and backward pass, and MB above the set-up."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(rows, WIDTH, generator=generator).requires_grad_()
    weight = torch.randn(vocabulary, WIDTH, generator=generator).mul_(0.02).requires_grad_()
    targets = torch.randint(vocabulary, (rows,), generator=generator)
    few = weight[:8].detach().requires_grad_()
    VARIANTS[name](hidden[:2].detach().requires_grad_(), few, targets[:2] % 8).sum().backward()  # imports, threads
    weight.grad = None
    before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
    for _ in range(rounds):
        hidden.grad = weight.grad = None
        start = time.process_time()
        VARIANTS[name](hidden, weight, targets).sum().backward()
        seconds.append(time.process_time() - start)
    return min(seconds), (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=2048)
    parser.add_argument("--vocabulary", type=int, default=49152)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", choices=list(VARIANTS))
    arguments = parser.parse_args()
    if arguments.only:
        print(*measure(arguments.only, arguments.rows, arguments.vocabulary, arguments.rounds))
        return
    found = {}
    for name in VARIANTS:
        again = [sys.executable, __file__, "--only", name, "--rounds", str(arguments.rounds)]
        again += ["--rows", str(arguments.rows), "--vocabulary", str(arguments.vocabulary)]
        line = subprocess.run(again, check=True, capture_output=True, text=True).stdout.split()
        found[name] = float(line[-2]), float(line[-1])
    print(f"{arguments.rows} rows, vocabulary {arguments.vocabulary}, width {WIDTH}, forward and backward")
    for name, (seconds, memory) in found.items():
        times, space = seconds / found[FULL][0], memory / found[FULL][1]
        print(f"{name:14} {seconds:7.2f} CPU-s  {times:5.2f}x   {memory:7.0f} MB  {space:5.2f}x")
    print(f"ours / TRL: {found[OURS][0] / found[TRL][0]:.2f}x the time; targets: 1.05x full, 0.75x TRL, 0.15x memory")


if __name__ == "__main__":
    main()
