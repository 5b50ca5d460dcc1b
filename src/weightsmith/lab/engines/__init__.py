"""Where jobs are done: in this process, by a pool of processes, on a Ray cluster, or by several processes each."""

from weightsmith.lab.engines.base import Engine, Failure, Work

__all__ = ["Engine", "Failure", "Work"]
