"""Do reward weights that change during training reach a better trade-off of several rewards than fixed ones?

A small transformer writes expressions that hit a target. Three rewards: right, shorter than the running mean, and
well-formed with digits that do not fall.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.experiments import policies
from weightsmith.experiments.policies import PolicyConfig, RunningMean
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric, Value
from weightsmith.lab.job import Job
from weightsmith.lab.models.policy import PolicyTransformer
from weightsmith.lab.policy import Rollout, held_out_prompts, optimize_policy
from weightsmith.lab.tasks.expressions import AnyDigits
from weightsmith.reweight import (
    Conciseness,
    FixedWeights,
    GradientWeights,
    HypervolumeWeights,
    hypervolume,
    objective_advantages,
    objective_influence,
    policy_loss,
)
from weightsmith.reweight.advantages import METHODS, Method

TASK = AnyDigits()
MAXIMIZE = (True, False, True)
BALANCED, ACCURACY, EFFICIENCY = (0.334, 0.333, 0.333), (0.5, 0.25, 0.25), (0.25, 0.375, 0.375)


@dataclass(frozen=True, slots=True)
class Config(PolicyConfig):
    """What the experiment on dynamic reward weighting compares, and how."""

    warmup_steps: int = 250
    """Supervised steps on right answers, shared by all arms of a seed."""
    prompts: int = 48
    """Prompts per rollout."""
    mini_batches: int = 2
    """Optimizer steps per rollout."""
    method: Method = "grpo"
    """How advantages are computed: grpo, dr_grpo, rloo, reinforce_pp or opo."""
    step_size: float = 0.1
    """Of the gradient-based weights."""
    max_norm: float = 1.0
    """To which each objective's gradient is clipped."""
    validate_every: int = 1
    """Rollouts between two validation points of the hypervolume-guided factor."""


_WEIGHTINGS: dict[str, Callable[[Config], FixedWeights]] = {
    "balanced": lambda _: FixedWeights(BALANCED),
    "accuracy": lambda _: FixedWeights(ACCURACY),
    "efficiency": lambda _: FixedWeights(EFFICIENCY),
    "gradient": lambda c: GradientWeights(3, weights=BALANCED, step_size=c.step_size),
    "hypervolume": lambda _: HypervolumeWeights(BALANCED, MAXIMIZE),
    "hypervolume-reward": lambda _: HypervolumeWeights(BALANCED, MAXIMIZE, apply_to="reward"),
}


def arms(_: Config) -> list[Arm]:
    """Three fixed weightings, both dynamic ones, and the form of one that cancels."""
    return [
        Arm("balanced", "fixed weights 0.334, 0.333, 0.333", "fixed, balanced"),
        Arm("accuracy", "fixed weights 0.5, 0.25, 0.25", "fixed, accuracy"),
        Arm("efficiency", "fixed weights 0.25, 0.375, 0.375", "fixed, efficiency"),
        Arm("gradient", "weights moved by the agreement of gradients", "gradient weights"),
        Arm("hypervolume", "advantages times a factor from validation points", "hypervolume"),
        Arm("hypervolume-reward", "rewards times that factor, as released: cancels under GRPO", "hypervolume, rewards"),
    ]


def claims(_: Config) -> list[Claim]:
    """A larger hypervolume than fixed weights; and that the released form changes nothing."""
    return [
        Claim(
            text="Gradient weights dominate a larger hypervolume than balanced fixed weights", metric="hypervolume",
            winner="gradient", loser="balanced", primary=True, worth=0.03,
            paper="Math500, GRPO, accuracy / length / clarity: .836 / 831 / .948 → .836 / 650 / .980",
        ),
        Claim(
            text="The hypervolume-guided factor dominates a larger hypervolume than balanced fixed weights",
            metric="hypervolume", winner="hypervolume", loser="balanced", primary=True, worth=0.03,
            paper="Math500, GRPO, accuracy-focused: .832 / 701 / .962 → .850 / 619 / .970",
        ),
        Claim(
            text="Gradient weights dominate a larger hypervolume than accuracy-focused fixed weights",
            metric="hypervolume", winner="gradient", loser="accuracy", worth=0.03,
        ),
        Claim(
            text="Gradient weights dominate a larger hypervolume than efficiency-focused fixed weights",
            metric="hypervolume", winner="gradient", loser="efficiency", worth=0.03,
        ),
        Claim(
            text="A factor on the rewards changes accuracy (control: it cancels under GRPO)", metric="accuracy",
            winner="hypervolume-reward", loser="balanced", worth=1.0,
        ),
    ]  # fmt: skip


