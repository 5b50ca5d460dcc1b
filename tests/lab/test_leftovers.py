"""What killed processes leave in a run folder is removed by the next run; what live ones hold stays."""

import signal
import subprocess
import sys
import threading

import toy
from test_run import results, started, wait_for

from weightsmith.lab.engines.base import locked, remove_leftovers
from weightsmith.lab.run import run

WRITER = """
import sys, time
from pathlib import Path
from weightsmith.core.files import temporary_folder
with temporary_folder(Path(sys.argv[1])) as folder:
    (folder / "half").touch()
    print("ready", flush=True)
    time.sleep(60)
"""


def leftovers(folder):
    return sorted(path.name.rpartition(".")[2] for path in folder.rglob("*") if path.suffix in (".lock", ".tmp"))


def test_locks_and_half_written_files_of_killed_processes_are_removed_and_those_of_live_ones_stay(tmp_path):
    config = toy.Config(kill_once=str(tmp_path / "marker"))
    process = started(config, tmp_path / "runs", "WRITING", seeds=1, workers=1)
    wait_for((tmp_path / "marker").exists)
    (folder,) = (tmp_path / "runs" / "writing").iterdir()
    command = [sys.executable, "-c", WRITER, folder / "run.json"]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "ready\n"
    finished_job = folder / "work" / "plain-seed-0"  # of a process that was killed after it had written its result
    finished_job.mkdir()
    (folder / "plain" / "seed-0").mkdir(parents=True)
    (folder / "plain" / "seed-0" / "result.json").touch()

    remove_leftovers(folder)
    assert leftovers(folder) == ["lock", "tmp", "tmp"]
    assert not finished_job.exists()
    for one in (process, writer):
        one.send_signal(signal.SIGKILL)
        one.wait()
    writer.stdout.close()
    assert leftovers(folder) == ["lock", "tmp", "tmp"]

    done = run(toy.WRITING, config, seeds=1, out=tmp_path / "runs", workers=1)
    assert done.folder == folder
    assert leftovers(folder) == []
    assert not list((folder / "work").iterdir())
    assert results(folder).keys() == {("better", 0), ("plain", 0)}


def test_a_checkpoint_of_a_job_that_has_not_finished_stays(tmp_path):
    (tmp_path / "work" / "plain-seed-1").mkdir(parents=True)
    (tmp_path / "work" / "plain-seed-1" / "fit.pt").touch()
    remove_leftovers(tmp_path)
    assert (tmp_path / "work" / "plain-seed-1" / "fit.pt").exists()


def test_a_lock_is_held_by_one_at_a_time_although_its_file_comes_and_goes(tmp_path):
    holders, most = [], []

    def work():
        for _ in range(100):
            with locked(tmp_path / "job.lock", wait=True) as held:
                assert held
                holders.append(None)
                most.append(len(holders))
                holders.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(most) == 400
    assert set(most) == {1}
    assert not list(tmp_path.iterdir())
