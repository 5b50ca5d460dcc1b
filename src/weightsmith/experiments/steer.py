"""Does STEER keep a policy from collapsing, and is the policy better for it?

A small transformer learns to write expressions that hit a target. Many prompts have several right answers, so a
collapse shows as a fall of pass@16 and of the number of distinct right answers while pass@1 rises.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from weightsmith.experiments import language_policy
from weightsmith.experiments.language_policy import LanguageModelRun
from weightsmith.experiments.language_start import starter, step_timer
from weightsmith.experiments.policies import (
    BEFORE,
    PolicyConfig,
    RunningMean,
    by_prompt,
    facts_of,
    gate,
    mean_entropy,
    steps,
)
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric, Value
from weightsmith.lab.job import Job
from weightsmith.lab.policy import Rollout, pass_at_least_once
from weightsmith.lab.tasks.expressions import ThreeDigits
from weightsmith.reweight import (
    ClipCov,
    ClipHigher,
    EntropyAdvantage,
    EntropyBonus,
    ForkTokens,
    KLCov,
    Steer,
    TokenRule,
    WReinforce,
    group_advantages,
    policy_loss,
)

TASK = ThreeDigits()
_HIGHER = 0.28


@dataclass(frozen=True, slots=True)
class Config(PolicyConfig):
    """What the STEER experiment compares, and how."""

    clip_low: float = 0.2
    """How far the ratio may fall below 1."""
    clip_high: float = 0.2
    """How far it may rise above 1."""
    dual_clip: float = 10.0
    """Bound on the ratio where the advantage is negative."""
    lambda_min: float = 0.7
    """Smallest weight of the published, symmetric rule."""
    signed_lambda_min: float = 0.3
    """Smallest weight of the rule that damps only falling entropy; its largest is 1."""
    cov_ratio: float = 0.02
    """Share of tokens that Clip-Cov and KL-Cov restrain; the published 2e-4 is less than one token of these batches."""
    cov_low: float = 1.0
    """Lower end of Clip-Cov's band."""
    entropy_coef: float = 0.02
    """Weight of the entropy bonus."""
    all_rivals: bool = True
    """Also compare the other entropy interventions."""


_RULES: dict[str, Callable[[Config], TokenRule | None]] = {
    BEFORE.name: lambda _: None,
    "grpo": lambda _: None,
    "clip-higher": lambda c: ClipHigher(c.clip_low, _HIGHER),
    "clip-cov": lambda c: ClipCov(c.cov_ratio, low=c.cov_low),
    "steer": lambda c: Steer("released", lambda_min=c.lambda_min),
    "steer-signed": lambda c: Steer("exact", mode="asymmetric", lambda_min=c.signed_lambda_min, lambda_max=1.0),
    "steer-theorem": lambda c: Steer("theorem", lambda_min=c.lambda_min),
    "steer-exact": lambda c: Steer("exact", lambda_min=c.lambda_min),
    "entropy-bonus": lambda c: EntropyBonus(c.entropy_coef),
    "kl-cov": lambda c: KLCov(c.cov_ratio),
    "fork-tokens": lambda _: ForkTokens(),
    "entropy-adv": lambda _: EntropyAdvantage(),
    "w-reinforce": lambda _: WReinforce(),
}
_ARMS = (
    BEFORE,
    Arm("grpo", "no intervention", "GRPO"),
    Arm("clip-higher", "the ratio may rise to 1.28: what DAPO and TRL's users do today", "clip-higher"),
    Arm("clip-cov", "drops a few tokens of high covariance", "Clip-Cov"),
    Arm("steer", "the published rule: damps rising and falling entropy", "STEER"),
    Arm("steer-signed", "exact estimator, damps only falling entropy", "STEER signed"),
    Arm("steer-theorem", "the estimator of Theorem 1", "STEER theorem"),
    Arm("steer-exact", "the exact estimator", "STEER exact"),
    Arm("entropy-bonus", "entropy in the loss", "entropy bonus"),
    Arm("kl-cov", "penalizes drift of tokens of high covariance", "KL-Cov"),
    Arm("fork-tokens", "trains on the fifth of tokens with the highest entropy", "fork tokens"),
    Arm("entropy-adv", "adds entropy to the advantage", "Entropy-Adv"),
    Arm("w-reinforce", "weighs right answers by 0.1, without a baseline", "W-REINFORCE"),
)
_FEW = 6


