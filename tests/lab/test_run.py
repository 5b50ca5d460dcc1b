import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy

from weightsmith.core.errors import UsageError
from weightsmith.core.load import load_object
from weightsmith.lab import record
from weightsmith.lab.engines.mirror import mirror
from weightsmith.lab.experiment import Arm
from weightsmith.lab.record import JobResult, read_job
from weightsmith.lab.report import load, to_html
from weightsmith.lab.run import estimate, run, seeds_of

HERE = Path(__file__).parent


def results(folder):
    return {(job.arm, job.seed): job.metrics for job in record.read_jobs(folder) if isinstance(job, JobResult)}


def started(config, out, experiment="EXPERIMENT", **options):
    """Run a toy experiment in a process of its own, as a script without a guard around its main part."""
    script = f"""
import sys; sys.path.insert(0, {str(HERE)!r})
import toy
from pathlib import Path
from weightsmith.lab.run import run
run(toy.{experiment}, toy.{config!r}, out=Path({str(out)!r}), **{options!r})
"""
    out.parent.mkdir(parents=True, exist_ok=True)
    path = out.parent / f"{out.name}-{time.monotonic_ns()}.py"
    path.write_text(script)
    return subprocess.Popen([sys.executable, path])


def wait_for(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_every_arm_runs_with_every_seed_and_leaves_plain_files(tmp_path):
    done = run(toy.EXPERIMENT, toy.Config(), seeds=2, out=tmp_path, workers=1)
    assert done.folder.parent == tmp_path / "toy"
    assert sorted(done.finished) == [("better", 0), ("better", 1), ("plain", 0), ("plain", 1)]
    job = done.folder / "better" / "seed-1"
    assert json.loads((job / "result.json").read_text())["metrics"]["score"] == pytest.approx(1.02)
    rows = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    assert rows[0] == {"step": 0, "loss": 1.0, "phase": "train"}
    written = record.read_run(done.folder)
    assert written["config"]["gain"] == 1.0
    assert written["plan"] == {"looks": [2]}
    assert not list((done.folder / "work").glob("*/*"))


def test_what_is_finished_is_not_run_again(tmp_path):
    calls = tmp_path / "calls"
    calls.mkdir()
    config = toy.Config(counter=str(calls))
    run(toy.EXPERIMENT, config, seeds=2, out=tmp_path, workers=1)
    again = run(toy.EXPERIMENT, config, seeds=3, out=tmp_path, workers=1)
    assert len(again.skipped) == 4
    assert sorted(again.finished) == [("better", 2), ("plain", 2)]
    assert len(list(calls.iterdir())) == 6
    assert record.read_run(again.folder)["seeds"] == [0, 1, 2]
    fresh = run(toy.EXPERIMENT, config, seeds=1, out=tmp_path, workers=1, fresh=True)
    assert (fresh.skipped, len(fresh.finished)) == ([], 2)


def test_seeds_come_until_the_primary_claim_is_decided(tmp_path):
    clear = run(toy.EXPERIMENT, toy.Config(), out=tmp_path, workers=1)
    assert {seed for _, seed in clear.finished} == set(range(3)) or {seed for _, seed in clear.finished} == set(
        range(5)
    )
    nothing = run(toy.EXPERIMENT, toy.Config(gain=0.0, noise=True), out=tmp_path, workers=1)
    assert len(nothing.finished) == 40
    assert record.read_run(nothing.folder)["plan"] == {"looks": [3, 5, 10, 20]}


def test_some_arms_run_alone_and_the_family_stays(tmp_path):
    done = run(toy.EXPERIMENT, toy.Config(), seeds=1, arms=["plain"], out=tmp_path, workers=1)
    assert done.finished == [("plain", 0)]
    written = record.read_run(done.folder)
    assert [arm["name"] for arm in written["arms"]] == ["better", "plain"]
    assert written["left_out"] == ["better"]
    assert len(written["claims"]) == 1
    run(toy.EXPERIMENT, toy.Config(), seeds=1, arms=["better"], out=tmp_path, workers=1)
    assert results(done.folder).keys() == {("better", 0), ("plain", 0)}


def test_an_unknown_arm_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match=r"arm 'bettr'.*better"):
        run(toy.EXPERIMENT, toy.Config(), arms=["bettr"], out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_question_gets_another_folder_and_says_why(tmp_path):
    one = run(toy.EXPERIMENT, toy.Config(), seeds=1, out=tmp_path, workers=1)
    assert run(toy.EXPERIMENT, toy.Config(), seeds=1, out=tmp_path, workers=1).folder == one.folder
    other = run(toy.EXPERIMENT, toy.Config(gain=2.0), seeds=1, out=tmp_path, workers=1)
    assert (other.folder != one.folder, other.news) == (True, [])
    revised = dataclasses.replace(toy.EXPERIMENT, revision=2)
    third = run(revised, toy.Config(), seeds=1, out=tmp_path, workers=1)
    assert third.folder not in (one.folder, other.folder)
    assert third.news == [f"experiment changed since {one.folder}: nothing of it is reused"]
    code = run(dataclasses.replace(toy.EXPERIMENT, code="x"), toy.Config(), seeds=1, out=tmp_path, workers=1)
    assert "data and model code changed" in code.news[0]


def test_the_same_question_has_the_same_folder_in_another_process(tmp_path):
    here = run(toy.EXPERIMENT, toy.Config(), seeds=1, out=tmp_path / "runs", workers=1)
    started(toy.Config(), tmp_path / "runs", seeds=1, workers=1).wait(timeout=60)
    assert list((tmp_path / "runs" / "toy").iterdir()) == [here.folder]


@pytest.mark.parametrize("workers", [1, 2])
def test_one_broken_job_does_not_take_the_others_down(tmp_path, workers):
    done = run(toy.EXPERIMENT, toy.Config(broken="plain"), seeds=2, out=tmp_path, workers=workers)
    assert sorted(done.finished) == [("better", 0), ("better", 1)]
    assert [(failure.arm, failure.error) for failure in done.failures] == [
        ("plain", "RuntimeError: plain is broken")
    ] * 2
    assert "plain is broken" in (done.folder / "plain" / "seed-0.error.txt").read_text()


@pytest.mark.slow
def test_a_killed_run_loses_nothing_that_was_finished(tmp_path):
    out = tmp_path / "runs"
    config = toy.Config(seconds=0.4)
    process = started(config, out, seeds=20, workers=2)
    wait_for(lambda: len(list(out.glob("toy/*/*/seed-*/result.json"))) >= 3)
    process.send_signal(signal.SIGKILL)
    process.wait()
    (folder,) = (out / "toy").iterdir()
    finished = results(folder)
    assert 3 <= len(finished) < 40
    again = run(toy.EXPERIMENT, config, seeds=[0, 1], out=out, workers=2)
    assert set(again.skipped) <= set(finished)
    assert {("better", 0), ("plain", 1)} <= set(results(folder))


@pytest.mark.slow
def test_two_runs_into_one_folder_share_the_work(tmp_path):
    calls = tmp_path / "calls"
    calls.mkdir()
    config = toy.Config(seconds=0.3, counter=str(calls))
    processes = [started(config, tmp_path / "runs", seeds=6, workers=1) for _ in range(2)]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    (folder,) = (tmp_path / "runs" / "toy").iterdir()
    assert len(results(folder)) == 12
    assert len(list(calls.iterdir())) == 12


def test_a_configuration_that_cannot_run_writes_nothing(tmp_path):
    with pytest.raises(UsageError, match="data 'nowhere' is not known"):
        run(toy.EXPERIMENT, toy.Config(data="nowhere"), out=tmp_path)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seeds": 0}, "seeds must be"),
        ({"seeds": [1, 1]}, "seeds must be"),
        ({"seeds": [-1]}, "seeds must be"),
        ({"workers": 0}, "workers must be at least 1, got 0"),
        ({"time_limit": 0}, "time_limit must be above 0 seconds, got 0"),
        ({"engine": "cloud"}, "engine 'cloud' is not known"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        run(toy.EXPERIMENT, toy.Config(), out=tmp_path, **options)


def test_seeds_are_read_from_text():
    assert [seeds_of(text) for text in ("auto", "5", "0,3,4")] == ["auto", 5, [0, 3, 4]]
    with pytest.raises(UsageError, match="seeds must be auto"):
        seeds_of("many")


def test_a_job_that_forgets_a_metric_fails_with_its_name(tmp_path):
    experiment = dataclasses.replace(toy.EXPERIMENT, job=lambda *_: {"score": 1.0})
    done = run(experiment, toy.Config(), seeds=1, out=tmp_path, workers=1)
    assert "did not return cost" in done.failures[0].error


def test_a_metric_that_is_not_measured_is_left_out(tmp_path):
    experiment = dataclasses.replace(toy.EXPERIMENT, job=lambda *_: {"score": 1.0, "cost": None})
    done = run(experiment, toy.Config(), seeds=1, out=tmp_path, workers=1)
    assert results(done.folder)["plain", 0] == {"score": 1.0}


@pytest.mark.parametrize("name", ["start", "work"])
def test_an_arm_named_as_a_folder_of_the_run_is_refused(tmp_path, name):
    experiment = dataclasses.replace(toy.EXPERIMENT, arms=lambda config: [Arm(name, "")], claims=lambda config: [])
    with pytest.raises(UsageError, match=f"an arm cannot be named '{name}'"):
        run(experiment, toy.Config(), seeds=1, out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_a_claim_about_an_arm_that_does_not_exist_is_refused(tmp_path):
    experiment = dataclasses.replace(toy.EXPERIMENT, arms=lambda config: toy.EXPERIMENT.arms(config)[:1])
    with pytest.raises(UsageError, match="names an arm"):
        run(experiment, toy.Config(), out=tmp_path)


def test_an_out_folder_that_cannot_be_written_is_an_os_error(tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(OSError):
        run(toy.EXPERIMENT, toy.Config(), seeds=1, out=tmp_path / "file")


def test_a_full_disk_stops_the_run_and_keeps_what_was_written(tmp_path, monkeypatch):
    write, calls = record.write_job, []

    def until_full(folder, result):
        calls.append(result.arm)
        if len(calls) > 2:
            raise OSError(28, "No space left on device")
        write(folder, result)

    monkeypatch.setattr(record, "write_job", until_full)
    with pytest.raises(OSError, match="No space left"):
        run(toy.EXPERIMENT, toy.Config(), seeds=3, out=tmp_path, workers=1)
    monkeypatch.undo()
    assert len(run(toy.EXPERIMENT, toy.Config(), seeds=3, out=tmp_path, workers=1).skipped) == 2


@pytest.mark.parametrize("content", ["", "{", '{"arm": "better"}', "[]", "[" * 100_000, None])
def test_a_damaged_or_misplaced_result_is_put_aside_and_done_again(tmp_path, content):
    done = run(toy.EXPERIMENT, toy.Config(), seeds=1, out=tmp_path, workers=1)
    path = done.folder / "plain" / "seed-0" / "result.json"
    path.write_text(content if content is not None else (done.folder / "better/seed-0/result.json").read_text())
    (damaged,) = (job for job in record.read_jobs(done.folder) if not isinstance(job, JobResult))
    assert str(path) in str(damaged)
    again = run(toy.EXPERIMENT, toy.Config(), seeds=1, out=tmp_path, workers=1)
    assert again.finished == [("plain", 0)]
    assert len(list((done.folder / "plain").glob("seed-0.damaged-*"))) == 1


def test_a_folder_that_is_no_run_points_to_the_runs_below_it(tmp_path):
    done = run(toy.EXPERIMENT, toy.Config(), seeds=1, out=tmp_path, workers=1)
    with pytest.raises(UsageError, match=f"is not a run folder.*{done.folder.name}"):
        record.read_run(tmp_path)
    (done.folder / "run.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        record.read_run(done.folder)


def test_what_the_arms_of_a_seed_share_is_made_once_and_made_again_when_damaged(tmp_path):
    calls = tmp_path / "calls"
    calls.mkdir()
    config = toy.Config(counter=str(calls))
    experiment = dataclasses.replace(toy.EXPERIMENT, start=toy.start, job=toy.started_job)
    done = run(experiment, config, seeds=2, out=tmp_path / "runs", workers=2)
    assert not done.failures
    assert len(list(calls.glob("start-*"))) == 2
    (done.folder / "start" / "seed-0.pt").write_bytes(b"cut off")
    again = run(experiment, config, seeds=1, out=tmp_path / "runs", workers=1, fresh=False)
    assert len(again.skipped) == 2
    for file in (done.folder / "plain").glob("seed-0/*"):
        file.unlink()
    assert run(experiment, config, seeds=1, out=tmp_path / "runs", workers=1).finished == [("plain", 0)]
    assert len(list(calls.glob("start-*"))) == 3


def test_an_estimate_counts_jobs_before_anything_runs():
    found = estimate(toy.EXPERIMENT, toy.Config(), workers=2)
    assert found.jobs == {3: 6, 5: 10, 10: 20, 20: 40}
    assert (found.seconds, found.memory, found.workers) == (None, None, 2)
    assert estimate(toy.EXPERIMENT, toy.Config(), seeds=4, arms=["plain"]).jobs == {4: 4}
    with pytest.raises(UsageError, match="arm"):
        estimate(toy.EXPERIMENT, toy.Config(), arms=["plane"])


def test_a_run_announces_the_cost_that_an_estimate_tells(tmp_path):
    told = []
    run(toy.EXPERIMENT, toy.Config(), seeds=1, out=tmp_path, workers=1, announce=told.append)
    assert told == [estimate(toy.EXPERIMENT, toy.Config(), seeds=1, workers=1)]


def test_who_watches_is_told_of_jobs_that_were_done_before(tmp_path):
    seen = []

    @contextlib.contextmanager
    def watch(result, total):
        yield lambda: seen.append(len(result.skipped) + len(result.finished))

    for _ in range(2):
        seen.clear()
        run(toy.EXPERIMENT, toy.Config(), seeds=1, out=tmp_path, workers=1, watch=watch)
    assert seen == [2]


def test_an_experiment_times_its_own_step():
    experiment = dataclasses.replace(toy.EXPERIMENT, steps=lambda config, arm: 5, step_seconds=lambda config: 2.0)
    found = estimate(experiment, toy.Config(), seeds=3, workers=2)
    assert (found.seconds, found.whole) == ({3: 30.0}, True)
    unknown = dataclasses.replace(experiment, step_seconds=lambda config: None)
    assert estimate(unknown, toy.Config(), seeds=3, workers=2).seconds is None


@pytest.mark.slow
def test_finding_ten_thousand_finished_jobs_takes_seconds(tmp_path):
    run(toy.EXPERIMENT, toy.Config(), seeds=5000, out=tmp_path, workers=2)
    begin = time.perf_counter()
    again = run(toy.EXPERIMENT, toy.Config(), seeds=5000, out=tmp_path, workers=2)
    assert len(again.skipped) == 10_000
    assert time.perf_counter() - begin < 60  # a hang, not a speed


@pytest.mark.slow
def test_a_real_ray_cluster_survives_a_killed_worker_and_gives_the_same_results(tmp_path):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        here = os.pathsep.join(sys.path)
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": here}})
        config = toy.Config(seconds=0.2, kill_once=str(tmp_path / "killed"))
        far = run(toy.EXPERIMENT, config, seeds=3, out=tmp_path / "ray", engine="ray")
    finally:
        ray.shutdown()
        cluster.shutdown()
    near = run(toy.EXPERIMENT, config, seeds=3, out=tmp_path / "local", workers=1)
    assert (tmp_path / "killed").exists()
    assert results(far.folder) == results(near.folder)
    assert not far.failures


AWAY = """
import away_package.part
import toy
def job(config, job):
    import away_lazily
    return {"score": away_package.part.SCORE, "cost": away_lazily.COST}
EXPERIMENT = toy.replace(toy.EXPERIMENT, slug="away", job=job)
"""


def _away(folder):
    (folder / "away_package").mkdir(parents=True)
    (folder / "away_package" / "__init__.py").touch()
    (folder / "away_package" / "part.py").write_text("SCORE = 3.0\n")
    (folder / "away_lazily.py").write_text("COST = 4.0\n")
    (folder / "away-experiment.py").write_text(AWAY)
    return folder / "away-experiment.py"


def test_a_mirror_holds_the_modules_of_a_user_and_what_they_import(tmp_path):
    script = _away(tmp_path / "away")
    load_object(f"{script}:EXPERIMENT", "run")
    (tmp_path / "mirror").mkdir()
    names = {path.name for path in mirror(tmp_path / "mirror")}
    assert {"away_package", "away_lazily.py", "away-experiment.py", "toy.py"} <= names
    code = "import away_package.part, away_lazily; print(away_package.part.__file__)"
    environment = {**os.environ, "PYTHONPATH": str(tmp_path / "mirror")}
    shown = subprocess.run(
        [sys.executable, "-c", code], cwd="/", env=environment, capture_output=True, text=True, check=True
    )
    assert shown.stdout.strip() == str(tmp_path / "mirror" / "away_package" / "part.py")


@pytest.mark.slow
def test_code_of_any_folder_travels_to_a_cluster(tmp_path, monkeypatch):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    script = _away(tmp_path / "away")
    experiment = load_object(f"{script}:EXPERIMENT", "run")
    connect = ray.init

    def connect_and_lose(**options):  # as on a machine that does not have the files
        connect(**options)
        script.parent.rename(tmp_path / "gone")

    monkeypatch.setattr(ray, "init", connect_and_lose)
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    try:
        far = run(experiment, toy.Config(), seeds=2, out=tmp_path / "runs", engine="ray", address=cluster.address)
    finally:
        ray.shutdown()
        cluster.shutdown()
    assert not far.failures
    assert {read_job(path.parent).metrics["cost"] for path in far.folder.glob("*/seed-*/result.json")} == {4.0}


def test_nothing_to_do_starts_no_cluster(tmp_path):
    ray = pytest.importorskip("ray")
    run(toy.EXPERIMENT, toy.Config(), seeds=1, out=tmp_path, workers=1)
    run(toy.EXPERIMENT, toy.Config(), seeds=1, out=tmp_path, engine="ray")
    assert not ray.is_initialized()


def test_an_experiment_without_a_task_says_what_its_jobs_run_on(tmp_path):
    facts = {"data": "counted sheep", "model": "a shepherd"}
    experiment = dataclasses.replace(toy.EXPERIMENT, facts=lambda config: facts | {"steps": str(config.steps)})
    done = run(experiment, toy.Config(), seeds=1, out=tmp_path, workers=1)
    assert record.read_run(done.folder)["task"]["facts"] == facts | {"steps": str(toy.Config().steps)}
    page = to_html(load(done.folder))
    assert "On counted sheep; model a shepherd; 1 seed per arm." in page
