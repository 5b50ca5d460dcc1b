"""What weights guarantee."""

import torch

from weightsmith.certify import EpsilonSchedule, robust_cross_entropy
from weightsmith.testing import Function, State


def _schedule():
    return EpsilonSchedule(0.3, 2, length=3)


def _advance(schedule):
    schedule.step()
    return {"eps": torch.tensor(schedule.eps)}


def _margins():
    return torch.randn(5, 3, generator=torch.Generator().manual_seed(0))


STATES = {"weightsmith.certify.EpsilonSchedule": [State(_schedule, _advance)]}

FUNCTIONS = {"weightsmith.certify.robust_cross_entropy": [Function(robust_cross_entropy, lambda: (_margins(),))]}

ELSEWHERE = {
    # models and boxes in, ends out: tests/certify holds them to soundness on fourteen architectures
    "weightsmith.certify.bounds",
    "weightsmith.certify.margins",
    "weightsmith.certify.trace",
    "weightsmith.certify.verified_error",
    "weightsmith.certify.pgd",
    "weightsmith.certify.register_bound",
    "weightsmith.certify.BoundRegularizer",
    # needs a classifier; tests/certify resumes it
    "weightsmith.certify.CertifiedTraining",
    # puts modules into a network on purpose
    "weightsmith.certify.add_batchnorm_",
}
