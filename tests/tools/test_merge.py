"""The command on run folders; what it does to weights is tested with the library."""

import json

import pytest
import torch
import tyro
from safetensors.torch import load_file, save_file

from weightsmith.core.errors import UsageError
from weightsmith.tools.merge import merge


@pytest.fixture
def run(tmp_path):
    for i in range(1, 6):
        folder = tmp_path / "run" / f"checkpoint-{10 * i}"
        folder.mkdir(parents=True)
        save_file({"w": torch.full((2, 3), float(i))}, folder / "model.safetensors", {"format": "pt"})
        (folder / "config.json").write_text("{}")
    log = [{"step": 10 * i, "loss": 1.0 / i, "eval_loss": 2.0 / i, "eval_accuracy": i / 10} for i in range(1, 6)]
    (tmp_path / "run/checkpoint-50/trainer_state.json").write_text(json.dumps({"log_history": log}))
    return tmp_path / "run"


def command(*words):
    return tyro.cli(merge, args=[str(word) for word in words], prog="weightsmith merge")


def value(folder):
    return load_file(folder / "model.safetensors")["w"][0, 0].item()


def by(weights, members=(2, 3, 4, 5)):
    return sum(w * m for w, m in zip(weights, members, strict=True)) / sum(weights)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--by", "loss"], by([2, 3, 4, 5])),
        (["--by", "loss:last"], by([2, 3, 4, 5])),
        (["--by", "steps"], by([20, 30, 40, 50])),
        (["--by", "eval"], by([2, 3, 4, 5])),
        (["--by", "eval_loss", "--penalty", "2"], by([4, 9, 16, 25])),
        (["--by", "eval:accuracy", "--higher-is-better"], by([2, 3, 4, 5])),
        (["--by", "loss", "--scheme", "uniform"], 3.5),
        (["--scheme", "ema", "--penalty", "0.5"], by([1, 2, 4, 8])),
        (["--metrics", "1", "1", "1", "3", "--higher-is-better"], by([1, 1, 1, 3])),
        (["--last", "2", "--scheme", "uniform"], 4.5),
        (["--last", "2", "--every", "2", "--scheme", "uniform"], 4),
        (["--steps", "10", "30", "--scheme", "uniform"], 2),
        (["--by", "steps", "--top", "1"], 5),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_every_way_to_weigh(run, tmp_path, options, expected):
    assert command(run, "--out", tmp_path / "out", *options) == 0
    assert value(tmp_path / "out") == pytest.approx(expected, rel=1e-6)


def test_a_dry_run_prints_the_weights_and_writes_nothing(run, tmp_path, capsys):
    before = sorted(tmp_path.rglob("*"))
    assert command(run, "--out", tmp_path / "out", "--dry-run", "--by", "steps") == 0
    printed = capsys.readouterr().out
    assert [line.split() for line in printed.splitlines()] == [
        ["step", "metric", "weight"],
        ["20", "20", "0.1429"],
        ["30", "30", "0.2143"],
        ["40", "40", "0.2857"],
        ["50", "50", "0.3571"],
    ]
    assert command(run, "--dry-run") == 0
    assert sorted(tmp_path.rglob("*")) == before


def test_checkpoint_folders_can_be_given_one_by_one(run, tmp_path):
    folders = [run / f"checkpoint-{step}" for step in (50, 10)]
    with pytest.raises(UsageError, match="values go with checkpoints that are given oldest first"):
        command(*folders, "--out", tmp_path / "out", "--metrics", "1", "2", "--higher-is-better")
    command(*folders[::-1], "--out", tmp_path / "out", "--metrics", "1", "2", "--higher-is-better")
    assert value(tmp_path / "out") == pytest.approx((1 * 1 + 2 * 5) / 3)  # metrics go with the oldest first
    command(run / "checkpoint-30", "--out", tmp_path / "one", "--by", "steps")
    assert value(tmp_path / "one") == 3


def test_the_table_tells_distances_and_where_the_result_is(run, tmp_path, capsys):
    command(run, "--out", tmp_path / "out", "--dtype", "bfloat16")
    printed = capsys.readouterr().out
    assert "distance from the newest" in printed
    assert f"Merged: {tmp_path / 'out'}" in printed
    assert load_file(tmp_path / "out" / "model.safetensors")["w"].dtype == torch.bfloat16


