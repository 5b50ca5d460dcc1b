import contextlib
import dataclasses
import os
import pickle
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy
from test_run import results, started, wait_for

from weightsmith.lab import record
from weightsmith.lab.engines.base import Done, Failure, Work
from weightsmith.lab.engines.local import _environments, local, worker_count
from weightsmith.lab.experiment import Resources
from weightsmith.lab.run import run


def children(process):
    """Processes that a process has started, on Linux."""
    found = []
    for path in Path(f"/proc/{process}/task").glob("*/children"):
        with contextlib.suppress(OSError):
            found += map(int, path.read_text().split())
    return [child for child in found if "serve()" in Path(f"/proc/{child}/cmdline").read_text()]


def works(folder, seeds, config=None, experiment=toy.EXPERIMENT):
    return [Work(experiment, config or toy.Config(), folder, "plain", seed) for seed in seeds]


def test_a_pool_gives_the_same_results_and_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path / "temporary"))
    (tmp_path / "temporary").mkdir()
    calls = tmp_path / "calls"
    calls.mkdir()
    config = toy.Config(steps=6, counter=str(calls))
    alone = run(toy.TRAINED, config, seeds=2, out=tmp_path / "one", workers=1)
    assert len(list(calls.glob("start-*"))) == 2
    pooled = run(toy.TRAINED, config, seeds=2, out=tmp_path / "two", workers=2)
    assert len(list(calls.glob("start-*"))) == 4  # once per seed, although two workers need it at a time
    assert results(alone.folder) == results(pooled.folder)
    assert not list((tmp_path / "temporary").iterdir())
    assert not list((pooled.folder / "work").glob("*/*"))
    assert not children(os.getpid())


@pytest.mark.slow
def test_workers_that_are_killed_idle_busy_or_starting_are_replaced(tmp_path):
    with local(resources=Resources(), workers=2) as do_all:
        assert list(do_all(works(tmp_path, [0]))) == [Done("plain", 0)]
        (idle,) = children(os.getpid())
        os.kill(idle, signal.SIGKILL)
        kill_once = toy.Config(kill_once=str(tmp_path / "killed"))
        assert list(do_all(works(tmp_path, [1], kill_once))) == [Done("plain", 1)]
        assert (tmp_path / "killed").exists()
        outcomes = do_all(works(tmp_path, [2, 3], toy.Config(seconds=0.2)))
        first = next(outcomes)
        assert isinstance(first, Done)
        assert {first.seed, *(outcome.seed for outcome in outcomes)} == {2, 3}
        always = list(do_all(works(tmp_path, [4, 5], toy.Config(kill=4))))
        assert Done("plain", 5) in always
        (failure,) = (outcome for outcome in always if isinstance(outcome, Failure))
        assert failure.error == "its process was killed twice (signal SIGKILL; often too little memory)"
        assert "killed twice" in (tmp_path / "plain" / "seed-4.error.txt").read_text()
    assert not children(os.getpid())


def test_a_job_may_take_only_so_long(tmp_path):
    done = run(toy.EXPERIMENT, toy.Config(slow="plain"), seeds=1, out=tmp_path, workers=2, time_limit=1.5)
    assert done.finished == [("better", 0)]
    assert done.failures[0].error == "it took longer than the time limit of 1.5 seconds"
    assert not children(os.getpid())


def test_workers_end_with_a_parent_that_is_killed_and_not_reaped(tmp_path):
    process = started(toy.Config(seconds=30.0, counter=str(tmp_path)), tmp_path / "runs", seeds=20, workers=2)
    wait_for(lambda: len(list((tmp_path / "runs").glob("toy/*/work/*-seed-*.lock"))) == 2)
    workers = children(process.pid)
    assert len(workers) == 2
    process.send_signal(signal.SIGKILL)  # and not waited for: it stays a zombie
    wait_for(lambda: not any(_runs(worker) for worker in workers), 10)
    process.wait()


