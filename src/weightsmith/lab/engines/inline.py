"""One job after the other, in this process."""

from collections.abc import Iterator, Sequence

from weightsmith.lab.engines.base import Failure, Work, do
from weightsmith.lab.record import JobResult


def run_inline(works: Sequence[Work]) -> Iterator[JobResult | Failure]:
    """Do jobs here, with all threads that torch has."""
    for work in works:
        yield do(work)
