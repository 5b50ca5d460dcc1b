"""Do reward weights that change during training reach a better trade-off of several rewards than fixed ones?

A small transformer writes expressions that hit a target. Three rewards: right, shorter than the running mean, and
well-formed with digits that do not fall.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError
from weightsmith.experiments import language_policy
from weightsmith.experiments.aggregation import Aggregation, report_missing, rivals
from weightsmith.experiments.language_policy import LanguageModelRun
from weightsmith.experiments.language_start import starter, step_timer
from weightsmith.experiments.policies import (
    BEFORE,
    PolicyConfig,
    PolicyRun,
    RunningMean,
    by_prompt,
    facts_of,
    gate,
    steps,
)
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric, Value
from weightsmith.lab.job import Job
from weightsmith.lab.policy import Rollout
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
    BEFORE.name: lambda _: FixedWeights(BALANCED),
    "balanced": lambda _: FixedWeights(BALANCED),
    "accuracy": lambda _: FixedWeights(ACCURACY),
    "efficiency": lambda _: FixedWeights(EFFICIENCY),
    "gradient": lambda c: GradientWeights(3, weights=BALANCED, step_size=c.step_size),
    "hypervolume": lambda _: HypervolumeWeights(BALANCED, MAXIMIZE),
    "hypervolume-reward": lambda _: HypervolumeWeights(BALANCED, MAXIMIZE, apply_to="reward"),
    "upgrad": lambda _: Aggregation("UPGrad", 3),
    "mgda": lambda _: Aggregation("MGDA", 3),
}
_BALANCED_ARM = Arm("balanced", "fixed weights 0.334, 0.333, 0.333", "fixed, balanced")


def arms(config: Config) -> list[Arm]:
    """No optimization, three fixed weightings, both dynamic ones, the form of one that cancels, and TorchJD's rules."""
    return [
        BEFORE,
        _BALANCED_ARM,
        Arm("accuracy", "fixed weights 0.5, 0.25, 0.25", "fixed, accuracy"),
        Arm("efficiency", "fixed weights 0.25, 0.375, 0.375", "fixed, efficiency"),
        Arm("gradient", "weights moved by the agreement of gradients", "gradient weights"),
        Arm("hypervolume", "advantages times a factor from validation points", "hypervolume"),
        Arm("hypervolume-reward", "rewards times that factor, as released: cancels under GRPO", "hypervolume, rewards"),
        *_rivals(config),
    ]


def _rivals(config: Config) -> list[Arm]:
    return [] if config.model else rivals()  # TRL has one loss, not one per reward


def claims(config: Config) -> list[Claim]:
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
        *[
            Claim(
                text=f"Gradient weights dominate a larger hypervolume than {arm.title}", metric="hypervolume",
                winner="gradient", loser=arm.name, worth=0.03,
            )
            for arm in _rivals(config)
        ],
        gate("accuracy", _BALANCED_ARM),
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


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    language_policy.check(config)
    if config.method not in METHODS:
        raise UsageError(f"method must be one of {', '.join(METHODS)}, got {config.method!r}")
    if config.validate_every < 1 or not config.max_norm > 0:
        raise UsageError("validate_every must be at least 1 and max_norm above 0")
    if not config.model:
        report_missing()
    for arm in arms(config):
        _WEIGHTINGS[arm.name](config)


