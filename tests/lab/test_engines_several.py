"""Jobs that several processes do together, on CPUs, as ``torchrun`` starts them."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import toy
from test_run import results, wait_for

from weightsmith.lab import record
from weightsmith.lab.run import run

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


def launched(config, out, **options):
    """Run the toy experiment that trains in two processes together."""
    script = out.parent / f"script-{time.monotonic_ns()}.py"
    script.write_text(f"""
import os, sys; sys.path.insert(0, {str(HERE)!r})
import toy
from pathlib import Path
from weightsmith.lab.engines import distributed
Path(__file__).with_suffix("." + os.environ["RANK"]).write_text(str(os.getpid()))
from weightsmith.lab.run import run
distributed._PATIENCE = 2.0
done = run(toy.TRAINED, toy.{config!r}, out=Path({str(out)!r}), **{options!r})
print(sorted(done.finished), sorted(done.skipped), [failure.error for failure in done.failures])
""")
    return [*TORCHRUN, str(script)]


def outcome(config, out, **options):
    return subprocess.run(launched(config, out, **options), capture_output=True, text=True, timeout=150)


def test_two_processes_share_each_batch(tmp_path):
    """On CPUs Accelerate does not notice ``torchrun`` by itself: each process would train alone."""
    script = tmp_path / "script.py"
    script.write_text("""
from accelerate import PartialState
from weightsmith.lab.engines import engine_named
from weightsmith.lab.experiment import Resources
with engine_named("local", resources=Resources()):
    print(f"{PartialState().num_processes}\\n", end="")  # in one piece: both write to the same pipe
""")
    done = subprocess.run([*TORCHRUN, str(script)], capture_output=True, text=True, timeout=150)
    assert done.stdout.split() == ["2", "2"], done.stderr


@pytest.mark.slow
def test_two_processes_do_every_job_together_and_skip_what_is_done(tmp_path):
    calls = tmp_path / "calls"
    calls.mkdir()
    config = toy.Config(steps=6, counter=str(calls))
    alone = run(toy.TRAINED, toy.Config(steps=6), seeds=2, out=tmp_path / "alone", workers=1)
    first = outcome(config, tmp_path / "runs", seeds=1)
    assert first.returncode == 0, first.stderr
    assert first.stdout.count("[('better', 0), ('plain', 0)] [] []") == 2
    (folder,) = (tmp_path / "runs" / "trained").iterdir()
    (folder / "plain" / "seed-0" / "result.json").write_text("{")
    again = outcome(config, tmp_path / "runs", seeds=2)
    assert again.returncode == 0, again.stderr
    assert again.stdout.count("[('better', 1), ('plain', 0), ('plain', 1)] [('better', 0)] []") == 2
    found, expected = results(folder), results(alone.folder)
    assert found.keys() == expected.keys()
    for name in found:
        assert found[name] == pytest.approx(expected[name], rel=1e-4)
    assert len(list(calls.glob("start-*"))) == 4  # both processes take part, once per seed


@pytest.mark.slow
def test_two_processes_that_were_killed_in_the_middle_resume_to_the_same_last_bit(tmp_path):
    config = toy.Config(steps=60, seconds=0.05)
    whole = outcome(config, tmp_path / "whole", seeds=1)
    assert whole.returncode == 0, whole.stderr
    command = launched(config, tmp_path / "runs", seeds=1)
    process = subprocess.Popen(command)
    rows = (tmp_path / "runs").glob
    wait_for(lambda: any(path.read_text().count("\n") > 8 for path in rows("trained/*/work/plain-*/rows.jsonl")))
    for rank in "01":
        os.kill(int(Path(command[-1]).with_suffix(f".{rank}").read_text()), signal.SIGKILL)
    assert process.wait() != 0
    assert list(rows("trained/*/work/plain-seed-0/fit.pt"))
    resumed = outcome(config, tmp_path / "runs", seeds=1)
    assert resumed.stdout.count("[('plain', 0)] [('better', 0)] []") == 2, resumed.stderr

    def jobs(name):
        (folder,) = (tmp_path / name / "trained").iterdir()
        jobs = record.read_jobs(folder)
        return [(job.metrics, job.rows, {name: part.tolist() for name, part in job.scores.items()}) for job in jobs]

    assert jobs("runs") == jobs("whole")


@pytest.mark.slow
def test_an_error_of_one_process_alone_ends_all_and_is_told(tmp_path):
    done = outcome(toy.Config(steps=4, broken="better", kill=1), tmp_path / "runs", seeds=1)
    assert done.returncode != 0
    assert "better, seed 0 failed on one process only" in done.stderr
    (trace,) = (tmp_path / "runs").glob("trained/*/better/seed-0.error.txt")
    assert "better is broken" in trace.read_text()


@pytest.mark.slow
def test_an_error_of_all_processes_costs_its_own_job(tmp_path):
    done = outcome(toy.Config(steps=4, broken="better", kill=0), tmp_path / "runs", seeds=1)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("[('plain', 0)] [] ['RuntimeError: better is broken']") == 2
