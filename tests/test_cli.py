"""The command line as a user meets it: what it prints, and the exit code."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from weightsmith import cli
from weightsmith.cli import cards, console, run
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
    assert cards.techniques() == 0
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
    assert "undecided" in text
    assert "SGDP" in text
    assert "about" in text.split("AdamP and SGDP against")[0]  # how long it will take, said beforehand
    page = re.search(r"Report: (\S+report\.html)", text).group(1)
    assert "<html" in Path(page).read_text()
    again, text = call("run", "adamp", *TINY, "--seeds", "1")
    assert again == 0
    assert "0 jobs run, 5 reused" in text
    run_folder = next((tmp_path / "runs" / "adamp").iterdir())
    assert call("report", str(run_folder))[0] == 0


def test_fields_can_be_set_by_option_and_by_set(call, tmp_path):
    sets = ["--set", "scales=1,0.5", "--set", "augment=true", "--lr", "0.02", "--arms", "plain"]
    code, _ = call("run", "weight-compander", *TINY, "--seeds", "1", *sets)
    assert code == 0
    config = json.loads(next(tmp_path.glob("runs/*/*/run.json")).read_text())["config"]
    assert (config["scales"], config["augment"], config["lr"], config["epochs"]) == ([1.0, 0.5], True, 0.02, 1)


def test_a_dry_run_tells_the_cost_and_runs_nothing(call, tmp_path):
    code, text = call("run", "adamp", *TINY, "--dry-run")
    assert code == 0
    assert re.search(r"15 jobs \(3 seeds\) to 100 jobs \(20 seeds\).*about .* MiB each", text)
    assert not (tmp_path / "runs").exists()


EXPERIMENT = """
from weightsmith.lab.experiment import Arm, Claim, Experiment, Metric
from dataclasses import dataclass

@dataclass(frozen=True)
class Config:
    gain: float = 1.0

def job(config, job):
    return {"score": config.gain * (job.arm == "new") + job.seed / 100}

MINE = Experiment(
    slug="mine", title="Mine", question="Does it?", presets={"laptop": Config()},
    arms=lambda c: [Arm("new", "new"), Arm("old", "old")],
    claims=lambda c: [Claim(text="New beats old", metric="score", winner="new", loser="old", primary=True)],
    metrics=lambda c: [Metric("score", "score", "higher")],
    job=job,
)
"""


def test_an_experiment_of_a_file_runs_as_ours_do(call, tmp_path):
    (tmp_path / "mine.py").write_text(EXPERIMENT)
    code, text = call("run", "mine.py:MINE", "--workers", "2", "--gain", "2", "--seeds", "5")
    assert (code, "Use new here." in text) == (0, True)
    assert call("run", "mine.py:Config")[0] == 2


TRAIN = """
import torch
def train(trial):
    model = trial.model(torch.nn.Linear(2, 2))
    optimizer = trial.optimizer(torch.optim.SGD, model, lr=0.1)
    x = torch.randn(8, 2)
    for _ in range(3):
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
    model = trial.finish(model)
    return {"val_loss": loss.item()}