def metrics(_: Config) -> list[Metric]:
    """The trade-off in one number, its three sides, and where the weights went."""
    return [
        Metric(
            "hypervolume", "hypervolume", "higher", ".3f",
            help="Dominated by the final policy, above the policy before; lengths as shares of the longest answer.",
        ),
        Metric("accuracy", "right %", "higher", ".1f", help="Share of answers that are right."),
        Metric("length", "tokens", "lower", ".2f", help="Mean length of an answer, its end included."),
        Metric("clarity", "clear %", "higher", ".1f", help="Share well-formed with digits that do not fall."),
        Metric("weight_accuracy", "weight, right", None, ".3f", help="At the end."),
        Metric("weight_length", "weight, short", None, ".3f", help="At the end."),
        Metric("weight_clarity", "weight, clear", None, ".3f", help="At the end."),
        Metric("meta", "mean factor", None, ".3f", help="Of rewards or advantages, over the run."),
    ]  # fmt: skip


_NAMES = ("weight_accuracy", "weight_length", "weight_clarity")
CHARTS = (
    Chart(title="Right answers", x="step", y="accuracy", x_label="rollout", y_label="right %"),
    Chart(title="Length of answers", x="step", y="length", x_label="rollout", y_label="tokens"),
    Chart(title="Clear answers", x="step", y="clarity", x_label="rollout", y_label="clear %"),
    Chart(title="Weight of accuracy", x="step", y="weight_accuracy", x_label="rollout", y_label="weight"),
    Chart(title="Hypervolume-guided factor", x="step", y="meta", x_label="rollout", y_label="factor"),
)


def start(config: Config, seed: int, folder: Path) -> Any:
    """The policy after supervised training."""
    return policies.start(config, TASK, seed, folder)


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    config.check()
    if config.method not in METHODS:
        raise UsageError(f"method must be one of {', '.join(METHODS)}, got {config.method!r}")
    if config.validate_every < 1 or not config.max_norm > 0:
        raise UsageError("validate_every must be at least 1 and max_norm above 0")
    for make in _WEIGHTINGS.values():
        make(config)


