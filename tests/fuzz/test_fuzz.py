"""Every parser on changed copies of valid files: it reads them or raises a ``UsageError`` of one line, nothing else.

``make test`` tries a few of each, ``make fuzz`` a million; ``WEIGHTSMITH_FUZZ`` sets the number and
``WEIGHTSMITH_FUZZ_SEED`` the first one's seed. A finding is kept under ``.fuzz`` and named in the failure.
"""

import os
import random
import signal
import sys
import warnings
from collections import Counter
from pathlib import Path

import pytest
from mutate import mutate
from parsers import PARSERS

from weightsmith.core.errors import UsageError, WeightsmithWarning

COUNT = int(os.environ.get("WEIGHTSMITH_FUZZ", "60"))
SEED = int(os.environ.get("WEIGHTSMITH_FUZZ_SEED", "0"))
_SECONDS = 20
"""After which a parser counts as hanging; the slowest takes milliseconds."""
_LONGEST = 1500
FOUND = {
    "adapter_tensors": [1976],
    "bone_config": [1878, 2125],
    "native_config": [888],
    "pattern": [9833],
    "safetensors_file": [1_000_074],
}
"""Seeds that earlier runs have found something with; they are always tried."""


def _hangs(*_):
    raise TimeoutError(f"it takes more than {_SECONDS} seconds")


@pytest.fixture(autouse=True)
def _alarm():
    before = signal.signal(signal.SIGALRM, _hangs)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize("parser", PARSERS, ids=lambda parser: parser.__name__)
def test_a_changed_file_is_read_or_refused_in_one_line(parser, tmp_path, capsys):
    entry = parser(tmp_path)
    entry.read()
    valid = entry.file.read_bytes()
    outcomes = Counter()
    seeds = range(SEED, SEED + max(1, round(COUNT * entry.share)))
    for seed in [*FOUND.get(parser.__name__, []), *seeds]:
        changed = mutate(valid, entry.kind, random.Random(seed))
        entry.file.write_bytes(changed)
        message = ""
        signal.alarm(_SECONDS)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                warnings.simplefilter("error", WeightsmithWarning)
                entry.read()
            outcomes["read"] += 1
        except UsageError as error:
            message = str(error)
            outcomes["refused"] += 1
        except BaseException as error:
            kept = Path(".fuzz", f"{parser.__name__}-{seed}-{entry.file.name}")
            kept.parent.mkdir(exist_ok=True)
            kept.write_bytes(changed)
            raise AssertionError(f"seed {seed}, kept as {kept}: {type(error).__name__}: {error}") from error
        finally:
            signal.alarm(0)
        assert "\n" not in message, f"seed {seed}: {message}"
        assert len(message) < _LONGEST, f"seed {seed}: {message}"
    if COUNT > 1000:
        with capsys.disabled():
            sys.stdout.write(f"\n{parser.__name__}: {outcomes['read']} read, {outcomes['refused']} refused")