"""


def test_compare_puts_techniques_on_a_function(call, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    words = ["compare", "train.py:train", "--metric", "val_loss", "--workers", "1", "--seeds", "3"]
    code, text = call(*words, "--with", "sgdp", "--with", "sgdp+weight-compander", "--worth", "0.5")
    assert code == 0
    assert "SGDP beats baseline" in text
    code, text = call(*words, "--noise")
    assert code == 0
    assert "smallest difference in val_loss" in text


def test_measuring_noise_takes_the_options_of_a_run(call, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    words = ["compare", "train.py:train", "--metric", "val_loss", "--noise", "--out", "elsewhere"]
    code, text = call(*words, "--dry-run")
    assert (code, "5 jobs (5 seeds)" in text) == (0, True)
    assert not (tmp_path / "elsewhere").exists()
    assert call(*words, "--arms", "other")[0] == 2


def test_a_mistyped_metric_is_one_message_and_exits_with_2(call, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    code, text = call("compare", "train.py:train", "--metric", "val_los:lower", "--with", "sgdp", "--workers", "1")
    assert (code, text.count("error:")) == (2, 1)
    assert "'val_los' is not among the results: val_loss" in text


def test_equal_failures_are_printed_once(call, tmp_path):
    (tmp_path / "train.py").write_text("def train(trial):\n    raise RuntimeError('no luck')\n")
    code, text = call("compare", "train.py:train", "--metric", "loss", "--with", "sgdp", "--workers", "1")
    assert (code, text.count("error:")) == (1, 1)
    assert "baseline, seed 0 and 5 other jobs failed: RuntimeError: no luck" in text


def test_a_job_that_fails_while_noise_is_measured_exits_with_1(call, tmp_path):
    (tmp_path / "train.py").write_text("def train(trial):\n    raise RuntimeError('no luck')\n")
    code, text = call("compare", "train.py:train", "--metric", "loss", "--noise", "--workers", "1")
    assert code == 1
    assert "baseline, seed 0 and 4 other jobs failed" in text


def test_noise_is_measured_over_the_seeds_that_were_asked_for(call, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    words = ["compare", "train.py:train", "--metric", "val_loss", "--noise", "--workers", "1"]
    assert "5 seeds of the baseline" in call(*words)[1]
    assert "3 seeds of the baseline" in call(*words, "--seeds", "3")[1]
    code, text = call(*words, "--seeds", "1")
    assert (code, "--noise needs at least 3 seeds, got --seeds 1" in text) == (2, True)


def test_a_dry_run_of_a_comparison_says_what_is_not_known(call, tmp_path):
    (tmp_path / "train.py").write_text(TRAIN)
    words = ["compare", "train.py:train", "--metric", "val_loss", "--noise", "--workers", "1"]
    assert "time unknown before a job has finished; memory unknown" in call(*words, "--dry-run")[1]
    call(*words, "--seeds", "3")
    text = call(*words, "--dry-run")[1]
    assert re.search(r"about [\d.]+ s for those not done yet, by 3 finished jobs; memory unknown", text)


def test_compare_takes_commands(call, tmp_path):
    arms = [f"--arm={name}: echo '{{\"loss\": {value}{{seed}}}}'" for name, value in (("base", "2."), ("new", "1."))]
    code, text = call("compare", "--metric", "loss", "--workers", "1", "--seeds", "5", *arms)
    assert code == 0
    assert "new beats base" in text


def test_suggest_reads_a_model(call, tmp_path):
    (tmp_path / "net.py").write_text("from torch import nn\ndef make():\n    return nn.Linear(3, 3)\n")
    code, text = call("suggest", "net.py:make")
    assert code == 0
    assert "Linear, 12 parameters" in text
    assert "no normalization layer" in text


def test_a_receipt_is_written_and_verified(call, tmp_path):
    call("run", "adamp", *TINY, "--seeds", "1", "--arms", "sgd", "adamw")
    (folder,) = (tmp_path / "runs" / "adamp").iterdir()
    assert call("report", str(folder), "--receipt", "receipt.json")[0] == 0
    code, text = call("verify", "receipt.json", "--workers", "1")
    assert (code, "as in receipt.json" in text) == (0, True)
    content = json.loads((tmp_path / "receipt.json").read_text())
    content["jobs"][0]["metrics"]["norm_growth"] += 1
    (tmp_path / "receipt.json").write_text(json.dumps(content))
    code, text = call("verify", "receipt.json", "--workers", "1")
    assert code == 1
    assert re.search(r"norm_growth: 1 of 2 arms to the digit sgd was .* beyond the tolerance", text)
    assert call("verify", "receipt.json", "--arms", "adamp")[0] == 2


def test_a_real_change_is_still_reported(call, tmp_path):
    call("run", "adamp", *TINY, "--seeds", "2", "--arms", "adamw")
    (folder,) = (tmp_path / "runs" / "adamp").iterdir()
    call("report", str(folder), "--receipt", "receipt.json")
    content = json.loads((tmp_path / "receipt.json").read_text())
    content["config"]["adam_lrs"] = [1.3 * rate for rate in content["config"]["adam_lrs"]]
    (tmp_path / "receipt.json").write_text(json.dumps(content))
    code, text = call("verify", "receipt.json", "--workers", "1")
    assert (code, "beyond the tolerance" in text) == (1, True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["show", "adampp"], "did you mean 'adamp'"),
        (["run", "adampp"], "did you mean 'adamp'"),
        (["run", "adamp", "--preset", "laptp"], "preset 'laptp' is not known: did you mean 'laptop'"),
        (["run", "adamp", "--data", "minst"], "did you mean 'mnist'"),
        (["run", "adamp", "--model", "resnet19"], "resnet"),
        (["run", "adamp", "--set", "epoch=3"], "field 'epoch' is not known: did you mean 'epochs'"),
        (["run", "adamp", "--set", "epochs"], "--set takes key=value, got 'epochs'"),
        (["run", "adamp", "--set", "epochs=many"], "--epochs"),
        (["run", "adamp", "--set", "sgd_lrs=0.1,big"], "--sgd-lrs"),
        (["run", "adamp", "--epochz", "3"], "--epochs"),
        (["run", "adamp", "--engine", "cloud"], "--engine"),
        (["run", "adamp", "--seeds", "0"], "seeds must be 'auto'"),
        (["run", "adamp", "--tracker", "paper"], "tracker 'paper' is not known"),
        (["run", "adamp", "--epochs", "0"], "epochs must be above 0"),
        (["run", "adamp", "--seeds", "many"], "seeds must be auto, a number"),
        (["run", "no_module:MINE"], "there is no module 'no_module'"),
        (["run", "weight-compander", "--set", "scales=2"], "scales must start with 1"),
        (["compare", "--metric", "loss"], "give either a function"),
        (["compare", "no_module:train", "--metric", "loss", "--with", "adamp"], "there is no module 'no_module'"),
        (["compare", "os:getcwd", "--metric", "speed", "--with", "adamp"], "speed:higher or speed:lower"),
        (["compare", "os:getcwd", "--metric", "loss", "--with", "adamq"], "did you mean 'adamp'"),
        (["compare", "os:getcwd", "--metric", "loss"], "nothing to compare with"),
        (["compare", "--metric", "loss", "--arm", "base"], "--arm must be 'name: command'"),
        (["compare", "os:getcwd", "--metric", "loss", "--with", "adamp", "--sweep", "lr"], "--sweep takes"),
        (["suggest", "resnet19"], "is neither a Hugging Face folder"),
        (["verify", "nothing.json"], "nothing.json"),
        (["run"], "weightsmith run --help"),
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


@pytest.mark.parametrize("words", [["run", "--help"], ["techniques"], ["run", "adamp", "--epochz", "3"]])
@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_a_reader_that_has_gone_ends_a_command_quietly(words, unbuffered):
    reader, writer = os.pipe()
    os.close(reader)
    stream = "stderr" if "--epochz" in words else "stdout"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, stream: writer}
    environment = os.environ | {"PYTHONUNBUFFERED": unbuffered}
    done = subprocess.run([sys.executable, "-m", "weightsmith.cli", *words], env=environment, text=True, **streams)
    os.close(writer)
    assert (done.returncode, (done.stdout or "") + (done.stderr or "")) == (128 + signal.SIGPIPE, "")


def test_output_to_a_full_disk_fails_in_one_line():
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            [sys.executable, "-m", "weightsmith.cli", "techniques"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    assert done.returncode == 1
    assert done.stderr.splitlines() == ["error: OSError: [Errno 28] No space left on device"]


def test_output_that_is_lost_only_when_it_is_flushed_is_an_error_too(monkeypatch, capsys):
    with Path("/dev/full").open("w") as full:
        full.write("short")
        monkeypatch.setattr(sys, "stdout", full)
        assert console.finish(0) == 1
        full.write("discarded, as what follows")
    assert "cannot be written: No space left on device" in capsys.readouterr().err


@pytest.mark.parametrize("closing", [">&-", "2>&-", ">&- 2>&-"])
def test_streams_that_are_closed_from_the_start_are_no_error(closing):
    done = subprocess.run(f"{sys.executable} -m weightsmith.cli run --help {closing}", shell=True, capture_output=True)
    assert (done.returncode, done.stderr) == (0, b"")


def test_a_technique_that_is_not_in_yet_is_said_to_be_announced(call, monkeypatch):
    announced = replace(TECHNIQUES[0], slug="sixteen", experiment=None)
    monkeypatch.setattr(run, "technique", lambda _: announced)
    code, text = call("run", "sixteen")
    assert code == 2
    assert "sixteen is announced but not in this version yet; available: fast-ibp" in text


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


def test_a_file_that_ends_the_program_is_heard(call, tmp_path):
    (tmp_path / "train.py").write_text("raise SystemExit('no data today')")
    code, text = call("compare", "train.py:train", "--metric", "loss", "--with", "adamp")
    assert (code, text) == (1, "error: no data today ")


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


def test_a_damaged_job_is_named_by_the_report_and_done_again_by_the_run(call, tmp_path):
    call("run", "adamp", *TINY, "--seeds", "1")
    result = next(tmp_path.glob("runs/adamp/*/sgd/seed-0/result.json"))
    result.write_text("{")
    code, text = call("report", str(result.parents[2]))
    assert code == 0
    assert "is damaged" in text
    assert "1 jobs run, 4 reused" in call("run", "adamp", *TINY, "--seeds", "1")[1]


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
    script = "import sys; from weightsmith.cli import cards; cards.techniques(); print(*map(sys.modules.get, names))"
    script = "names = 'torch', 'ray'\n" + script
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert out.splitlines()[-1] == "None None"


@pytest.mark.slow
def test_a_killed_command_goes_on_where_it_was(tmp_path):
    command = [sys.executable, "-m", "weightsmith.cli", "run", "adamp", "--preset", "smoke", "--out", str(tmp_path)]
    command += ["--seeds", "3"]
    process = subprocess.Popen(command, start_new_session=True)
    deadline = time.monotonic() + 90
    while len(list(tmp_path.glob("adamp/*/*/seed-*/result.json"))) < 2 and time.monotonic() < deadline:
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    kept = len(list(tmp_path.glob("adamp/*/*/seed-*/result.json")))
    again = subprocess.run(command, capture_output=True, text=True, check=True)
    assert kept >= 2
    assert re.search(rf"{15 - kept} jobs run, {kept} reused", again.stdout)