def job(config: Config, job: Job) -> Mapping[str, Value]:
    """Optimize the policy of one arm and seed, and measure it on held-out prompts."""
    model, optimizer = policies.begin(config, TASK, job.start, job.device)
    weighting, shortness = _WEIGHTINGS[job.arm](config), Conciseness()
    prompts = held_out_prompts(TASK, config.test_prompts, job.device)
    few = held_out_prompts(TASK, config.measure_prompts, job.device, "validation")
    before = _point(policies.measured(model, TASK, prompts, config.test_samples))
    if isinstance(weighting, HypervolumeWeights):
        weighting.update(_point(policies.measured(model, TASK, few, config.measure_samples)))
    metas = RunningMean()

    def validate(step: int) -> None:
        if isinstance(weighting, HypervolumeWeights) and step % config.validate_every == 0:
            weighting.update(_point(policies.measured(model, TASK, few, config.measure_samples)))

    def advantages(rollout: Rollout) -> Tensor:
        metas.add(weighting.meta)
        lengths = rollout.mask.sum(1).tolist()
        short = torch.tensor(shortness(lengths), device=rollout.scores.device)
        scores = torch.stack([rollout.scores[:, 0], short, rollout.scores[:, 1]], 1)
        find = partial(objective_advantages, group=rollout.group, method=config.method, mask=rollout.mask)
        if isinstance(weighting, GradientWeights):
            single = torch.eye(3, device=scores.device)
            each = torch.stack([find(scores, one) for one in single])
            weighting.update(_influence(config, model, rollout, each))
        return weighting.advantage_factor * find(scores, weighting.reward_weights)

    def loss(rollout: Rollout, gains: Tensor) -> Tensor:
        logp, _, _ = policies.scored(model, rollout)
        return policy_loss(logp, gains, rollout.mask, old_logp=rollout.logp).loss

    def measure(_: int) -> dict[str, float]:
        accuracy, length, clarity = _point(policies.measured(model, TASK, few, config.measure_samples))
        shares = dict(zip(_NAMES, weighting.weights.tolist(), strict=True))
        return {
            "accuracy": 100 * accuracy,
            "length": length,
            "clarity": 100 * clarity,
            "meta": weighting.meta,
            **shares,
        }

    job.diverged = optimize_policy(
        model, optimizer, TASK, advantages=advantages, loss=loss, steps=config.steps, prompts=config.prompts,
        samples=config.samples, mini_batches=config.mini_batches, seed=job.seed, device=job.device,
        clip_norm=config.clip_norm, after_step=validate, measure=measure, measure_every=config.measure_every,
        states={"weights": weighting, "shortness": shortness, "meta": metas}, asked={"arm": job.arm}, record=job.record,
        folder=job.folder,
    )  # fmt: skip
    rollout = policies.measured(model, TASK, prompts, config.test_samples)
    after = _point(rollout)
    unit = torch.tensor([1.0, float(TASK.new_tokens), 1.0], dtype=torch.float64)
    scaled = (torch.tensor([after, before], dtype=torch.float64) / unit).tolist()
    right, clear = (100 * rollout.scores[:, k].view(len(prompts), -1).mean(1) for k in range(2))
    return {
        "hypervolume": hypervolume([scaled[0]], scaled[1], MAXIMIZE),
        "accuracy": right,
        "length": rollout.mask.sum(1).float().view(len(prompts), -1).mean(1),
        "clarity": clear,
        **dict(zip(_NAMES, weighting.weights.tolist(), strict=True)),
        "meta": metas.value(weighting.meta),
    }


def _point(rollout: Rollout) -> list[float]:
    """Accuracy, length in tokens and clarity."""
    accuracy, clarity = rollout.scores.double().mean(0).tolist()
    return [accuracy, rollout.mask.sum(1).double().mean().item(), clarity]


def _influence(config: Config, model: PolicyTransformer, rollout: Rollout, each: Tensor) -> Tensor:
    """On the last block, with norms over all parameters, as the paper does on its middle layers."""
    logp, _, _ = policies.scored(model, rollout)
    targets: list[nn.Parameter] = list(model.blocks[-1].parameters())
    return objective_influence(
        logp, each, rollout.mask, targets, max_norm=config.max_norm, norm_params=list(model.parameters())
    )


EXPERIMENT = Experiment(
    slug="dynamic-reward-weighting",
    title="Dynamic against fixed weights of several rewards",
    question=(
        "Whoever trains a policy on several rewards tunes their weights by hand. Do weights that move during training, "
        "by the agreement of gradients or by hypervolume, reach a better trade-off?"
    ),
    presets={
        "smoke": Config(
            width=32, warmup_steps=60, warmup_batch=64, steps=4, prompts=16, test_prompts=32, measure_prompts=16,
            measure_every=2,
        ),
        "laptop": Config(),
        "paper": Config(
            width=256, depth=6, heads=8, warmup_steps=2000, steps=450, prompts=64, measure_prompts=100,
            measure_samples=1,
        ),
    },
    arms=arms,
    claims=claims,
    metrics=metrics,
    charts=CHARTS,
    job=job,
    start=start,
    check=check,
    reading=(
        "All arms of a seed begin with the same supervised policy and see the same prompts and random numbers; what is "
        "measured, is measured on other prompts than those that move the factor. The arm that scales rewards is a "
        "control: GRPO divides a common factor away, so a difference from the balanced arm is noise. Length saturates "
        "soon on this task, at the shortest expression that exists."
    ),
)  # fmt: skip
