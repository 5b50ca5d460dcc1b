"""The chains that the documentation promises, run from the page itself and checked by other means."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import weightsmith as ws
from weightsmith import cli

PAGE = (Path(__file__).parents[2] / "docs" / "composes.md").read_text()
BLOCK = re.compile(r"^```(python|py|bash)\n(.*?)^```", re.MULTILINE | re.DOTALL)


def run(heading, **names):
    """Run a section of the page, its shell commands too, and return its variables."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    for language, text in BLOCK.findall(section):
        if language == "bash":
            for line in text.splitlines():
                with pytest.raises(SystemExit) as ended:
                    cli.main(shlex.split(line)[1:])
                assert ended.value.code == 0
        else:
            exec(compile(text, heading, "exec"), names)
    return names


def test_companded_training_ends_in_onnxruntime(tmp_path, monkeypatch):
    pytest.importorskip("onnxscript")
    monkeypatch.chdir(tmp_path)
    names = run("From companded training to onnxruntime")
    plain, x, y, logits = (names[key] for key in ("plain", "x", "y", "logits"))
    assert [key for key, _ in plain.named_parameters()] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert logits.shape == (96, 3)
    torch.testing.assert_close(torch.from_numpy(logits), plain(x).detach(), rtol=1e-4, atol=1e-4)
    assert (torch.from_numpy(logits).argmax(1) == y).float().mean() > 0.8
    averaged = names["average"].module
    assert len(ws.quantize.quantized_weights(plain)) == 2
    assert averaged is plain


@pytest.fixture
def base(tmp_path, monkeypatch):
    """A folder with a small language model, and rows to train it on."""
    import transformers

    torch.manual_seed(0)
    shape = {"vocab_size": 17, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    config = transformers.LlamaConfig(**shape, num_attention_heads=2, max_position_embeddings=16)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    ids = torch.arange(8).repeat(16, 1)
    return [{"input_ids": row, "labels": row} for row in ids]


def logits_of(model):
    with torch.no_grad():
        return model.eval()(torch.arange(8)[None]).logits


def test_an_adapter_under_trainer_ends_in_plain_transformers(base):
    import transformers

    peft = pytest.importorskip("peft")
    names = run("From an adapter under Trainer to plain transformers", rows=base)
    load = transformers.AutoModelForCausalLM.from_pretrained
    merged = load("merged")
    name = "model.layers.0.self_attn.q_proj.weight"
    start, got = (model.get_parameter(name).detach() for model in (load("base"), merged))
    assert not torch.equal(got, start)
    members = [
        peft.PeftModel.from_pretrained(load("base"), f"run/checkpoint-{step}").merge_and_unload().get_parameter(name)
        for step in (2, 4, 6, 8)
    ]
    updates = torch.stack([(member.detach() - start).flatten().double() for member in members], 1)
    shares = torch.linalg.lstsq(updates, (got - start).flatten().double()).solution
    assert ((shares > 0) & (shares < 1)).all()
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close((updates @ shares).float().view_as(got), got - start, rtol=1e-4, atol=1e-6)
    ws.quantize.round_to_nearest_(merged, grid=ws.quantize.Grid(4, search="minmax"))
    torch.testing.assert_close(logits_of(names["small"]), logits_of(merged), rtol=1e-3, atol=1e-3)


AGAIN = """
import torch, weightsmith as ws
data = torch.load("data.pt")
fresh = torch.nn.Sequential(torch.nn.Linear(8, 32), torch.nn.ReLU(), torch.nn.Linear(32, 3))
fresh = ws.quantize.load_quantized("four_bits", fresh)
assert torch.equal(fresh(data["x"]), data["out"])
"""


def test_quantization_aware_training_ends_in_a_fresh_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = run("From quantization-aware training to a fresh process")
    model, x, y = names["model"], names["x"], names["y"]
    assert (model(x).argmax(1) == y).float().mean() > 0.8
    torch.save({"x": x, "out": model(x).detach()}, "data.pt")
    subprocess.run([sys.executable, "-c", AGAIN], check=True, timeout=100)
