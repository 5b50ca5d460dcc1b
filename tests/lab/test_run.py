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
from weightsmith.lab import record
from weightsmith.lab.run import run


def results(folder):
    return {(job.arm, job.seed): job.metrics for job in record.read_jobs(folder)}


def test_every_arm_runs_with_every_seed_and_leaves_plain_files(tmp_path):
    done = run(toy.EXPERIMENT, toy.Config(), seeds=2, out=tmp_path, workers=1)
    assert done.folder == tmp_path / "toy" / record.config_hash(toy.Config())
    assert sorted(done.finished) == [("better", 0), ("better", 1), ("plain", 0), ("plain", 1)]
    job = done.folder / "better" / "seed-1"
    assert json.loads((job / "result.json").read_text())["metrics"]["score"] == pytest.approx(1.02)
    rows = [json.loads(line) for line in (job / "metrics.jsonl").read_text().splitlines()]
    assert rows[0] == {"step": 0, "loss": 1.0, "phase": "train"}
    assert record.read_run(done.folder)["config"]["gain"] == 1.0


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


def test_some_arms_run_alone_and_claims_wait_for_the_others(tmp_path):
    done = run(toy.EXPERIMENT, toy.Config(), seeds=1, arms=["plain"], out=tmp_path, workers=1)
    assert done.finished == [("plain", 0)]
    written = record.read_run(done.folder)
    assert [arm["name"] for arm in written["arms"]] == ["plain"]
    assert written["claims"] == []
    done = run(toy.EXPERIMENT, toy.Config(), seeds=1, arms=["better"], out=tmp_path, workers=1)
    assert [arm["name"] for arm in record.read_run(done.folder)["arms"]] == ["better", "plain"]
    assert len(record.read_run(done.folder)["claims"]) == 1


def test_an_unknown_arm_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match=r"arm 'bettr'.*better"):
        run(toy.EXPERIMENT, toy.Config(), arms=["bettr"], out=tmp_path)
    assert not list(tmp_path.iterdir())


def test_another_configuration_gets_another_folder(tmp_path):
    one = run(toy.EXPERIMENT, toy.Config(), seeds=1, out=tmp_path, workers=1)
    two = run(toy.EXPERIMENT, toy.Config(gain=2.0), seeds=1, out=tmp_path, workers=1)
    assert one.folder != two.folder


def test_a_pool_of_processes_gives_the_same_results(tmp_path):
    alone = run(toy.EXPERIMENT, toy.Config(), seeds=3, out=tmp_path / "one", workers=1)
    pooled = run(toy.EXPERIMENT, toy.Config(), seeds=3, out=tmp_path / "two", workers=2)
    assert results(alone.folder) == results(pooled.folder)


@pytest.mark.parametrize("workers", [1, 2])
def test_one_broken_job_does_not_take_the_others_down(tmp_path, workers):
    done = run(toy.EXPERIMENT, toy.Config(broken="plain"), seeds=2, out=tmp_path, workers=workers)
    assert sorted(done.finished) == [("better", 0), ("better", 1)]
    assert [(failure.arm, failure.error) for failure in done.failures] == [
        ("plain", "RuntimeError: plain is broken")
    ] * 2
    assert "plain is broken" in (done.folder / "plain" / "seed-0.error.txt").read_text()


def test_a_killed_run_loses_nothing_that_was_finished(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import toy
from pathlib import Path
from weightsmith.lab.run import run
run(toy.EXPERIMENT, toy.Config(seconds=0.4), seeds=20, out=Path({str(tmp_path)!r}), workers=2)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    folder = tmp_path / "toy" / record.config_hash(toy.Config(seconds=0.4))
    deadline = time.monotonic() + 60
    while len(list(folder.glob("*/seed-*/result.json"))) < 3 and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = results(folder)
    assert 3 <= len(finished) < 40
    again = run(toy.EXPERIMENT, toy.Config(seconds=0.4), seeds=[0, 1], out=tmp_path, workers=2)
    assert set(again.skipped) <= set(finished)
    assert {("better", 0), ("plain", 1)} <= set(results(folder))


def test_workers_do_not_outlive_a_killed_parent(tmp_path):
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parent)!r})
import toy
from pathlib import Path
from weightsmith.lab.run import run
out = {str(tmp_path)!r}
run(toy.EXPERIMENT, toy.Config(seconds=3.0, counter=out), seeds=20, out=Path(out), workers=2)
"""
    process = subprocess.Popen([sys.executable, "-c", script])
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("*-*-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    time.sleep(2.5)
    calls = len(list(tmp_path.glob("*-*-*")))
    time.sleep(4.0)
    assert len(list(tmp_path.glob("*-*-*"))) == calls


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
        ({"engine": "cloud"}, "engine 'cloud' is not known"),
    ],
)
def test_bad_arguments_are_refused(tmp_path, options, message):
    with pytest.raises(UsageError, match=message):
        run(toy.EXPERIMENT, toy.Config(), out=tmp_path, **options)


def test_a_job_that_forgets_a_metric_fails_with_its_name(tmp_path):
    experiment = dataclasses.replace(toy.EXPERIMENT, job=lambda *_: {"score": 1.0})
    done = run(experiment, toy.Config(), seeds=1, out=tmp_path, workers=1)
    assert "did not return cost" in done.failures[0].error


def test_a_claim_about_an_arm_that_is_not_run_is_refused(tmp_path):
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


@pytest.mark.parametrize("content", ["", "{", '{"arm": "better"}', "[]"])
def test_a_damaged_result_says_what_to_delete(tmp_path, content):
    done = run(toy.EXPERIMENT, toy.Config(), seeds=1, out=tmp_path, workers=1)
    path = done.folder / "plain" / "seed-0" / "result.json"
    path.write_text(content)
    with pytest.raises(UsageError, match=r"result\.json is damaged.*delete .*seed-0"):
        list(record.read_jobs(done.folder))


def test_a_folder_that_is_no_run_points_to_the_runs_below_it(tmp_path):
    done = run(toy.EXPERIMENT, toy.Config(), seeds=1, out=tmp_path, workers=1)
    with pytest.raises(UsageError, match=f"is not a run folder.*{done.folder.name}"):
        record.read_run(tmp_path)
    (done.folder / "run.json").write_text("{")
    with pytest.raises(UsageError, match="damaged"):
        record.read_run(done.folder)


def test_peak_memory_is_that_of_the_job():
    with record.Stopwatch() as small:
        pass
    with record.Stopwatch() as large:
        held = bytearray(300 * 2**20)
    del held
    assert large.peak_memory - small.peak_memory > 200 * 2**20
    if sys.platform == "linux" and os.access("/proc/self/clear_refs", os.W_OK):
        with record.Stopwatch() as after:
            pass
        assert after.peak_memory < large.peak_memory


def test_a_real_ray_cluster_of_two_workers_gives_the_same_results(tmp_path):
    ray = pytest.importorskip("ray")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0, "include_dashboard": False})
    try:
        for _ in range(2):
            cluster.add_node(num_cpus=1)
        here = os.pathsep.join(sys.path)
        ray.init(address=cluster.address, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": here}})
        far = run(toy.EXPERIMENT, toy.Config(seconds=0.2), seeds=3, out=tmp_path / "ray", engine="ray")
    finally:
        ray.shutdown()
        cluster.shutdown()
    near = run(toy.EXPERIMENT, toy.Config(seconds=0.2), seeds=3, out=tmp_path / "local", workers=1)
    assert results(far.folder) == results(near.folder)
    assert not far.failures
