"""A worker process of a local search: ``python -m weightsmith.search.worker FD``; it ends when its pipe is closed."""

import sys
from multiprocessing.connection import Connection

import cloudpickle
import torch

from weightsmith.search.evaluation import Evaluation
from weightsmith.search.outcomes import outcome


def main(descriptor: int) -> None:
    """Evaluate what comes through the pipe."""
    with Connection(descriptor) as pipe:
        try:
            evaluate, model, options = cloudpickle.loads(pipe.recv_bytes())
            evaluation, held = Evaluation(evaluate, model, **options), ""
            while True:
                file, individual = pipe.recv()
                if file != held:
                    evaluation.load(torch.load(file, mmap=True, weights_only=True))
                    held = file
                pipe.send(outcome(evaluation, individual))
        except (EOFError, BrokenPipeError, KeyboardInterrupt):
            return


if __name__ == "__main__":
    main(int(sys.argv[1]))
