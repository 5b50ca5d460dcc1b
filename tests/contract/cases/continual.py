"""Classes that arrive in steps."""

import copy

import torch

from weightsmith.continual import (
    DynamicEMA,
    ExemplarMemory,
    align_logits,
    balance_weight,
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


def _average():
    torch.manual_seed(0)
    model = torch.nn.Linear(4, 2)
    return DynamicEMA(model, kappa=0.01), _Training(model)


class _Training:
    """A model and what its training has come to, so that both are saved with the average."""

    def __init__(self, model):
        self.model, self.step = model, 0

    def state_dict(self):
        return {"model": self.model.state_dict(), "step": self.step}

    def load_state_dict(self, state):
        self.model.load_state_dict(state["model"])
        self.step = state["step"]


def _train(ema, training):
    generator = torch.Generator().manual_seed(training.step)
    training.step += 1
    for parameter in training.model.parameters():
        parameter.grad = torch.randn(parameter.shape, generator=generator)
        parameter.data.sub_(0.1 * parameter.grad)
    ema.step()
    return copy.deepcopy(ema.state_dict())


def _norms():
    return tuple(1 + torch.rand(5, generator=torch.Generator().manual_seed(seed)) for seed in range(3))


def _logits():
    return torch.randn(5, 6, generator=torch.Generator().manual_seed(0))


_LABELS = torch.tensor([0, 5, 2, 3, 1])

STATES = {
    "weightsmith.continual.ExemplarMemory": [State(_memory, _remember)],
    "weightsmith.continual.DynamicEMA": [State(_average, _train)],
}

FUNCTIONS = {
    "weightsmith.continual.align_logits": [Function(align_logits, lambda: (_logits(), 4, 0.7))],
    "weightsmith.continual.correct_bias": [Function(correct_bias, lambda: (_logits(), 4, 0.7, 0.1))],
    "weightsmith.continual.distillation_loss": [Function(distillation_loss, lambda: (_logits(), _logits()[:, :4], 4))],
    "weightsmith.continual.incremental_loss": [
        Function(incremental_loss, lambda: (_logits(), _LABELS, _logits()[:, :4], 4), compiles=False)
    ],
    "weightsmith.continual.balance_weight": [Function(balance_weight, _norms)],
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
    # whole courses of tasks, files and texts: tests/continual/test_lcia_*.py
    "weightsmith.continual.ContinualTuner",
    "weightsmith.continual.InstructionRouter",
    "weightsmith.continual.Assignment",
    "weightsmith.continual.SentenceEncoder",
    "weightsmith.continual.ForgettingMeter",
    "weightsmith.continual.ForgettingReport",
    "weightsmith.continual.prediction_accuracy",
    "weightsmith.continual.EWC",
    # numbers in, numbers out
    "weightsmith.continual.transfer",
    "weightsmith.continual.Transfer",
    "weightsmith.continual.ClassOrder",
    "weightsmith.continual.fit_bias_correction",
}
