"""``weightsmith certify``, from files and functions to errors and margins."""

import csv
import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from weightsmith.certify import CertifiedTraining, EpsilonSchedule
from weightsmith.cli import main
from weightsmith.lab.models import build_model


def run(capsys, *words):
    with pytest.raises(SystemExit) as ended:
        main(["certify", *map(str, words)])
    captured = capsys.readouterr()
    return ended.value.code, captured.out + captured.err


@pytest.fixture
def weights(tmp_path):
    torch.manual_seed(0)
    model = build_model("small_cnn", channels=1, size=8, classes=10)
    save_file(model.state_dict(), tmp_path / "weights.safetensors")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    return tmp_path


@pytest.mark.parametrize("method", ["ibp", "crown-ibp", "crown"])
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_state_dict_is_certified_and_its_margins_written(weights, capsys, method, suffix):
    out = weights / "margins.csv"
    code, text = run(
        capsys, weights / f"weights.{suffix}", "--architecture", "small_cnn", "--data", "digits", "--eps", 0.01,
        "--method", method, "--examples", 40, "--attack-steps", 3, "--out", out, "--normalize", "data",
    )  # fmt: skip
    assert code == 0
    assert f"verified ({method})" in text
    rows = list(csv.DictReader(out.open()))
    assert len(rows) == 40
    for row in rows:
        assert (row["verified"] == "True") == (float(row["margin"]) > float(row["tolerance"]))
        assert row["verified"] == "False" or (row["attacked"] == "False" and row["label"] == row["prediction"])


def test_margins_go_to_parquet(weights, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    out = weights / "margins.parquet"
    code, _ = run(
        capsys, weights / "weights.pt", "--architecture", "small_cnn", "--data", "digits", "--eps", 0, "--examples", 8,
        "--rounding", "outward", "--out", out, "--attack-steps", 0,
    )  # fmt: skip
    assert code == 0
    assert parquet.read_table(out).column("example").to_pylist() == list(range(8))


def test_a_function_that_makes_a_network_is_certified(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\ndef make(classes, size):\n"
        "    return nn.Sequential(nn.Flatten(), nn.Linear(size * size, classes))\n"
    )
    code, text = run(capsys, f"{tmp_path}/mine.py:make", "--data", "digits", "--eps", 0.1, "--examples", 20)
    assert code == 0, text
    assert "20 test images of digits" in text


def test_weights_of_certified_training_are_certified(tmp_path, capsys):
    (tmp_path / "mine.py").write_text(
        "from torch import nn\n\ndef make(classes, size):\n"
        "    layers = nn.Linear(size * size, 12), nn.ReLU(), nn.Linear(12, classes)\n"
        "    return nn.Sequential(nn.Flatten(), *layers)\n"
    )
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 12), nn.ReLU(), nn.Linear(12, 10))
    CertifiedTraining(model, 0.1, EpsilonSchedule(0.1, 1, length=3), torch.rand(4, 1, 8, 8), lower=0.0, upper=1.0)
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    words = [f"{tmp_path}/mine.py:make", "--checkpoint", tmp_path / "weights.pt", "--data", "digits", "--eps", 0.01]
    code, text = run(capsys, *words, "--examples", 20, "--attack-steps", 2, "--batchnorm")
    assert code == 0, text
    assert "verified (ibp)" in text
    code, text = run(capsys, *words)
    assert code == 2
    assert "does not fit the model" in text


def test_data_may_lie_in_a_folder_of_ones_own(weights, capsys):
    words = ["--architecture", "small_cnn", "--data", "mnist", "--eps", 0.1, "--data-dir", weights / "nowhere"]
    code, text = run(capsys, weights / "weights.pt", *words)
    assert code == 2
    assert "data_dir must be a folder" in " ".join(text.split())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["weights.pt"], "--architecture names the network"),
        (["nothing.pt", "--architecture", "small_cnn"], "there is no such file"),
        (["weights.pt", "--architecture", "cnn7"], "does not fit the model"),
        (["weights.pt", "--architecture", "small"], "model 'small' is not known"),
        (["small_cnn"], "neither a file nor module:function"),
        (["os:getcwd"], "must be or return a torch.nn.Module, got str"),
        (["missing.onnx"], "there is no such file"),
        (["weights.pt", "--architecture", "small_cnn", "--out", "margins.txt"], "--out must end in .csv or .parquet"),
        (["weights.pt", "--architecture", "small_cnn", "--std", "0"], "--std must be above 0"),
        (["weights.pt", "--architecture", "small_cnn", "--mean", "0", "1"], "--mean must be one number per channel"),
        (["weights.pt", "--architecture", "small_cnn", "--batch-size", "0"], "--batch-size must be at least 1"),
        (["weights.pt", "--architecture", "small_cnn", "--eps", "-1"], "eps must be at least 0"),
        (["weights.pt", "--architecture", "small_cnn", "--normalize", "data", "--std", "1"], "leave --mean and --std"),
    ],
)
def test_bad_requests_are_named(weights, capsys, monkeypatch, words, said):
    monkeypatch.chdir(weights)
    given = ["--eps", "0.1"] if "--eps" not in words else []
    code, text = run(capsys, *words, "--data", "digits", *given)
    assert code == 2
    assert said in " ".join(text.split())


def test_onnx_says_what_to_install(tmp_path, capsys, monkeypatch):
    (tmp_path / "net.onnx").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "onnx", None)
    code, text = run(capsys, tmp_path / "net.onnx", "--data", "digits", "--eps", 0.1)
    assert code == 1
    assert "onnx is needed" in text
