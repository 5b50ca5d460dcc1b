"""The chains that the documentation promises, run from the page itself and checked by other means."""

import importlib
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


ADAPTER = "From an adapter under Trainer to plain transformers"


def run(heading, *, commands_on=False, **names):
    """Run a section of the page, its shell commands too, or from these on, and return its variables."""
    section = PAGE.partition(f"## {heading}\n")[2].partition("\n## ")[0]
    blocks = BLOCK.findall(section)
    first = [language for language, _ in blocks].index("bash") if commands_on else 0
    for language, text in blocks[first:]:
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


NAME = "model.layers.0.self_attn.q_proj.weight"
STEPS = (2, 4, 6, 8)


def load(folder):
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(folder)


def assert_average_of(members, merged):
    """The merged weight is the base's plus a weighted mean of what each checkpoint changed in it."""
    start, got = load("base").get_parameter(NAME).detach(), merged.get_parameter(NAME).detach()
    assert not torch.equal(got, start)
    updates = torch.stack([(member.get_parameter(NAME).detach() - start).flatten().double() for member in members], 1)
    shares = torch.linalg.lstsq(updates, (got - start).flatten().double()).solution
    assert ((shares > 0) & (shares < 1)).all()
    assert float(shares.sum()) == pytest.approx(1.0, abs=1e-3)
    torch.testing.assert_close((updates @ shares).float().view_as(got), got - start, rtol=1e-4, atol=1e-6)


def assert_rounded(small, merged):
    """What plain transformers loads is the merged model on its grid."""
    ws.quantize.round_to_nearest_(merged, grid=ws.quantize.Grid(4, search="minmax"))
    torch.testing.assert_close(logits_of(small), logits_of(merged), rtol=1e-3, atol=1e-3)


def test_an_adapter_under_trainer_ends_in_plain_transformers(base):
    peft = pytest.importorskip("peft")
    names = run(ADAPTER, rows=base)
    merged = load("merged")
    checkpoints = [f"run/checkpoint-{step}" for step in STEPS]
    assert_average_of([peft.PeftModel.from_pretrained(load("base"), c).merge_and_unload() for c in checkpoints], merged)
    assert_rounded(names["small"], merged)


@pytest.mark.parametrize("variant", ["miss", *(pytest.param(name, marks=pytest.mark.slow) for name in ("row", "col"))])
def test_a_bone_adapter_under_trainer_ends_in_plain_transformers(base, variant):
    import transformers

    callback = importlib.import_module("weightsmith.integrations.bone").BoneCheckpointCallback()
    model = ws.adapt.apply_bone_(load("base"), ws.adapt.BoneConfig(r=4, variant=variant))
    arguments = transformers.TrainingArguments("run", max_steps=8, save_steps=2, logging_steps=1, learning_rate=0.01)
    transformers.Trainer(model, arguments, train_dataset=base, callbacks=[callback]).train()
    names = run(ADAPTER, commands_on=True, transformers=transformers)
    merged = load("merged")
    members = [
        ws.adapt.unload_bone_(ws.adapt.load_bone(load("base"), f"run/checkpoint-{step}"), merge=True) for step in STEPS
    ]
    assert_average_of(members, merged)
    assert_rounded(names["small"], merged)


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