def arms(config: Config) -> list[Arm]:
    """No optimization, STEER and its signed form, what people use today, and more rivals."""
    named = _ARMS if config.all_rivals else _ARMS[:_FEW]
    return [arm for arm in named if arm.name != "clip-higher" or config.clip_high != _HIGHER]


def claims(_: Config) -> list[Claim]:
    """Higher entropy at a better pass@1 than GRPO; and which part of the rule does it."""
    gain = "average of six benchmarks, Qwen2.5-Math-7B: 44.2 → 48.6"
    return [
        Claim(
            text="STEER keeps more entropy than GRPO", metric="entropy", winner="steer", loser="grpo", primary=True,
            worth=0.03, paper="entropy stays up where GRPO's collapses (curves)",
        ),
        Claim(
            text="STEER has a higher pass@1 than GRPO", metric="pass_1", winner="steer", loser="grpo", primary=True,
            worth=1.0, paper=gain, paper_gain=4.4,
        ),
        Claim(
            text="STEER has a higher pass@16 than GRPO", metric="pass_16", winner="steer", loser="grpo", worth=1.0,
        ),
        Claim(
            text="Damping only falling entropy keeps more entropy than damping both", metric="entropy",
            winner="steer-signed", loser="steer", worth=0.03,
        ),
        Claim(
            text="STEER signed has a higher pass@16 than GRPO", metric="pass_16", winner="steer-signed", loser="grpo",
            worth=1.0,
        ),
        Claim(
            text="STEER has a higher pass@1 than Clip-Cov", metric="pass_1", winner="steer", loser="clip-cov",
            worth=1.0, paper="45.7 → 48.6", paper_gain=2.9,
        ),
        gate("pass_1", _ARMS[1]),
    ]  # fmt: skip


def metrics(_: Config) -> list[Metric]:
    """Quality of single answers and of many, and how much the policy still varies."""
    return [
        Metric("pass_1", "pass@1 %", "higher", ".1f", help="Share of answers that are right, on held-out prompts."),
        Metric("pass_16", "pass@16 %", "higher", ".1f", help="Share of prompts with a right answer among 16."),
        Metric("entropy", "entropy", "higher", ".3f", help="Mean entropy of the answers' tokens, in nats."),
        Metric("distinct", "distinct right", "higher", ".2f", help="Different right answers among 16."),
        Metric("weight", "mean weight", None, ".3f", help="Mean factor of the tokens' losses over the run."),
        Metric("entropy_start", "entropy at start", None, ".3f", help="After supervised training."),
    ]


CHARTS = (
    Chart(title="Entropy of the policy", x="step", y="entropy", x_label="rollout", y_label="entropy (nats)"),
    Chart(title="pass@1 on held-out prompts", x="step", y="pass_1", x_label="rollout", y_label="pass@1 %"),
    Chart(title="Prompts with a right answer", x="step", y="pass_any", x_label="rollout", y_label="% of prompts"),
    Chart(title="Mean weight of a token so far", x="step", y="weight", x_label="rollout", y_label="weight"),
)


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    language_policy.check(config)
    for arm in arms(config):
        _RULES[arm.name](config)


