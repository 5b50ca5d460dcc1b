"""Every experiment, killed at random moments and started again, ends with the numbers of a run that was left alone."""

import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from test_engines_local import children
from test_run import wait_for

from weightsmith.lab import record
from weightsmith.techniques import TECHNIQUES

KILLS = 20
TIMED = ("seconds", "step_ms", "setup_ms")
"""What a clock measured differs from run to run; names that begin so are not compared."""


def started(slug, out, log):
    command = [sys.executable, "-m", "weightsmith.cli", "run", slug, "--preset", "smoke", "--out", str(out)]
    with log.open("ab") as told:
        return subprocess.Popen(
            [*command, "--seeds", "1", "--workers", "2"], start_new_session=True, stdout=told, stderr=told
        )


def alive(session):
    """Processes of a session that still run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            state, _, _, own = path.read_text().rpartition(")")[2].split()[:4]
            if int(own) == session and state != "Z":
                found.append(path.parent.name)
    return found


def untimed(numbers):
    return {name: repr(value) for name, value in numbers.items() if not name.startswith(TIMED)}  # repr: nan equals nan


def told_by(out):
    """Per job all that it leaves, but for what a clock measured."""
    return {
        (job.arm, job.seed): (
            untimed(job.metrics),
            [untimed(row) for row in job.rows],
            {name: values.tolist() for name, values in job.scores.items() if not name.startswith(TIMED)},
            job.diverged,
        )
        for folder in out.glob("*/*/")
        for job in record.read_jobs(folder)
    }


def left_behind(out):
    unwanted = ("*.lock", ".*.tmp", "*.error.txt", "*.damaged-*", "work/*")
    return [str(path) for pattern in unwanted for path in out.glob(f"*/*/**/{pattern}")]


def killed_once(process, chance, most):
    """Kill the parent or a worker at a random moment; whether there was anything left to kill."""
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(chance.uniform(0, most))
    if process.poll() is not None:
        return False
    try:
        workers = children(process.pid)
        os.kill(chance.choice([process.pid, *workers]), signal.SIGKILL)
    except OSError:  # a worker that has just ended
        return False
    return True


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="finds processes in /proc")
@pytest.mark.parametrize("slug", [card.slug for card in TECHNIQUES if card.experiment])
def test_an_experiment_that_is_killed_twenty_times_ends_bit_identical(tmp_path, slug):
    log = tmp_path / "log.txt"
    since = time.monotonic()
    assert started(slug, tmp_path / "whole", log).wait() == 0, log.read_text()
    most = (time.monotonic() - since) / 3
    expected = told_by(tmp_path / "whole")
    chance, kills, rounds = random.Random(slug), 0, 0
    while kills < KILLS:
        out, sessions, ended = tmp_path / f"round-{rounds}", [], False
        rounds += 1
        while not ended:
            process = started(slug, out, log)
            sessions.append(process.pid)
            wait_for(lambda process=process: children(process.pid) or process.poll() is not None, 300)
            while kills < KILLS and process.poll() is None:
                kills += killed_once(process, chance, most)
            code = process.wait()
            # a job whose process was killed twice is a failure, and the next start does it again
            ended = code == 0
            assert ended or code in (1, -signal.SIGKILL), log.read_text()
            wait_for(lambda process=process: not alive(process.pid))
            assert ended or kills < KILLS or len(sessions) <= KILLS + 2, log.read_text()
        assert told_by(out) == expected
        assert left_behind(out) == []
        assert not any(map(alive, sessions))
