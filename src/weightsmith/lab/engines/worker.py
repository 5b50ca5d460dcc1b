"""A worker of the local engine: it takes jobs from its standard input and answers on its standard output.

It ends when the other end of its input is closed, which only the parent can write to: however the parent ends, reaped
or not, the worker ends with it.
"""

import os
import pickle
import queue
import signal
import threading
from typing import IO, Any

import cloudpickle

from weightsmith.lab.engines.base import do


def serve() -> None:
    """Do jobs until the parent has gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent too, and it ends its workers
    asked, answers = _take(0, os.O_RDONLY, "rb"), _take(1, os.O_WRONLY, "wb")
    waiting: queue.SimpleQueue[bytes] = queue.SimpleQueue()
    threading.Thread(target=_listen, args=(asked, waiting), daemon=True).start()
    _answer(answers, None)  # ready
    while True:
        try:
            work, threads, wait = cloudpickle.loads(waiting.get())
            _answer(answers, do(work, threads=threads, wait=wait))
        except BaseException as error:
            _answer(answers, error)


def _take(number: int, flags: int, mode: str) -> IO[bytes]:
    """Keep a standard stream for ourselves: what jobs print goes to standard error, what they read is empty."""
    own = os.dup(number)  # not inherited by programs that a job starts
    if flags == os.O_RDONLY:
        nothing = os.open(os.devnull, flags)
        os.dup2(nothing, number)
        os.close(nothing)
    else:
        os.dup2(2, number)
    if hasattr(os, "register_at_fork"):  # nor by processes that it forks: they may outlive a killed worker
        os.register_at_fork(after_in_child=lambda: os.close(own))
    return os.fdopen(own, mode)


def _listen(asked: IO[bytes], waiting: "queue.SimpleQueue[bytes]") -> None:
    try:
        while True:
            waiting.put(pickle.load(asked))
    except BaseException:
        os._exit(1)


def _answer(answers: IO[bytes], answer: Any) -> None:
    try:
        content = cloudpickle.dumps(answer)
        cloudpickle.loads(content)  # some errors can be written but not read
    except Exception:
        content = cloudpickle.dumps(RuntimeError(f"{type(answer).__name__}: {answer}"))
    try:
        pickle.dump(content, answers)
        answers.flush()
    except BrokenPipeError:  # the parent has gone
        os._exit(1)
