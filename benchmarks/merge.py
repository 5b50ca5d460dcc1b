"""Merging checkpoints beside mergekit (full models) and PEFT (adapters).

    OMP_NUM_THREADS=1 python benchmarks/merge.py [--mergekit PATH/TO/mergekit-yaml] [--rounds N]

mergekit pins older libraries: install it in an environment of its own and name its command. Both merge the same four
bfloat16 files with the shapes of SmolLM2-135M, each in a process of its own, imports included, and both results are
held against the exact mean.
Targets: at most half of mergekit's CPU time, private memory within the buffers + 150 MB for any size of model, and an
"svd" merge of LoRA adapters at least 20 times as fast as PEFT's at width 2048.
"""

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import peft
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from _timing import interleave, show
from weightsmith.average.low_rank import best_of_rank, stacked
from weightsmith.core.checkpoint import Checkpoint, write_checkpoint

WEIGHTS = [0.1234567, 0.2345678, 0.3141592, 0.3278163]  # round ones would bring ties, which anyone may round either way
CHUNK_MB = 16
OURS = """
import json, sys
from pathlib import Path
from weightsmith.average import merge_checkpoints
def private():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("RssAnon")) // 1024
Path(sys.argv[3]).write_text(str(private()))
folders = [f"{sys.argv[1]}/checkpoint-{i}" for i in range(4)]
merge_checkpoints(folders, sys.argv[2], weights=json.loads(sys.argv[4]), chunk_mb=float(sys.argv[5]), overwrite=True)
"""


@dataclass(frozen=True, slots=True)
class Cost:
    """What a process took: seconds and MB of private memory, as a whole and beyond what the imports took."""

    cpu: float
    wall: float
    private: int
    beyond: int | None


def write_models(folder: Path, layers: int) -> None:
    """Four checkpoints of random bfloat16 weights with the shapes of a small Llama."""
    width, inner, heads = 576, 1536, 192
    shapes = {"model.embed_tokens.weight": (49152, width), "model.norm.weight": (width,)}
    for layer in range(layers):
        stem = f"model.layers.{layer}"
        shapes |= {
            f"{stem}.self_attn.{n}_proj.weight": (o, width) for n, o in zip("qkv", (width, heads, heads), strict=True)
        }
        shapes |= {f"{stem}.self_attn.o_proj.weight": (width, width), f"{stem}.mlp.down_proj.weight": (width, inner)}
        shapes |= {f"{stem}.mlp.{n}_proj.weight": (inner, width) for n in ("gate", "up")}
        shapes |= {f"{stem}.{n}_layernorm.weight": (width,) for n in ("input", "post_attention")}
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
    }
    for index in range(4):
        draw = torch.Generator().manual_seed(index)
        tensors = ((name, 0.02 * torch.randn(shape, generator=draw)) for name, shape in shapes.items())
        path = write_checkpoint(((n, t.bfloat16()) for n, t in tensors), folder / f"checkpoint-{index}")
        (path / "config.json").write_text(json.dumps(config))


