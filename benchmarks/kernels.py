"""The tangent kernel beside the torch.func formulation and one backward pass per output: time and peak memory.

    OMP_NUM_THREADS=1 python benchmarks/kernels.py [--units N] [--rounds N] [--skip-loop]

The network is that of the experiment: ReLU units without biases, 8 steps, 3 outputs per step, 32 samples, so 768 rows;
the kernel of the recurrent matrix alone. Every peak is of a process of its own, beyond what it had before the call.
"""

import argparse
import resource
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vmap

from _timing import interleave, show
from weightsmith.diagnose import KernelOptions, plan_kernel, tangent_kernel
from weightsmith.experiments.decisions import Rnn

SAMPLES, STEPS, CHANNELS, OUTPUTS = 32, 8, 3, 3
NAME = "hidden.weight"


def network(units: int) -> tuple[Rnn, Tensor]:
    """The network and its inputs."""
    torch.manual_seed(0)
    return Rnn(CHANNELS, units, OUTPUTS), torch.randn(SAMPLES, STEPS, CHANNELS)


def torch_func(model: Rnn, x: Tensor) -> Tensor:
    """Jacobian contraction as in torch's tutorial on tangent kernels: per sample, all of J at once."""
    params = {NAME: model.hidden.weight.detach()}

    def outputs(values: dict[str, Tensor], one: Tensor) -> Tensor:
        return functional_call(model, values, (one[None],)).squeeze(0)

    j = vmap(jacrev(outputs), (None, 0))(params, x)[NAME].flatten(3)
    j = j.flatten(1, 2)
    return torch.einsum("nkp,mlp->nkml", j, j).reshape(len(x) * j.shape[1], -1)


def one_by_one(model: Rnn, x: Tensor) -> Tensor:
    """A backward pass per output of each sample, each row put under those before it: what the authors do."""
    j = x.new_empty(0, model.hidden.weight.numel())
    for value in model(x).flatten():
        row = torch.autograd.grad(value, model.hidden.weight, retain_graph=True)[0].flatten()
        j = torch.cat([j, row[None]])
    return j @ j.T


def ours(method: str, budget: int = 2**30) -> Callable[[Rnn, Tensor], Tensor]:
    """One of our methods; a sketch without forming the kernel."""
    options = KernelOptions(method=method, budget=budget)  # type: ignore[arg-type]

    def call(model: Rnn, x: Tensor) -> Tensor:
        kernel = tangent_kernel(model, x, params=NAME, options=options)
        return kernel.parts[""] if method == "sketch" else kernel.matrix

    return call


WAYS: dict[str, Callable[[Rnn, Tensor], Tensor]] = {
    "torch.func": torch_func,
    "jacobian": ours("jacobian"),
    "jacobian, 32 MB": ours("jacobian", 32 * 10**6),
    "contract": ours("contract"),
    "sketch, 512 directions": ours("sketch"),
    "one by one": one_by_one,
}


def peak(way: str, units: int) -> None:
    """Print the peak memory of a call, in MB beyond what there was."""
    model, x = network(units)
    WAYS[way](Rnn(CHANNELS, 8, OUTPUTS), x[:2])  # libraries are loaded and caches filled
    status = Path("/proc/self/statm")
    page = resource.getpagesize()
    before = most = int(status.read_text().split()[1]) * page
    done = threading.Event()

    def watch() -> None:
        nonlocal most
        while not done.is_set():
            most = max(most, int(status.read_text().split()[1]) * page)
            time.sleep(0.001)

    watcher = threading.Thread(target=watch)
    watcher.start()
    WAYS[way](model, x)
    done.set()
    watcher.join()
    print(f"{(most - before) / 1e6:.1f}")


def main() -> None:
    """Check, time and weigh all ways."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--units", type=int, default=100)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--skip-loop", action="store_true", help="leave out the pass per output, which takes longest")
    parser.add_argument("--peak", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        peak(options.peak, options.units)
        return
    torch.set_num_threads(1)
    model, x = network(options.units)
    ways = {name: way for name, way in WAYS.items() if not (options.skip_loop and name == "one by one")}
    expected = torch_func(model, x)
    for name, way in ways.items():
        if name.startswith("sketch"):
            continue
        error = float((way(model, x).detach() - expected).norm() / expected.norm())
        assert error < 1e-5, (name, error)
    print(plan_kernel(model, x, params=NAME))
    calls = {name: (lambda way=way: way(model, x)) for name, way in ways.items()}
    timed = interleave(calls, rounds=options.rounds, warmup=1)
    show(f"{options.units} units, {len(expected)} rows", timed, baseline="torch.func")
    rows, width = len(expected), options.units**2
    print(f"all of J: {rows * width * 4 / 1e6:.1f} MB; the kernel: {rows**2 * 4 / 1e6:.1f} MB")
    for name in ways:
        words = [sys.executable, __file__, "--peak", name, "--units", str(options.units)]
        found = subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip()
        print(f"peak of {name}: {found} MB")


if __name__ == "__main__":
    main()