def job(config: Config, job: Job) -> Mapping[str, Value]:
    """Optimize the policy of one arm and seed, and measure it on held-out prompts."""
    run, weighting, shortness = language_policy.run_of(config, TASK, job), _WEIGHTINGS[job.arm](config), Conciseness()
    before, metas = _point(run.tested()), RunningMean()

    def validate(step: int) -> None:
        if isinstance(weighting, HypervolumeWeights) and step % config.validate_every == 0:
            weighting.update(_point(run.validated()))

    def advantages(rollout: Rollout) -> Tensor:
        metas.add(weighting.meta)
        short = torch.tensor(shortness(rollout.mask.sum(1).tolist()), device=rollout.scores.device)
        scores = torch.stack([rollout.scores[:, 0], short, rollout.scores[:, 1]], 1)
        find = partial(objective_advantages, group=rollout.group, method=config.method, mask=rollout.mask)
        if isinstance(weighting, GradientWeights | Aggregation):
            each = torch.stack([find(scores, one) for one in torch.eye(3, device=scores.device)])
            if isinstance(weighting, Aggregation):
                return each.transpose(0, 1)
            assert isinstance(run, PolicyRun)
            weighting.update(_influence(run, rollout, each, config.max_norm))
        return weighting.advantage_factor * find(scores, weighting.reward_weights)

    def loss(rollout: Rollout, gains: Tensor) -> Tensor:
        assert isinstance(run, PolicyRun)
        find = partial(policy_loss, run.scored(rollout)[0], mask=rollout.mask, old_logp=rollout.logp)
        if isinstance(weighting, Aggregation):
            return weighting.loss([find(one).loss for one in gains.unbind(1)], list(run.model.parameters()))
        return find(gains).loss

    def measure(_: int) -> dict[str, float]:
        accuracy, length, clarity = _point(run.validated())
        shares = dict(zip(_NAMES, weighting.weights.tolist(), strict=True))
        return {
            "accuracy": 100 * accuracy,
            "length": length,
            "clarity": 100 * clarity,
            "meta": weighting.meta,
            **shares,
        }

    def short_reward(completion_ids: list[list[int]], **_: Any) -> list[float]:
        return shortness([len(ids) for ids in completion_ids])

    validate(0)
    if isinstance(run, LanguageModelRun):
        gradient = isinstance(weighting, GradientWeights)
        run.optimize(
            [run.right, short_reward, language_policy.clear], measure=measure, after_step=validate,
            states={"shortness": shortness}, weighing={"reward_weighting": weighting, "max_grad_norm": config.max_norm},
            # the authors switch clipping off where gradients are to be linear in the rewards
            epsilon=100.0 if gradient else 0.2, delta=None if gradient else 3.0,
            lr_scheduler_type="polynomial" if gradient else "constant",
            lr_scheduler_kwargs={"power": 1.03, "lr_end": 0.0} if gradient else None,
        )  # fmt: skip
    else:
        run.optimize(
            advantages=advantages, loss=loss, measure=measure, after_step=validate,
            states={"weights": weighting, "shortness": shortness, "meta": metas},
        )  # fmt: skip
    rollout = run.tested()
    unit = torch.tensor([1.0, float(config.max_tokens if config.model else TASK.new_tokens), 1.0], dtype=torch.float64)
    after, reference = (torch.tensor([_point(rollout), before], dtype=torch.float64) / unit).tolist()
    right, clear = (100 * by_prompt(rollout, rollout.scores[:, k]).mean(1) for k in range(2))
    return {
        "hypervolume": hypervolume([after], reference, MAXIMIZE),
        "accuracy": right,
        "length": by_prompt(rollout, rollout.mask.sum(1).float()).mean(1),
        "clarity": clear,
        **dict(zip(_NAMES, weighting.weights.tolist(), strict=True)),
        "meta": metas.value(weighting.meta),
    }


def _point(rollout: Rollout) -> list[float]:
    """Accuracy, length in tokens and clarity."""
    accuracy, clarity = rollout.scores.double().mean(0).tolist()
    return [accuracy, rollout.mask.sum(1).double().mean().item(), clarity]


def _influence(run: PolicyRun, rollout: Rollout, each: Tensor, max_norm: float) -> Tensor:
    """On the last block, with norms over all parameters, as the paper does on its middle layers."""
    return objective_influence(
        run.scored(rollout)[0], each, rollout.mask, list(run.model.blocks[-1].parameters()), max_norm=max_norm,
        norm_params=list(run.model.parameters()),
    )  # fmt: skip


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
            model="Qwen/Qwen2.5-1.5B", warmup_steps=0, max_tokens=2048, steps=420, prompts=64, lr=1e-6,
            test_prompts=100, test_samples=1, measure_prompts=100, measure_samples=1,
        ),
    },
    arms=arms,
    claims=claims,
    metrics=metrics,
    charts=CHARTS,
    job=job,
    start=starter(TASK),
    facts=facts_of(TASK, "arithmetic expressions that hit a target"),
    steps=steps,
    step_seconds=step_timer(TASK),
    check=check,
    reading=(
        "All arms of a seed begin with the same supervised policy and see the same prompts and random numbers; what is "
        "measured, is measured on other prompts than those that move the factor. The arm that scales rewards is a "
        "control: GRPO divides a common factor away, so a difference from the balanced arm is noise. Length saturates "
        "soon on this task, at the shortest expression that exists."
    ),
)  # fmt: skip