def cost(command: list[str], baseline: Path | None = None) -> Cost:
    """Run a process to its end; its private memory is sampled; ``baseline`` will say what it had after the imports."""
    before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    peak = 0
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            continue
        peak = max(
            [peak, *(int(line.split()[1]) // 1024 for line in status.splitlines() if line.startswith("RssAnon"))]
        )
        time.sleep(0.005)
    wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    if process.returncode:
        raise RuntimeError(process.stderr.read().decode() if process.stderr else "failed")
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(cpu, wall, peak, peak - int(baseline.read_text()) if baseline else None)


def ours(models: Path, out: Path) -> Cost:
    """Merge with the library."""
    baseline = out.with_suffix(".baseline")
    arguments = [str(models), str(out), str(baseline), str(WEIGHTS), str(CHUNK_MB)]
    return cost([sys.executable, "-c", OURS, *arguments], baseline)


def theirs(mergekit: str, models: Path, out: Path) -> Cost:
    """Merge with mergekit."""
    recipe = {
        "merge_method": "linear",
        "dtype": "bfloat16",
        "models": [
            {"model": str(models / f"checkpoint-{i}"), "parameters": {"weight": w}} for i, w in enumerate(WEIGHTS)
        ],
    }
    path = out.with_suffix(".yaml")
    path.write_text(json.dumps(recipe))  # JSON is YAML
    shutil.rmtree(out, ignore_errors=True)
    return cost([mergekit, str(path), str(out), "--no-copy-tokenizer", "--lazy-unpickle"])


def misroundings(models: Path, merged: Path) -> int:
    """Count the elements that differ from the float64 mean, rounded once."""
    sources, found = [Checkpoint(models / f"checkpoint-{i}") for i in range(4)], Checkpoint(merged)
    wrong = 0
    for name in found:
        exact = sum(w / sum(WEIGHTS) * source[name].double() for w, source in zip(WEIGHTS, sources, strict=True))
        wrong += int((found[name] != exact.bfloat16()).sum())
    return wrong


def full_models(mergekit: str | None, rounds: int, work: Path) -> None:
    """CPU time and private memory on the same files, and memory of a model three times as deep."""
    table = Table(title="four bfloat16 models, 269 MB each; fastest round in CPU time")
    for heading in ("", "CPU s", "wall s", "private MB", "of it beyond imports"):
        table.add_column(heading, justify="right" if heading else "left")
    write_models(work / "models", 30)
    costs: dict[str, list[Cost]] = {"weightsmith": [], "mergekit": []}
    for _ in range(rounds):
        costs["weightsmith"].append(ours(work / "models", work / "weightsmith"))
        if mergekit:
            costs["mergekit"].append(theirs(mergekit, work / "models", work / "mergekit"))
    for name, found in costs.items():
        if found:
            best = min(found, key=lambda one: one.cpu)
            table.add_row(name, f"{best.cpu:.2f}", f"{best.wall:.2f}", str(best.private), str(best.beyond or ""))
    misrounded = {name: misroundings(work / "models", work / name) for name, found in costs.items() if found}
    shutil.rmtree(work / "models")
    write_models(work / "models", 120)
    deep = ours(work / "models", work / "deep")
    size = (work / "deep" / "model.safetensors").stat().st_size // 2**20
    table.add_row(
        f"weightsmith, {size} MB each", f"{deep.cpu:.2f}", f"{deep.wall:.2f}", str(deep.private), str(deep.beyond)
    )
    Console().print(table)
    for name, wrong in misrounded.items():
        Console().print(f"{name}: {wrong} elements are not the bfloat16 nearest to the exact mean")


def adapters(width: int, count: int, rank: int, rounds: int) -> None:
    """One layer's ``svd`` merge beside PEFT's."""
    torch.manual_seed(0)
    model = peft.get_peft_model(
        nn.Sequential(nn.Linear(width, width, bias=False)), peft.LoraConfig(r=rank, target_modules=["0"]), "0"
    )
    for index in range(1, count):
        model.add_adapter(str(index), peft.LoraConfig(r=rank, target_modules=["0"]))
    layer = model.base_model.model[0]
    names = [str(index) for index in range(count)]
    with torch.no_grad():
        for name in names:
            layer.lora_B[name].weight.normal_()
    a = [layer.lora_A[name].weight.detach() for name in names]
    b = [layer.lora_B[name].weight.detach() for name in names]
    coefficients = [layer.scaling[name] / count for name in names]

    def of_peft() -> None:
        model.add_weighted_adapter(names, [1 / count] * count, "merged", combination_type="svd", svd_rank=rank)
        model.delete_adapter("merged")

    timings = interleave(
        {"PEFT": of_peft, "weightsmith": lambda: best_of_rank(*stacked(a, b, coefficients), rank)},
        rounds=rounds,
        warmup=1,
    )
    show(f"svd merge of {count} adapters of rank {rank}, one {width} x {width} layer", timings, baseline="PEFT")


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mergekit", default=shutil.which("mergekit-yaml"), help="the mergekit-yaml command")
    parser.add_argument("--rounds", type=int, default=3)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    with tempfile.TemporaryDirectory() as work:
        full_models(arguments.mergekit, arguments.rounds, Path(work))
    adapters(2048, count=8, rank=16, rounds=arguments.rounds)


if __name__ == "__main__":
    main()