def test_what_an_adapter_loses_is_told(tmp_path, capsys):
    for i in (1, 2):
        folder = tmp_path / "run" / f"checkpoint-{i}"
        folder.mkdir(parents=True)
        stem = "base_model.model.q.lora_"
        state = {f"{stem}A.weight": torch.randn(2, 5), f"{stem}B.weight": torch.randn(4, 2)}
        save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})
        (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4}))
    command(tmp_path / "run", "--last", "2", "--scheme", "uniform", "--out", tmp_path / "out")
    assert "discarded by the rank" in capsys.readouterr().out


def test_a_greedy_soup_asks_your_function(run, tmp_path, monkeypatch):
    (tmp_path / "judge.py").write_text(
        "from safetensors.torch import load_file\n"
        "def closeness(folder):\n"
        "    return -abs(load_file(folder / 'model.safetensors')['w'].mean().item() - 4.5)\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    command(run, "--out", tmp_path / "out", "--soup", "judge:closeness")
    assert value(tmp_path / "out") == 4.5


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "--out names the folder to make"),
        (["--out", "out", "--by", "los"], "--by must be loss, loss:last, steps, eval or eval:KEY, got 'los'"),
        (["--out", "out", "--soup", "nowhere:at_all"], "cannot be imported"),
        (["--out", "out", "--soup", "os"], "--soup must be MODULE:FUNCTION"),
        (["--dry-run", "--soup", "os:getcwd"], "--dry-run knows no weights"),
        (["--out", "out", "--scheme", "linear", "--penalty", "2"], "between 0 and 1"),
        (["--out", "file/deep"], "out must be a folder, got file/deep: file is a file"),
        (["--out", "file", "--overwrite"], "out must be a folder, got file: file is a file"),
        (["--out", "out", "--soup", "os:getcwd", "--decay", "linear"], "--soup chooses by evaluations"),
        (
            ["--out", "out", "--weights", "1", "2", "3", "4", "--decay", "linear"],
            "weights and decay exclude each other",
        ),
        (["--out", "out", "--decay", "linear", "--top", "2"], "decay and top exclude each other"),
        (["--out", "out", "--weights", "1", "2"], "weights must be 4 numbers, one per checkpoint, got 2"),
    ],
)
def test_what_cannot_be_done_says_so(run, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UsageError, match=message):
        command(run, *words)
    assert (tmp_path / "file").read_text() == "mine"
    assert not (tmp_path / "out").exists()


def test_a_folder_that_is_no_run_says_so(tmp_path):
    with pytest.raises(UsageError, match="holds no checkpoint-<step> folder"):
        command(tmp_path, "--out", tmp_path / "out")
    with pytest.raises(UsageError, match="give a run folder"):
        merge((), out=tmp_path / "out")


def test_weights_are_given_by_hand(run, tmp_path):
    command(run, "--out", tmp_path / "out", "--last", "3", "--weights", "1", "1", "2")
    assert value(tmp_path / "out") == pytest.approx(by([1, 1, 2], members=(3, 4, 5)))


def test_a_decay_is_merged(run, tmp_path, capsys):
    command(run, "--out", tmp_path / "out", "--last", "3", "--decay", "linear")
    assert value(tmp_path / "out") == pytest.approx(by([1, 2, 1], members=(3, 4, 5)))
    assert json.loads((tmp_path / "out/merge_report.json").read_text())["settings"]["decay"] == "linear"


def test_a_warning_is_one_line(run, tmp_path, capsys, recwarn):
    command(run, "--out", tmp_path / "out", "--last", "99")
    lines = [line for line in capsys.readouterr().out.splitlines() if "fewer than the last 99" in line]
    assert len(lines) == 1
    assert lines[0].startswith("note: ")
    assert not recwarn.list


def test_a_single_checkpoint_needs_no_log(run, tmp_path):
    command(run / "checkpoint-30", "--out", tmp_path / "out")
    assert value(tmp_path / "out") == 3


def test_a_logged_null_is_one_clear_line(run, tmp_path):
    (run / "checkpoint-50/trainer_state.json").write_text('{"log_history": [{"step": 10, "loss": null}]}')
    with pytest.raises(UsageError, match=r"trainer_state\.json.*loss.*null") as caught:
        command(run, "--out", tmp_path / "out")
    assert "\n" not in str(caught.value)
