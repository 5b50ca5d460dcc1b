"""Classes that arrive in steps."""

import torch

from weightsmith.continual import (
    ExemplarMemory,
    align_logits,
    correct_bias,
    distillation_loss,
    herding,
    incremental_loss,
)
from weightsmith.testing import Function, State


def _memory():
    return ExemplarMemory(30, selection="random", seed=3)


def _remember(memory):
    label = len(memory.counts)
    memory.add(torch.randn(12, 2), torch.full((12,), label))
    return memory.tensors()


def _logits():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


_LABELS = torch.tensor([0, 5, 2, 3, 1])

STATES = {
    "weightsmith.continual.ExemplarMemory": [State(_memory, _remember)],
}

FUNCTIONS = {
    "weightsmith.continual.align_logits": [Function(align_logits, lambda: (_logits(), 4, 0.7))],
    "weightsmith.continual.correct_bias": [Function(correct_bias, lambda: (_logits(), 4, 0.7, 0.1))],
    "weightsmith.continual.distillation_loss": [Function(distillation_loss, lambda: (_logits(), _logits()[:, :4], 4))],
    "weightsmith.continual.incremental_loss": [
        Function(incremental_loss, lambda: (_logits(), _LABELS, _logits()[:, :4], 4), compiles=False)
    ],
    "weightsmith.continual.herding": [Function(herding, lambda: (_logits(), 3), compiles=False)],
}

ELSEWHERE = {
    # about a model's head, which tests/continual gives them: linear, convolution, transformers', tied and parametrized
    "weightsmith.continual.WeightAligning",
    "weightsmith.continual.AligningOptions",
    "weightsmith.continual.align_weights_",
    "weightsmith.continual.WeightAlignment",
    "weightsmith.continual.expand_head_",
    "weightsmith.continual.expand_head",
    "weightsmith.continual.clip_head_",
    # numbers in, numbers out
    "weightsmith.continual.ClassOrder",
    "weightsmith.continual.fit_bias_correction",
}
