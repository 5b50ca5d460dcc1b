"""What counts, and how much: weights of samples, of tokens and of objectives.

| names | what they do |
|---|---|
| `MetaRescaler`, `RescalingSettings` | train a classifier on noisy labels and learn which of them to trust |
| `LossRescaler`, `rescaler_features`, `SampleStatsMemory` | the network that weighs a loss, what it reads, the memory |
| `directional_derivatives`, `RandomBatches` | per-sample derivatives through the virtual step; validation batches |
| `AuditTable` | which labels are suspicious |
| `Steer`, `token_weights`, `entropy_change` | damp tokens whose update would change the policy's entropy most |
| `ClipHigher`, `EntropyBonus`, `ForkTokens`, `ClipCov`, `KLCov`, `WReinforce`, `EntropyAdvantage` | its rivals |
| `Tokens`, `Effect`, `TokenRule` | the interface of all these, for a rule of your own |
| `policy_loss`, `group_advantages`, `objective_advantages`, `informative_groups` | policy optimization |
| `fused_linear_logprob` | log-probabilities and entropies without logits of a whole batch |
| `FixedWeights`, `HypervolumeWeights`, `GradientWeights` | weights of several rewards |
| `objective_influence`, `objective_gradients`, `influence_of` | how well the objectives' gradients agree |
| `hypervolume`, `hypervolume_contribution`, `pareto_front` | volumes in objective space |
| `boxed_accuracy`, `clarity`, `Conciseness` | rewards for written answers: right, well-formed, short |
"""

from weightsmith.reweight.advantages import group_advantages, informative_groups, objective_advantages
from weightsmith.reweight.audit import AuditTable
from weightsmith.reweight.covariance import ClipCov, KLCov
from weightsmith.reweight.entropy_change import entropy_change
from weightsmith.reweight.hypervolume import hypervolume, hypervolume_contribution, pareto_front
from weightsmith.reweight.influence import influence_of, objective_gradients, objective_influence
from weightsmith.reweight.linear_logprob import fused_linear_logprob
from weightsmith.reweight.math_rewards import Conciseness, boxed_accuracy, clarity
from weightsmith.reweight.memory import SampleStatsMemory
from weightsmith.reweight.meta_gradient import directional_derivatives
from weightsmith.reweight.objectives import FixedWeights, GradientWeights, HypervolumeWeights
from weightsmith.reweight.policy_loss import PolicyLoss, policy_loss
from weightsmith.reweight.rescaler import LossRescaler
from weightsmith.reweight.samples import MetaRescaler
from weightsmith.reweight.settings import RescalingSettings
from weightsmith.reweight.signals import rescaler_features
from weightsmith.reweight.steer import Steer, token_weights
from weightsmith.reweight.token_rules import ClipHigher, EntropyAdvantage, EntropyBonus, ForkTokens, WReinforce
from weightsmith.reweight.tokens import Effect, TokenRule, Tokens
from weightsmith.reweight.validation import RandomBatches

__all__ = [
    "AuditTable",
    "ClipCov",
    "ClipHigher",
    "Conciseness",
    "Effect",
    "EntropyAdvantage",
    "EntropyBonus",
    "FixedWeights",
    "ForkTokens",
    "GradientWeights",
    "HypervolumeWeights",
    "KLCov",
    "LossRescaler",
    "MetaRescaler",
    "PolicyLoss",
    "RandomBatches",
    "RescalingSettings",
    "SampleStatsMemory",
    "Steer",
    "TokenRule",
    "Tokens",
    "WReinforce",
    "boxed_accuracy",
    "clarity",
    "directional_derivatives",
    "entropy_change",
    "fused_linear_logprob",
    "group_advantages",
    "hypervolume",
    "hypervolume_contribution",
    "influence_of",
    "informative_groups",
    "objective_advantages",
    "objective_gradients",
    "objective_influence",
    "pareto_front",
    "policy_loss",
    "rescaler_features",
    "token_weights",
]
