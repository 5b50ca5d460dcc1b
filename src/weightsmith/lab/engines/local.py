"""A pool of processes on this machine.

A worker that is killed costs its own job: the job is tried once more in a new process, where it resumes, and fails if
that is killed as well. The standard pools of processes break as a whole when a worker is killed while it is idle or has
just started, and import the user's script again; these workers share nothing and import nothing but the experiment.
"""

import concurrent.futures
import contextlib
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import cloudpickle
import torch

from weightsmith.lab.engines.base import Busy, Done, Engine, Failure, Work, do, keep
from weightsmith.lab.engines.mirror import send_by_value
from weightsmith.lab.experiment import Resources

_TRIES = 2


def worker_count(resources: Resources) -> int:
    """How many jobs fit on this machine at a time."""
    if torch.cuda.is_available():
        share = resources.gpus if 0 < resources.gpus < 1 else 1.0
        return max(1, int(torch.cuda.device_count() / share))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // resources.cpus)


@contextlib.contextmanager
def local(*, resources: Resources, workers: int | None = None, time_limit: float | None = None) -> Iterator[Engine]:
    """Do jobs in a pool of processes; one after the other in this process when there is one worker and no limit."""
    count = workers or worker_count(resources)
    if count == 1 and time_limit is None:
        yield lambda works: _one_by_one(works, resources.cpus)
        return
    pool = _Pool(count, resources.cpus, time_limit)
    try:
        yield pool.do_all
    finally:
        pool.end()


def _one_by_one(works: Sequence[Work], threads: int) -> Iterator[Done | Failure]:
    busy = []
    for work in works:
        outcome = do(work, threads=threads, wait=False)
        if isinstance(outcome, Busy):
            busy.append(work)
        else:
            yield outcome
    for work in busy:
        outcome = do(work, threads=threads)
        assert not isinstance(outcome, Busy)
        yield outcome


class _Pool:
    """Workers, each started when it gets its first job, and started again when it has died."""

    def __init__(self, count: int, threads: int, limit: float | None) -> None:
        self._job_threads, self._limit = threads, limit
        self._workers = [_Worker(environment) for environment in _environments(count, threads)]
        self._free: queue.LifoQueue[_Worker] = queue.LifoQueue()  # the one that is warm first
        for worker in reversed(self._workers):
            self._free.put(worker)
        self._threads = concurrent.futures.ThreadPoolExecutor(count)

    def do_all(self, works: Sequence[Work]) -> Iterator[Done | Failure]:
        send_by_value(cloudpickle.register_pickle_by_value)
        busy = []
        for work, outcome in self._round(works, wait=False):
            if isinstance(outcome, Busy):
                busy.append(work)
            else:
                yield outcome
        for _, outcome in self._round(busy, wait=True):
            assert not isinstance(outcome, Busy)
            yield outcome

    def _round(self, works: Sequence[Work], *, wait: bool) -> Iterator[tuple[Work, Done | Failure | Busy]]:
        futures = {self._threads.submit(self._do, work, wait): work for work in works}
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.result()

    def end(self) -> None:
        for worker in self._workers:
            worker.end(for_good=True)
        self._threads.shutdown(cancel_futures=True)

    def _do(self, work: Work, wait: bool) -> Done | Failure | Busy:
        worker = self._free.get()
        try:
            error = ""
            for _ in range(_TRIES):
                try:
                    message = cloudpickle.dumps((work, self._job_threads, wait))
                    answer: Done | Failure | Busy = worker.ask(message, self._limit)
                    return answer
                except TimeoutError as late:
                    error = str(late)
                    break
                except _Died as died:
                    error = f"its process was killed twice ({died})"
            return keep(work, Failure(work.arm, work.seed, error))
        finally:
            self._free.put(worker)


class _Died(Exception):
    """A worker has ended before its answer."""


class _Worker:
    """One process and the pipes to it."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self._environment = environment
        self._process: subprocess.Popen[bytes] | None = None
        self._changing, self._closed = threading.RLock(), False

    def ask(self, message: bytes, limit: float | None) -> Any:
        """Have a job done.

        Raises:
            TimeoutError: It took longer than ``limit`` seconds; the process has been killed.
            _Died: The process was killed by someone else.
        """
        late = threading.Event()
        try:
            process = self._started()

            def stop() -> None:
                late.set()
                process.kill()

            timer = threading.Timer(limit or threading.TIMEOUT_MAX, stop)
            timer.daemon = True
            try:
                _send(process, message)
                timer.start()
                answer = cloudpickle.loads(_receive(process))
            finally:
                timer.cancel()
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            code = self.end()
            if late.is_set():
                raise TimeoutError(f"it took longer than the time limit of {limit:g} seconds") from None
            raise _Died(_cause(code)) from error
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _started(self) -> "subprocess.Popen[bytes]":
        with self._changing:
            if self._closed:
                raise concurrent.futures.CancelledError
            if self._process is not None and self._process.poll() is None:
                return self._process
            self.end()
            path = [os.path.realpath(entry) for entry in sys.path]  # an empty entry is the current folder
            code = f"import sys; sys.path[:] = {path!r}; from weightsmith.lab.engines.worker import serve; serve()"
            self._process = process = subprocess.Popen(
                [sys.executable, "-c", code], env=self._environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
            )
        _receive(process)  # it is ready: the time limit begins
        return process

    def end(self, *, for_good: bool = False) -> int:
        """Kill the process if it still runs, and give its exit code."""
        with self._changing:
            self._closed |= for_good
            process, self._process = self._process, None
        if process is None:
            return 0
        process.kill()
        code = process.wait()
        for pipe in (process.stdin, process.stdout):
            assert pipe is not None
            with contextlib.suppress(OSError):
                pipe.close()
        return code


def _send(process: "subprocess.Popen[bytes]", message: bytes) -> None:
    assert process.stdin is not None
    pickle.dump(message, process.stdin)
    process.stdin.flush()


def _receive(process: "subprocess.Popen[bytes]") -> Any:
    assert process.stdout is not None
    return pickle.load(process.stdout)


def _environments(count: int, threads: int) -> list[dict[str, str]]:
    """Per worker: as many threads as a job may use, and a GPU of its own where there are several."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    names = visible.split(",") if visible else [str(index) for index in range(gpus)]
    environments = []
    for place in range(count):
        environment = {"OMP_NUM_THREADS": str(threads), **os.environ}
        if gpus > 1:
            environment["CUDA_VISIBLE_DEVICES"] = names[place % gpus]
        environments.append(environment)
    return environments


def _cause(code: int) -> str:
    if code == -getattr(signal, "SIGKILL", 9):
        return "signal SIGKILL; often too little memory"
    with contextlib.suppress(ValueError):
        return f"signal {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    return f"exit code {code}"
