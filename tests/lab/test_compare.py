import json
import os
import signal
import subprocess
import sys
import time

import pytest

from weightsmith.core.errors import UsageError
from weightsmith.experiments.recipes import recipes
from weightsmith.lab.compare import Comparison, compare_commands, compare_function, direction
from weightsmith.lab.record import JobResult, read_jobs
from weightsmith.lab.run import estimate, run

TRAIN = """
import torch
def train(trial):
    torch.manual_seed(trial.seed)
    model = trial.model(torch.nn.Linear(4, 2))
    optimizer = trial.optimizer(torch.optim.AdamW, model, lr=trial.lr(0.1))
    x = torch.randn(32, 4)
    y = (x[:, 0] > 0).long()
    for step in range(5):
        optimizer.zero_grad()
        loss = torch.nn.functional.cross_entropy(model(x), y)
        loss.backward()
        optimizer.step()
        trial.record(step=step, loss=loss.item())
    model = trial.finish(model)
    (trial.folder / "mine.txt").write_text("kept while the job is in flight")
    return {"loss": loss.item(), "lr": trial.lr(0.1)}
"""


@pytest.fixture
def script(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "train_me.py"
    path.write_text(TRAIN)
    return "train_me.py:train"


def comparison(what, *arms, **changes):
    given = {"metric": "loss", "better": "lower", "choose_by": "loss", "choose_better": "lower"}
    return Comparison(what, (("baseline", ""), *((name, name) for name in arms)), **(given | changes))


def jobs(folder):
    return {(job.arm, job.seed): job for job in read_jobs(folder) if isinstance(job, JobResult)}


@pytest.mark.parametrize("workers", [1, 2])
def test_a_function_is_compared_with_itself_under_techniques(tmp_path, script, workers):
    config = comparison(script, "adamp", "adamp+weight-compander")
    experiment = compare_function(script, config, recipes)
    done = run(experiment, config, seeds=2, out=tmp_path / "runs", workers=workers)
    assert not done.failures
    found = jobs(done.folder)
    assert len(found) == 6
    assert [row["step"] for row in found["adamp", 0].rows if row["phase"] == "training"] == list(range(5))
    titles = [arm.label for arm in experiment.arms(config)]
    assert titles == ["baseline", "AdamP", "Weight Compander + AdamP"]


def test_changed_code_of_the_user_is_another_question(tmp_path, script):
    config = comparison(script, "adamp")
    first = run(compare_function(script, config, recipes), config, seeds=1, out=tmp_path / "runs", workers=1)
    (tmp_path / "train_me.py").write_text(TRAIN + "\n# changed\n")
    second = run(compare_function(script, config, recipes), config, seeds=1, out=tmp_path / "runs", workers=1)
    assert first.folder != second.folder
    assert "data and model code changed" in second.news[0]


def test_every_arm_is_swept_over_the_same_values(tmp_path, script):
    config = comparison(script, "adamp", sweep=(("lr", ("0.001", "1x", "0.5")),))
    done = run(compare_function(script, config, recipes), config, seeds=1, out=tmp_path / "runs", workers=1)
    assert not done.failures
    for job in jobs(done.folder).values():
        trials = [row for row in job.rows if row["phase"] == "sweep"]
        assert [row["lr"] for row in trials] == ["0.001", "1x", "0.5"]
        assert job.metrics["loss"] == min(row["score"] for row in trials)


@pytest.mark.parametrize(
    ("returned", "message"),
    [("{'acc': 1.0}", "'loss' is not among the results: acc"), ("1.0", "must return a dictionary of numbers")],
)
@pytest.mark.parametrize("workers", [1, 2])
def test_a_function_that_returns_something_else_is_refused_by_the_first_job(
    tmp_path, script, returned, message, workers
):
    (tmp_path / "other_train.py").write_text(
        f"from pathlib import Path\n"
        f"def train(trial):\n    Path(f'called-{{trial.seed}}').touch()\n    return {returned}\n"
    )
    config = comparison("other_train.py:train")
    experiment = compare_function("other_train.py:train", config, recipes)
    with pytest.raises(UsageError, match=message):
        run(experiment, config, seeds=9, out=tmp_path / "runs", workers=workers)
    assert len(list(tmp_path.glob("called-*"))) < 9


def test_a_refusal_after_a_finished_job_is_a_failure_of_its_own(tmp_path, script):
    (tmp_path / "half.py").write_text("def train(trial):\n    return {'loss': 1.0} if trial.seed == 0 else 1.0\n")
    config = comparison("half.py:train")
    done = run(compare_function("half.py:train", config, recipes), config, seeds=3, out=tmp_path / "runs", workers=1)
    assert (len(done.finished), len(done.failures)) == (1, 2)


@pytest.mark.parametrize("parameters", ["", "trial, epochs", "*, trial"])
def test_a_function_that_takes_no_trial_is_refused_before_anything_runs(tmp_path, script, parameters):
    name = f"takes_{len(parameters)}"
    (tmp_path / f"{name}.py").write_text(f"def train({parameters}):\n    return {{'loss': 1.0}}\n")
    with pytest.raises(UsageError, match="is called with a trial only"):
        compare_function(f"{name}.py:train", comparison(f"{name}.py:train"), recipes)


WRITER = """
import json, os, sys, time
seed, shift = int(sys.argv[1]), float(sys.argv[2])
print("starting")
for step in range(3):
    print(json.dumps({"step": step, "val_loss": 1 / (step + 1) + seed / 100 - shift}), flush=True)
if len(sys.argv) > 3:
    time.sleep(float(sys.argv[3]))
if shift > 5:
    sys.exit("it does not work")
with open(os.environ["WEIGHTSMITH_RESULT"], "w") as file:
    file.write(json.dumps({"accuracy": shift, "seed": int(os.environ["WEIGHTSMITH_SEED"])}))
"""


def commands(tmp_path, shift="0.1", extra="", **changes):
    (tmp_path / "writer.py").write_text(WRITER)
    base = f"{sys.executable} {tmp_path}/writer.py {{seed}} 0 {extra}"
    new = f"{sys.executable} {tmp_path}/writer.py {{seed}} {shift} {extra}"
    given = {"metric": "val_loss", "better": "lower", "choose_by": "val_loss", "choose_better": "lower"}
    return Comparison("", (("base", base), ("new", new)), **(given | changes))


def test_commands_report_by_json_lines_or_by_a_file(tmp_path):
    config = commands(tmp_path)
    done = run(compare_commands(config), config, seeds=2, out=tmp_path / "runs", workers=1)
    found = jobs(done.folder)
    assert found["new", 1].metrics["val_loss"] == pytest.approx(1 / 3 + 0.01 - 0.1)
    assert "starting" in (done.folder / "new" / "seed-1" / "trial-0.txt").read_text()
    by_file = commands(tmp_path, metric="accuracy", better="higher", choose_by="accuracy", choose_better="higher")
    done = run(compare_commands(by_file), by_file, seeds=1, out=tmp_path / "runs", workers=1)
    assert jobs(done.folder)["new", 0].metrics == {"accuracy": 0.1}


def test_a_command_that_fails_says_what_it_printed(tmp_path):
    config = commands(tmp_path, shift="9")
    done = run(compare_commands(config), config, seeds=1, out=tmp_path / "runs", workers=1)
    (failure,) = done.failures
    assert "ended with code 1" in failure.error
    assert "it does not work" in failure.error


def test_a_command_may_take_only_so_long_and_leaves_no_process(tmp_path):
    config = commands(tmp_path, extra="60", time_limit=1.0)
    done = run(compare_commands(config), config, seeds=1, out=tmp_path / "runs", workers=1)
    assert {failure.error.split(":")[0] for failure in done.failures} == {"TimeoutError"}
    assert not running(tmp_path)


def running(tmp_path):
    return subprocess.run(["pgrep", "-f", f"{tmp_path}/writer.py"], capture_output=True, text=True).stdout.split()


@pytest.mark.skipif(sys.platform != "linux", reason="the system ends a killed process's children on Linux alone")
def test_a_killed_run_leaves_no_command_behind(tmp_path):
    commands(tmp_path)
    script = f"""
from pathlib import Path
import sys
from weightsmith.lab.compare import Comparison, compare_commands
from weightsmith.lab.run import run
arm = f"exec {{sys.executable}} {tmp_path}/writer.py {{{{seed}}}} 0 60"
config = Comparison("", (("base", arm),), "val_loss", "lower", choose_by="val_loss", choose_better="lower")
run(compare_commands(config), config, seeds=1, out=Path({str(tmp_path)!r}), workers=1)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while not running(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    deadline = time.monotonic() + 10
    while running(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not running(tmp_path)


@pytest.mark.parametrize(
    ("arm", "message"),
    [
        ("python train.py", r"must use \{seed\}"),
        ("python train.py {seed} {width}", r"unknown placeholder \{width\}"),
        ("python train.py --seed {sede}", r"unknown placeholder \{sede\}; known: \['folder', 'seed'\]"),
        ("no-such-program {seed}", "arm 'base': there is no program 'no-such-program'"),
        ("OMP_NUM_THREADS=1 ./no-such-script {seed}", "there is no program './no-such-script'"),
    ],
)
def test_commands_that_cannot_be_repeated_are_refused(arm, message):
    with pytest.raises(UsageError, match=message):
        compare_commands(Comparison("", (("base", arm),), "loss", "lower"))


@pytest.mark.parametrize(
    "arm",
    [
        "exec echo {seed}",
        "cd . && echo {seed}",
        "for i in 1 2; do echo {seed}; done",
        "A=1 echo {seed}",
        "PATH=/elsewhere:$PATH own-program {seed}",
        "(no-such-program {seed})",
        "$HOME/bin/program {seed}",
    ],
)
def test_what_the_shell_knows_or_alone_could_tell_is_not_refused(arm):
    compare_commands(Comparison("", (("base", arm),), "loss", "lower"))


def test_programs_of_other_machines_are_not_looked_up():
    compare_commands(Comparison("", (("base", "no-such-program {seed}"),), "loss", "lower"), here=False)


def test_a_program_that_the_shell_does_not_find_is_refused_by_the_first_job(tmp_path):
    arms = (("base", "cd . && no-such-program {seed}"), ("new", "echo {seed}"))
    config = Comparison("", arms, "loss", "lower", choose_by="loss", choose_better="lower")
    with pytest.raises(UsageError, match="ended with code 127"):
        run(compare_commands(config), config, seeds=3, out=tmp_path, workers=1)


def test_a_command_must_use_every_swept_value():
    arms = (("base", "echo {seed} {lr}"), ("new", "echo {seed}"))
    with pytest.raises(UsageError, match=r"--sweep lr: the command of arm 'new' must use \{lr\}"):
        compare_commands(Comparison("", arms, "loss", "lower", sweep=(("lr", ("1", "2")),)))
    with pytest.raises(UsageError, match="--sweep seed"):
        compare_commands(Comparison("", arms[1:], "loss", "lower", sweep=(("seed", ("1", "2")),)))


def test_commands_are_titled_by_what_is_compared():
    arms = (("base", "echo {seed}"), ("new", "echo {seed}"))
    assert compare_commands(Comparison("", arms, "loss", "lower")).title == "new against base"
    assert compare_commands(Comparison("", arms[:1], "loss", "lower")).title == "base"


def test_an_integer_beyond_the_floats_is_infinite(tmp_path):
    arm = f"""echo '{{"loss": {{seed}}, "steps": 1{"0" * 400}}}'"""
    config = Comparison("", (("base", arm),), "loss", "lower", choose_by="loss", choose_better="lower")
    done = run(compare_commands(config), config, seeds=[2], out=tmp_path, workers=1)
    assert jobs(done.folder)["base", 2].metrics == {"loss": 2.0}


def test_results_of_an_attempt_that_was_killed_do_not_count(tmp_path):
    fail = f"test -e {tmp_path}/go || exit 1"
    arm = (
        f"""echo '{{"loss": 7, "old": 1}}' >> $WEIGHTSMITH_RESULT; {fail}; cp $WEIGHTSMITH_RESULT {tmp_path}/{{seed}}"""
    )
    config = Comparison("", (("base", arm),), "loss", "lower", choose_by="loss", choose_better="lower")
    assert run(compare_commands(config), config, seeds=1, out=tmp_path / "runs", workers=1).failures
    (tmp_path / "go").touch()
    assert run(compare_commands(config), config, seeds=1, out=tmp_path / "runs", workers=1).finished
    assert len((tmp_path / "0").read_text().splitlines()) == 1


def test_finished_jobs_tell_the_time_of_those_that_are_left(tmp_path):
    config = commands(tmp_path)
    experiment = compare_commands(config)
    assert estimate(experiment, config, seeds=3, workers=1, out=tmp_path / "runs").seconds is None
    done = run(experiment, config, seeds=1, out=tmp_path / "runs", workers=1)
    total = sum(job.wall_seconds for job in jobs(done.folder).values())
    found = estimate(experiment, config, seeds=3, workers=2, out=tmp_path / "runs")
    assert (found.finished, found.whole) == (2, True)
    assert found.seconds == {3: pytest.approx(2 * total / 2)}
    again = estimate(experiment, config, seeds=3, workers=2, out=tmp_path / "runs", fresh=True)
    assert again.seconds == {3: pytest.approx(3 * total / 2)}


def test_braces_of_other_languages_are_left_alone(tmp_path):
    arm = """awk -v s={seed} 'BEGIN { print "{\\"score\\": " s "}" }'"""
    config = Comparison("", (("base", arm),), "score", "higher", choose_by="score")
    done = run(compare_commands(config), config, seeds=[4], out=tmp_path, workers=1)
    assert jobs(done.folder)["base", 4].metrics == {"score": 4.0}


def test_the_direction_of_a_metric_is_read_from_its_name_or_asked_for():
    assert direction("val_loss") == ("val_loss", "lower")
    assert direction("val_accuracy") == ("val_accuracy", "higher")
    assert direction("speed:higher") == ("speed", "higher")
    with pytest.raises(UsageError, match="speed:higher or speed:lower"):
        direction("speed")
    with pytest.raises(UsageError, match="must end in"):
        direction("speed:up")


def test_a_job_killed_between_trials_keeps_those_that_are_done(tmp_path):
    log = tmp_path / "log.txt"
    arm = f"""echo {{lr}} >> {log}; echo '{{"loss": {{seed}}}}'; test {{lr}} != 2 || test -e {tmp_path}/go"""
    arms = (("base", arm),)
    config = Comparison("", arms, "loss", "lower", sweep=(("lr", ("1", "2")),), choose_by="loss", choose_better="lower")
    done = run(compare_commands(config), config, seeds=1, out=tmp_path / "runs", workers=1)
    assert done.failures
    (tmp_path / "go").touch()
    again = run(compare_commands(config), config, seeds=1, out=tmp_path / "runs", workers=1)
    assert again.finished == [("base", 0)]
    assert log.read_text().split() == ["1", "2", "2"]
    assert json.loads((again.folder / "base/seed-0/result.json").read_text())["metrics"] == {"loss": 0.0}
