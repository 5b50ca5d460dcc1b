"""Worker processes on this machine; one that dies is replaced and its individual evaluated again."""

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, Pipe, wait
from pathlib import Path
from typing import Any

import torch

from weightsmith.search.evaluation import Individual, Values, Weights
from weightsmith.search.outcomes import Deaths, EvaluateAll, values_of
from weightsmith.search.resources import Resources


@dataclass(slots=True)
class _Process:
    process: "subprocess.Popen[bytes]"
    pipe: "Connection[Any, Any]"
    busy: Individual | None = None

    def stop(self) -> None:
        self.pipe.close()  # a worker ends when its pipe does
        try:
            self.process.wait(timeout=2)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


def _stop(workers: Sequence[_Process]) -> None:
    for worker in workers:
        worker.stop()


def _start(payload: bytes) -> _Process:
    ours, theirs = Pipe()
    with theirs:
        paths = os.pathsep.join(dict.fromkeys([*filter(None, sys.path), str(Path.cwd())]))
        command = [sys.executable, "-m", "weightsmith.search.worker", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=[theirs.fileno()], env=os.environ | {"PYTHONPATH": paths})
    ours.send_bytes(payload)
    return _Process(process, ours)


@contextlib.contextmanager
def processes(payload: bytes, resources: Resources) -> Iterator[EvaluateAll]:
    """Workers for as long as the block runs; weights travel through a file, once per generation."""
    workers: list[_Process] = []
    with tempfile.TemporaryDirectory(prefix="weightsmith-search-") as folder, contextlib.ExitStack() as stack:
        stack.callback(_stop, workers)
        number = 0

        def evaluate_all(weights: Weights, individuals: Sequence[Individual]) -> Iterator[tuple[int, Values]]:
            nonlocal number
            number += 1
            file = Path(folder) / f"weights-{number}.pt"
            torch.save(dict(weights), file)
            (Path(folder) / f"weights-{number - 1}.pt").unlink(missing_ok=True)
            queue, deaths = list(individuals), Deaths()
            while len(workers) < min(resources.workers or 1, len(queue)):
                workers.append(_start(payload))
            while queue or any(worker.busy for worker in workers):
                for place, worker in enumerate(workers):
                    if worker.busy is None and queue:
                        try:
                            worker.pipe.send((str(file), queue[0]))
                        except OSError:  # it died while idle
                            worker.stop()
                            deaths.count(queue[0], "it ended before the evaluation began")
                            workers[place] = _start(payload)
                            continue
                        worker.busy = queue.pop(0)
                waiting = {worker.pipe: place for place, worker in enumerate(workers) if worker.busy is not None}
                for pipe in wait(list(waiting), timeout=1.0):
                    place = waiting[pipe]  # type: ignore[index]
                    worker, individual = workers[place], workers[place].busy
                    assert individual is not None
                    try:
                        kind, found = worker.pipe.recv()
                    except (EOFError, OSError):
                        worker.stop()
                        deaths.count(individual, f"exit code {worker.process.returncode}")
                        workers[place] = _start(payload)
                        queue.insert(0, individual)
                        continue
                    worker.busy = None
                    yield individual.slot, values_of(individual, kind, found)

        yield evaluate_all