def _runs(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_job_that_leaves_the_interpreter_is_a_failure(tmp_path):
    experiment = dataclasses.replace(toy.EXPERIMENT, job=lambda config, job: sys.exit(3))
    done = run(experiment, toy.Config(), seeds=1, out=tmp_path, workers=1)
    assert [failure.error for failure in done.failures] == ["SystemExit: 3"] * 2


def test_what_a_job_prints_reads_or_cannot_send_does_not_disturb_its_worker(tmp_path, capfd):
    with local(resources=Resources(), workers=2) as do_all:
        outcomes = list(do_all(works(tmp_path, [0], experiment=dataclasses.replace(toy.EXPERIMENT, job=_noisy))))
    assert outcomes[0].error.startswith("Unsendable: no")
    assert capfd.readouterr().err.count("from the job") == 2


class Unsendable(Exception):
    def __init__(self, first, second):
        super().__init__("no")

    def __reduce__(self):
        raise pickle.PicklingError("no")


def _noisy(config, job):
    print("from the job", sys.stdin.read())  # noqa: T201
    subprocess.run(["echo", "from the job"], check=True)
    raise Unsendable(1, 2)


def test_a_module_that_no_other_process_would_find_is_sent_along(tmp_path, monkeypatch):
    from weightsmith.core.load import load_object

    for folder, gain in (("first", 1), ("second", 2)):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "mine.py").write_text(
            f"import toy, dataclasses\ndef job(config, job): return {{'score': {gain}, 'cost': 0}}\n"
            "EXPERIMENT = dataclasses.replace(toy.EXPERIMENT, job=job)\n"
        )
    found = [load_object(str(tmp_path / folder / "mine.py:EXPERIMENT"), "run") for folder in ("first", "second")]
    done = [run(experiment, toy.Config(), seeds=1, out=tmp_path, workers=2) for experiment in found]
    assert [results(each.folder)["plain", 0]["score"] for each in done] == [1, 2]


def test_each_worker_gets_a_gpu_of_its_own_and_keeps_it_when_it_is_replaced(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    assert worker_count(Resources()) == 2
    assert worker_count(Resources(gpus=0.5)) == 4
    environments = _environments(4, 3)
    assert [environment["CUDA_VISIBLE_DEVICES"] for environment in environments] == ["4", "7", "4", "7"]
    assert environments[0].get("OMP_NUM_THREADS") == os.environ.get("OMP_NUM_THREADS", "3")


@pytest.mark.slow
def test_twenty_kills_at_random_moments_end_with_the_undisturbed_results(tmp_path):
    config = toy.Config(steps=40, seconds=0.02)
    whole = run(toy.TRAINED, config, seeds=4, out=tmp_path / "undisturbed", workers=1)
    expected = {(job.arm, job.seed): job for job in record.read_jobs(whole.folder)}
    chance, kills, rounds = random.Random(0), 0, 0
    while kills < 20:
        out = tmp_path / f"round-{rounds}" / "runs"
        rounds += 1
        while len(list(out.glob("trained/*/*/seed-*/result.json"))) < 8:
            process = started(config, out, "TRAINED", seeds=4, workers=2)
            wait_for(lambda out=out, process=process: list(out.glob("trained/*/work")) or process.poll() is not None)
            while process.poll() is None:
                time.sleep(chance.uniform(0.0, 1.5))
                victims = children(process.pid)
                victim = chance.choice([process.pid, *victims, *victims])
                if kills < 20 and process.poll() is None and victim:
                    os.kill(victim, signal.SIGKILL)
                    kills += 1
        run(toy.TRAINED, config, seeds=4, out=out, workers=1)
        (folder,) = (out / "trained").iterdir()
        found = {(job.arm, job.seed): job for job in record.read_jobs(folder)}
        assert found.keys() == expected.keys()
        for name, job in found.items():
            assert (job.metrics, job.rows) == (expected[name].metrics, expected[name].rows)
            assert {key: value.tolist() for key, value in job.scores.items()} == {
                key: value.tolist() for key, value in expected[name].scores.items()
            }
