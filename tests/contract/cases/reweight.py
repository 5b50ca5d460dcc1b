"""What counts, and how much."""

import torch
from torch import nn

from weightsmith.reweight import (
    ClipCov,
    Conciseness,
    EntropyBonus,
    GradientWeights,
    HypervolumeWeights,
    KLCov,
    MetaRescaler,
    RandomBatches,
    Tokens,
    entropy_change,
    fused_linear_logprob,
    group_advantages,
    informative_groups,
    objective_advantages,
    token_weights,
)
from weightsmith.testing import Function, State

_X, _Y = torch.randn(24, 4, generator=torch.Generator().manual_seed(0)), torch.arange(24) % 3
_ROWS = list(zip(_X, _Y, strict=True))


def _meta(**options):
    def make():
        model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 3))
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        sampler = RandomBatches(_ROWS, 8) if options.get("meta_every") else None
        return model, optimizer, MetaRescaler(model, optimizer, 3, val_sampler=sampler, **options)

    return make


def _step(model, optimizer, meta):
    result = meta.step((_X, _Y), ids=torch.arange(24))
    return [result.loss, result.weights, *model.state_dict().values(), *meta.rescaler.state_dict().values()]


def _rows(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _decide(rule):
    # the second policy drifts with every call from the one that sampled
    logp = -_rows(4, 6).abs() - 0.1
    effect = rule(Tokens.of(logp, _rows(4), torch.ones(4, 6), old_logp=logp - 0.01, entropy=_rows(4, 6).abs()))
    return [effect.weights, effect.drift, effect.entropy_coef]


_MASK, _GROUP = torch.arange(24).view(4, 6) % 5 > 0, torch.tensor([0, 0, 1, 1])

STATES = {
    "weightsmith.reweight.ClipCov": [State(lambda: ClipCov(0.1, low=-9, high=9), _decide)],
    "weightsmith.reweight.KLCov": [State(lambda: KLCov(0.1), _decide)],
    "weightsmith.reweight.EntropyBonus": [State(lambda: EntropyBonus(0.1, target=0.7), _decide)],
    "weightsmith.reweight.GradientWeights": [
        State(lambda: GradientWeights(3, accumulation_steps=2), lambda rule: rule.update([0.5, 0.1, -0.2], 0.1))
    ],
    "weightsmith.reweight.HypervolumeWeights": [
        State(
            lambda: HypervolumeWeights([0.5, 0.5], [True, False]),
            lambda rule: [rule.update([1.0 + len(rule.front), 5.0]), rule.front],
        )
    ],
    "weightsmith.reweight.Conciseness": [State(Conciseness, lambda rule: [rule([3, 5, 7]), rule.mean])],
    "weightsmith.reweight.MetaRescaler": [
        State(_meta(), _step),
        State(_meta(meta_grad="head", meta_every=2), _step),
        State(_meta(meta_grad="none", normalize="mean", window=3), _step),
    ],
    "weightsmith.reweight.RandomBatches": [State(lambda: RandomBatches(_ROWS, 5), lambda draw: draw())],
}

FUNCTIONS = {
    "weightsmith.reweight.entropy_change": [
        Function(entropy_change, lambda: (-_rows(4, 6).abs(), 2 + _rows(4, 6), _rows(4, 6)), keeps_dtype=False)
    ],
    "weightsmith.reweight.token_weights": [Function(token_weights, lambda: (_rows(4, 6), _MASK), keeps_dtype=False)],
    "weightsmith.reweight.group_advantages": [
        Function(group_advantages, lambda: (_rows(4), _GROUP), keeps_dtype=False, compiles=False)
    ],
    "weightsmith.reweight.objective_advantages": [
        Function(objective_advantages, lambda: (_rows(4, 2), _rows(2), _GROUP), keeps_dtype=False, compiles=False)
    ],
    "weightsmith.reweight.informative_groups": [
        Function(informative_groups, lambda: (_rows(4, 2), _GROUP), compiles=False)
    ],
    "weightsmith.reweight.fused_linear_logprob": [
        Function(
            lambda h, w, t: fused_linear_logprob(h, w, t, return_second_moment=True),
            lambda: (_rows(7, 5), _rows(9, 5), torch.arange(7)), keeps_dtype=False, compiles=False,
        )
    ],
}  # fmt: skip

ELSEWHERE = {
    # rules and weights without state, and what they are made of: tests/reweight compares them with the authors' code
    "weightsmith.reweight.Steer",
    "weightsmith.reweight.ClipHigher",
    "weightsmith.reweight.ForkTokens",
    "weightsmith.reweight.WReinforce",
    "weightsmith.reweight.EntropyAdvantage",
    "weightsmith.reweight.FixedWeights",
    "weightsmith.reweight.Tokens",
    "weightsmith.reweight.Effect",
    "weightsmith.reweight.TokenRule",
    "weightsmith.reweight.PolicyLoss",
    # a loss with its metrics
    "weightsmith.reweight.policy_loss",
    # gradients of a policy, and points in objective space
    "weightsmith.reweight.objective_influence",
    "weightsmith.reweight.objective_gradients",
    "weightsmith.reweight.influence_of",
    "weightsmith.reweight.hypervolume",
    "weightsmith.reweight.hypervolume_contribution",
    "weightsmith.reweight.pareto_front",
    # texts in, numbers out
    "weightsmith.reweight.boxed_accuracy",
    "weightsmith.reweight.clarity",
    # parts of the above, which tests/reweight compares with the authors' code and with definitions in loops
    "weightsmith.reweight.RescalingSettings",
    "weightsmith.reweight.LossRescaler",
    "weightsmith.reweight.rescaler_features",
    "weightsmith.reweight.SampleStatsMemory",
    "weightsmith.reweight.directional_derivatives",
    # a table
    "weightsmith.reweight.AuditTable",
}