def job(config: Config, job: Job) -> Mapping[str, Value]:
    """Optimize the policy of one arm and seed, and measure it on held-out prompts."""
    run, rule, seen = language_policy.run_of(config, TASK, job), _RULES[job.arm](config), RunningMean()

    def loss(rollout: Rollout, advantages: Tensor) -> Tensor:
        assert not isinstance(run, LanguageModelRun)
        needs = () if rule is None else rule.needs
        logp, entropy, second = run.scored(
            rollout, entropy_grad=isinstance(rule, EntropyBonus), second_moment="second_moment" in needs
        )
        found = policy_loss(
            logp, advantages, rollout.mask, old_logp=rollout.logp, rule=rule, entropy=entropy,
            old_entropy=rollout.entropy, second_moment=second, rewards=rollout.scores[:, 0],
            clip=(config.clip_low, config.clip_high),
            dual_clip=None if isinstance(rule, KLCov) else config.dual_clip,
        )  # fmt: skip
        if found.weights is not None:
            seen.add(found.weights[rollout.mask].mean().item())
        return found.loss

    def measure(_: int) -> dict[str, float]:
        rollout = run.validated()
        right = by_prompt(rollout, rollout.scores[:, 0])
        return {
            "entropy": mean_entropy(rollout),
            "pass_1": 100 * right.mean().item(),
            "pass_any": 100 * right.amax(1).mean().item(),
            "weight": seen.value(1.0),
        }

    entropy_start = mean_entropy(run.validated())
    if isinstance(run, LanguageModelRun):
        run.optimize(
            [run.right], measure=measure, states={},
            weighing={"token_weighting": rule, "scope": "micro_batch"}, epsilon=config.clip_low,
            epsilon_high=config.clip_high, delta=None if isinstance(rule, KLCov) else config.dual_clip,
        )  # fmt: skip
        for value in run.logged("steer/weight_mean"):
            seen.add(value)
    else:
        run.optimize(
            advantages=lambda rollout: group_advantages(rollout.scores[:, 0], rollout.group), loss=loss,
            measure=measure, states={"weight": seen} | ({} if rule is None else {"rule": rule}),
        )  # fmt: skip
    rollout = run.tested()
    right = by_prompt(rollout, rollout.scores[:, 0]) > 0
    return {
        "pass_1": 100 * right.float().mean(1),
        "pass_16": 100 * pass_at_least_once(right, min(16, config.test_samples)).float(),
        "entropy": mean_entropy(rollout),
        "distinct": _distinct(rollout),
        "weight": seen.value(1.0),
        "entropy_start": entropy_start,
    }


def _distinct(rollout: Rollout) -> Tensor:
    """Different right answers per prompt."""
    found: list[set[tuple[int, ...]]] = [set() for _ in range(int(rollout.group[-1]) + 1)]
    for group, answer, score in zip(
        rollout.group.tolist(), rollout.answers.tolist(), rollout.scores[:, 0], strict=True
    ):
        if score > 0:
            found[group].add(tuple(answer))
    return torch.tensor([float(len(answers)) for answers in found])


EXPERIMENT = Experiment(
    slug="steer",
    title="STEER against GRPO and other entropy interventions",
    question=(
        "Reinforcement learning with verifiable rewards drives a policy's entropy toward zero. Does weighting tokens "
        "by the entropy change of their updates keep it up, and are the answers better for it?"
    ),
    presets={
        "smoke": Config(
            width=32, warmup_steps=60, warmup_batch=64, steps=4, prompts=16, test_prompts=32, measure_prompts=16,
            measure_every=2, all_rivals=False,
        ),
        "laptop": Config(),
        "long": Config(
            model="HuggingFaceTB/SmolLM2-135M-Instruct", rank=16, data="sums", train_examples=2000, answers="number",
            warmup_steps=12, warmup_batch=16, warmup_lr=1e-3, max_tokens=6, steps=40, prompts=8, mini_batches=1,
            micro_batch=16, lr=1e-4, test_prompts=60, measure_every=10, measure_prompts=24, all_rivals=False,
        ),
        "paper": Config(
            model="Qwen/Qwen2.5-Math-1.5B", warmup_steps=0, max_tokens=3072, steps=200, prompts=512, mini_batches=16,
            lr=1e-6, clip_high=_HIGHER, cov_ratio=2e-4, test_prompts=30, test_samples=32, top_p=0.7,
            measure_every=10, measure_prompts=64,
        ),
    },
    arms=arms,
    claims=claims,
    metrics=metrics,
    charts=CHARTS,
    job=job,
    start=starter(TASK),
    facts=facts_of(TASK, "arithmetic expressions that use three given digits and hit a target"),
    steps=steps,
    step_seconds=step_timer(TASK),
    check=check,
    reading=(
        "All arms of a seed begin with the same supervised policy and see the same prompts and random numbers. Weights "
        "are not renormalized, as in the published code, so STEER also takes slightly shorter steps: the mean weight "
        "tells by how much. The published rule damps rising and falling entropy in equal measure; the signed arm tells "
        "what damping only the fall does. This policy has a hundred thousand weights and answers of five tokens; the "
        "paper's have billions and thousands: the presets long and paper train language models through TRL."
    ),
)  # fmt: skip
