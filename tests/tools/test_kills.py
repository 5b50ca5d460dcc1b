"""Commands that are killed while they replace a folder: it is wholly the old one or wholly the new one."""

import json
import os
import random
import shutil
import signal
import time

import pytest
import torch
from rich.console import Console
from safetensors.torch import save_file

from weightsmith.tools.merge import merge
from weightsmith.tools.quantize import REPORT, quantize

KILLS = 20


def killed(command, seconds):
    """Run a command in a copy of this process and kill it after a time; whether it was still running then."""
    child = os.fork()
    if child == 0:
        try:
            command()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def content(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def kill_often(command, out, old, is_new, most):
    """Kill a command at random times within its run until that has worked often enough, and look at its target."""
    draw = random.Random(0)
    kills = news = 0
    while kills < KILLS:
        kills += killed(command, draw.uniform(0, most))
        assert out.is_dir()
        if content(out) != old:
            assert is_new(out)
            news += 1
            shutil.rmtree(out)
            for name, data in old.items():
                (out / name).parent.mkdir(parents=True, exist_ok=True)
                (out / name).write_bytes(data)
    return news


def timed(command):
    started = time.perf_counter()
    command()
    return time.perf_counter() - started


@pytest.mark.slow
def test_a_killed_merge_leaves_the_old_folder_or_the_new_one(tmp_path):
    for i in range(1, 5):
        folder = tmp_path / "run" / f"checkpoint-{i}"
        folder.mkdir(parents=True)
        save_file({f"{n}": torch.full((200, 500), float(i)) for n in range(8)}, folder / "model.safetensors")
        (folder / "config.json").write_text("{}")
    place = tmp_path / "place"
    out = place / "out"

    def command(last=2):
        merge((tmp_path / "run",), out=out, scheme="uniform", last=last, overwrite=True)

    most = timed(command)
    new = content(out)
    command(3)
    old = content(out)
    assert new != old
    kill_often(command, out, old, lambda folder: content(folder) == new, 1.1 * most)
    command()
    assert content(out) == new
    assert [path.name for path in place.iterdir()] == ["out"]


@pytest.mark.slow
def test_a_killed_quantize_leaves_the_old_folder_or_the_new_one(tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).save_pretrained(tmp_path / "model")
    place = tmp_path / "place"
    out = place / "out"

    def command(bits=3):
        quantize(
            tmp_path / "model", out=out, method="rtn", bits=bits, format="weightsmith", console=Console(quiet=True)
        )

    def weights(folder):
        return {name: data for name, data in content(folder).items() if name != REPORT}

    command()  # once for what is only slow the first time
    most = timed(command)
    new = weights(out)
    command(4)
    old = content(out)

    def is_new(folder):
        return weights(folder) == new and json.loads((folder / REPORT).read_text())["settings"]["grid"]["bits"] == 3

    kill_often(command, out, old, is_new, 1.1 * most)
    command()
    assert is_new(out)
    assert [path.name for path in place.iterdir()] == ["out"]
