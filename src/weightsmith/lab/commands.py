"""A command in any language as a job: its numbers are JSON lines, and it ends when its job does."""

import contextlib
import json
import math
import os
import signal
import subprocess
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from weightsmith.core.errors import UsageError
from weightsmith.core.files import write_atomically
from weightsmith.lab.job import Job

_KEPT_LINES = 20  # of a failed command's output, in the error
_CANNOT_START = (126, 127)  # exit codes of a shell: not executable, not found


def run_command(
    command: str, job: Job, values: Mapping[str, str], folder: Path, time_limit: float | None
) -> Mapping[str, Any]:
    """Run a command line in a folder that keeps what it found, and collect its numbers.

    Args:
        command: For the shell.
        job: Records every row; keeps the output.
        values: Swept values, which go into the rows.
        folder: Of this attempt; where it has been finished, nothing runs.
        time_limit: Seconds; ``None``: any.

    Returns:
        The last value under each name.

    Raises:
        UsageError: The shell found no such program, or may not execute it.
        RuntimeError: The command failed; the end of its output is in the message.
        TimeoutError: It took too long.
    """
    result = folder / "result.jsonl"
    done = folder / "done.json"
    if done.is_file():  # finished before the job was killed
        measured: Mapping[str, Any] = json.loads(done.read_text())
        return measured
    result.unlink(missing_ok=True)  # of an attempt that was killed: a command may append to it
    environment = os.environ | {
        "WEIGHTSMITH_RESULT": str(result.resolve()),
        "WEIGHTSMITH_SEED": str(job.seed),
        "WEIGHTSMITH_FOLDER": str(folder.resolve()),
    }
    output = job.keep / f"{folder.name}.txt"
    output.parent.mkdir(parents=True, exist_ok=True)
    found: dict[str, Any] = {}
    with output.open("w") as log, _process(command, environment, time_limit) as process:
        for line in process.stdout or ():
            log.write(line)
            found |= _row(line, job, values)
    if process.returncode:
        tail = "".join(output.read_text().splitlines(keepends=True)[-_KEPT_LINES:])
        kind = UsageError if process.returncode in _CANNOT_START else RuntimeError
        raise kind(f"the command ended with code {process.returncode}: {command}\n{tail}")
    if result.is_file():
        for line in result.read_text().split("\n"):
            found |= _row(line, job, values)
    write_atomically(done, json.dumps(found))
    return found


def _row(line: str, job: Job, values: Mapping[str, str]) -> dict[str, float]:
    """The numbers of a line that is a JSON object; of any other line nothing."""
    try:
        content = json.loads(line) if line.lstrip().startswith("{") else None
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        return {}
    numbers = {str(key): _float(value) for key, value in content.items() if isinstance(value, int | float)}
    if numbers:
        job.record(numbers, phase="training", **values)
    return numbers


def _float(value: int | float) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond the floats is infinite, as 1e400 is
        return math.inf if value > 0 else -math.inf


@contextlib.contextmanager
def _process(command: str, environment: Mapping[str, str], limit: float | None) -> Iterator[subprocess.Popen[str]]:
    """Run a command line in a process group of its own, which ends when the block or this process does."""
    process = subprocess.Popen(
        command, shell=True, env=environment, text=True, errors="replace", start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=_end_with_parent,
    )  # fmt: skip
    timed_out = False

    def end() -> None:
        nonlocal timed_out
        timed_out = True
        _kill(process)

    timer = threading.Timer(limit or threading.TIMEOUT_MAX, end)
    timer.daemon = True
    timer.start()
    try:
        yield process
        process.wait()
    finally:
        timer.cancel()
        _kill(process)
        process.wait()
        assert process.stdout is not None
        process.stdout.close()
    if timed_out:
        raise TimeoutError(f"the command took longer than {limit:g} seconds: {command}")


def _kill(process: "subprocess.Popen[str]") -> None:
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _end_with_parent() -> None:
    # Linux ends the command's shell with this process, however that ends; elsewhere only an orderly end does
    with contextlib.suppress(OSError, AttributeError):
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL)
