"""``weightsmith diagnose`` on checkpoints of several kinds."""

import json
from collections import UserDict

import pytest
import torch
from safetensors.torch import save_file

from weightsmith.cli import main
from weightsmith.lab.models import build_model

OWN = """
import torch
from torch import nn

def before():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))

def after():
    model = before()
    for parameter in model.parameters():
        parameter.data += 0.3
    return model

def inputs():
    return torch.randn(50, 4, generator=torch.Generator().manual_seed(0))

def nothing():
    return 3
"""


def command(*words):
    with pytest.raises(SystemExit) as stop:
        main(["diagnose", *map(str, words)])
    return stop.value.code


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model = build_model("mlp", channels=1, size=8, classes=10)
    save_file(model.state_dict(), "before.safetensors")
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    torch.save(model.state_dict(), "after.pt")
    (tmp_path / "own_models.py").write_text(OWN)
    return tmp_path


def test_two_checkpoints_on_data(folder, capsys):
    words = ["before.safetensors", "after.pt", "--data", "digits", "--model", "mlp", "--samples", "20"]
    assert command(*words, "--allow-pickle", "--kernel-samples", "4", "--out", "page.html") == 0
    printed = capsys.readouterr().out
    assert "Kernel alignment 0." in printed
    assert "representation" in printed
    numbers = json.loads((folder / "page.json").read_text())
    assert 0 < numbers["kernel_alignment"] < 1
    page = (folder / "page.html").read_text()
    assert page.count("<svg") == 3
    assert "http://" not in page.replace("http://www.w3.org", "")


def test_the_weights_alone(folder, capsys):
    assert command("before.safetensors", "after.pt", "--rank", "stable", "--allow-pickle") == 0
    assert "effective rank" in capsys.readouterr().out
    numbers = json.loads((folder / "diagnose.json").read_text())
    assert numbers["plan"] is None
    assert numbers["kernel_alignment"] is None
    assert numbers["relative_weight_change"] > 0


def test_models_and_inputs_of_ones_own(folder, capsys):
    assert command("own_models.py:before", "own_models.py:before", "--data", "own_models.py:inputs") == 0
    assert "Kernel alignment 1.0000" in capsys.readouterr().out
    assert (
        command("own_models.py:before", "own_models.py:after", "--data", "own_models.py:inputs", "--method", "sketch")
        == 0
    )
    assert "standard error" in capsys.readouterr().out


def test_a_plan_writes_nothing(folder, capsys):
    words = ["own_models.py:before", "own_models.py:after", "--data", "own_models.py:inputs", "--plan"]
    assert command(*words) == 0
    assert "explicit Jacobian" in capsys.readouterr().out
    assert not (folder / "diagnose.html").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["before.safetensors", "nothing.pt"], "neither a file"),
        (["before.safetensors", "after.pt"], "--allow-pickle reads plain tensors"),
        (["after.pt", "before.safetensors", "--data", "digits", "--model", "mlp"], "--allow-pickle reads"),
        (["before.safetensors", "own_models.py", "--rank", "stable"], "--allow-pickle reads"),
        (["before.safetensors", "after.pt", "--allow-pickle", "--data", "digits"], "--model names the architecture"),
        (
            ["before.safetensors", "after.pt", "--allow-pickle", "--data", "digits", "--model", "convnet"],
            "does not fit the model",
        ),
        (["own_models.py:nothing", "own_models.py:after", "--data", "own_models.py:inputs"], "must be or return"),
        (
            ["before.safetensors", "after.pt", "--allow-pickle", "--data", "own_models.py:inputs", "--model", "mlp"],
            "module:function",
        ),
        (["before.safetensors", "after.pt", "--allow-pickle", "--plan"], "needs --data"),
        (["before.safetensors", "after.pt", "--allow-pickle", "--samples", "0"], "--samples must be above 0"),
        (["before.safetensors", "after.pt", "--allow-pickle", "--rank", "low"], "kind 'low' is not known"),
        (["before.safetensors", "after.pt", "--allow-pickle", "--params", "x*"], "no floating-point weights"),
        (["before.safetensors", "own_models.py", "--allow-pickle"], "cannot be read"),
        (["before.safetensors", "own_models.py:after"], "only one of them"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line(folder, capsys, words, message):
    assert command(*words) == 2
    said = capsys.readouterr().err
    assert message in said
    assert not (folder / "diagnose.html").exists()


def test_the_first_samples_leave_what_counts_no_samples_whole():
    from weightsmith.tools.diagnose import _first

    inputs = UserDict({"x": torch.zeros(6, 8), "mask": torch.zeros(8, 8), "flag": True})
    cut = _first(inputs, 0, 4)
    assert (cut["x"].shape, cut["mask"].shape, cut["flag"]) == ((4, 8), (8, 8), True)
    assert [tensor.shape for tensor in _first([torch.zeros(8, 6), torch.zeros(8)], 1, 4)] == [(8, 4), (8,)]
