"""The command line as a user meets it: what it prints, and the exit code."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from weightsmith import cli
from weightsmith.techniques import TECHNIQUES


@pytest.fixture
def call(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "100")

    def run(*words):
        with pytest.raises(SystemExit) as stop:
            cli.main(words)
        captured = capsys.readouterr()
        return stop.value.code, re.sub(r"\s+", " ", captured.out + captured.err)

    return run


TINY = ["--preset", "smoke", "--set", "train_examples=120", "--set", "epochs=1", "--workers", "1"]


def test_techniques_lists_all_fifteen_a_line_each(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.techniques() == 0
    lines = capsys.readouterr().out.splitlines()
    for card in TECHNIQUES:
        assert sum(card.slug in line.split() and card.purpose in line for line in lines) == 1


def test_show_prints_the_card_and_the_paper(call):
    code, text = call("show", "adamp")
    assert code == 0
    assert "2006.08217" in text
    assert "When to use it" in text
    assert call("show", "steer")[0] == 0


def test_run_prints_table_verdicts_and_the_report(call, tmp_path):
    code, text = call("run", "adamp", *TINY, "--seeds", "1")
    assert code == 0
    assert "inconclusive" in text
    assert "sgdp" in text
    page = re.search(r"Report: (\S+report\.html)", text).group(1)
    assert "<html" in Path(page).read_text()
    again, text = call("run", "adamp", *TINY, "--seeds", "1")
    assert again == 0
    assert "0 jobs run, 4 reused" in text
    run_folder = next((tmp_path / "runs" / "adamp").iterdir())
    assert call("report", str(run_folder))[0] == 0


def test_fields_can_be_set_by_option_and_by_set(call, tmp_path):
    code, _ = call(
        "run",
        "weight-compander",
        *TINY,
        "--seeds",
        "1",
        "--set",
        "scales=0.5,1",
        "--set",
        "augment=true",
        "--lr",
        "0.02",
    )
    assert code == 0
    config = json.loads(next(tmp_path.glob("runs/*/*/run.json")).read_text())["config"]
    assert (config["scales"], config["augment"], config["lr"], config["epochs"]) == ([0.5, 1.0], True, 0.02, 1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "adampp"], "did you mean 'adamp'"),
        (["run", "adampp"], "did you mean 'adamp'"),
        (["run", "steer"], "announced but not in this version yet; available: weight-compander, adamp"),
        (["run", "adamp", "--preset", "laptp"], "preset 'laptp' is not known: did you mean 'laptop'"),
        (["run", "adamp", "--data", "minst"], "did you mean 'mnist'"),
        (["run", "adamp", "--model", "resnet19"], "resnet"),
        (["run", "adamp", "--set", "epoch=3"], "field 'epoch' is not known: did you mean 'epochs'"),
        (["run", "adamp", "--set", "epochs"], "--set takes key=value, got 'epochs'"),
        (["run", "adamp", "--set", "epochs=many"], "--epochs"),
        (["run", "adamp", "--set", "sgd_lrs=0.1,big"], "--sgd-lrs"),
        (["run", "adamp", "--epochz", "3"], "--epochs"),
        (["run", "adamp", "--engine", "cloud"], "--engine"),
        (["run", "adamp", "--seeds", "0"], "seeds must be a positive number"),
        (["run", "adamp", "--tracker", "paper"], "tracker 'paper' is not known"),
        (["run", "adamp", "--set", "sgd_reference_lr=7"], "sgd_reference_lr must be one of sgd_lrs"),
        (["run", "weight-compander", "--set", "scales=2"], "scales must contain 1"),
        (["run"], "technique"),
        (["report", "."], "is not a run folder"),
        (["report", "no/such/folder"], "is not a run folder"),
        (["frobnicate"], "frobnicate"),
    ],
)
def test_bad_usage_says_what_is_wrong_and_exits_with_2(call, words, message):
    code, text = call(*words)
    assert code == 2
    assert message in text
    assert "Traceback" not in text


def test_a_hub_id_without_network_says_how_to_do_without(call, monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.delenv("WEIGHTSMITH_DATA", raising=False)
    code, text = call("run", "adamp", "--data", "mnist")
    assert code == 2
    assert "--data-dir" in text
    assert "--data digits" in text


def test_a_missing_extra_names_the_command_that_installs_it(call, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    code, text = call("run", "adamp", *TINY, "--engine", "ray")
    assert code == 1
    assert 'pip install "weightsmith[search]"' in text


def test_an_out_folder_that_cannot_be_written_fails_without_a_traceback(call, tmp_path):
    (tmp_path / "taken").write_text("")
    code, text = call("run", "adamp", *TINY, "--out", "taken")
    assert code == 1
    assert "taken" in text
    assert "Traceback" not in text


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="not a run folder"):
        cli.main(["report", ".", "--debug"])


def test_a_damaged_run_folder_says_what_to_delete(call, tmp_path):
    call("run", "adamp", *TINY, "--seeds", "1")
    result = next(tmp_path.glob("runs/adamp/*/sgd/seed-0/result.json"))
    result.write_text("{")
    code, text = call("report", str(result.parents[2]))
    assert code == 2
    assert "is damaged" in text
    assert "delete" in text


def test_a_failing_job_exits_with_1_and_names_its_traceback(call):
    code, text = call("run", "adamp", *TINY, "--seeds", "1", "--set", "sgd_weight_decay=-1")
    assert code == 1
    assert "seed-0.error.txt" in text


def test_trackers_get_every_row(call, tmp_path):
    pytest.importorskip("tensorboard")
    code, _ = call("run", "adamp", *TINY, "--seeds", "1", "--tracker", "tensorboard")
    assert code == 0
    assert len(list(tmp_path.glob("runs/adamp/*/tracker/*/events*"))) >= 4


def test_version(call):
    assert "weightsmith 0." in call("--version")[1]


def test_importing_the_package_and_listing_techniques_need_nothing_heavy():
    script = (
        "import sys; from weightsmith import cli; cli.techniques(); print('torch' in sys.modules, 'ray' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "False False"


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(tmp_path):
    command = [sys.executable, "-m", "weightsmith.cli", "run", "adamp", "--preset", "smoke", "--out", str(tmp_path)]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 90
    while len(list(tmp_path.glob("adamp/*/*/seed-*/result.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(list(tmp_path.glob("adamp/*/*/seed-*/result.json")))
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert kept >= 2
    assert re.search(rf"{12 - kept} jobs run, {kept} reused", again.stdout)
