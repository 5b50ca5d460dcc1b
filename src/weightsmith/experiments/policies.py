"""What the experiments on policy optimization share: the small policy, its supervised start, and how it is measured."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError
from weightsmith.lab.experiment import Arm, Claim
from weightsmith.lab.job import Job
from weightsmith.lab.models.policy import PolicyTransformer
from weightsmith.lab.policy import PolicyTask, Rollout, held_out_prompts, optimize_policy, sample, warm_up
from weightsmith.lab.probe import fastest
from weightsmith.lab.progress import seed_everything
from weightsmith.lab.train import Row, Stateful
from weightsmith.reweight import fused_linear_logprob

MEASURE_SEED = 104_729
"""Of the answers that are measured."""
BEFORE = Arm("before", "the supervised policy that all other arms begin with", "before RL")
"""The arm that optimizes nothing: what the others are to rise above."""


def gate(metric: str, arm: Arm) -> Claim:
    """The condition under which other claims are judged: policy optimization without the technique has learned."""
    return Claim(
        text=f"{arm.label} answers over 5 % more of the prompts than the policy before RL", metric=metric,
        winner=arm.name, loser=BEFORE.name, margin=5.0, gate=True,
    )  # fmt: skip


@dataclass(frozen=True, slots=True)
class PolicyConfig:
    """A small policy and how it is optimized."""

    width: int = 64
    """Of the transformer."""
    depth: int = 2
    """Number of its blocks."""
    heads: int = 4
    """Of each attention."""
    warmup_steps: int = 500
    """Supervised steps on right answers, shared by all arms of a seed."""
    warmup_batch: int = 256
    """Answers per supervised step."""
    warmup_lr: float = 2e-3
    """Learning rate of AdamW in supervised steps."""
    steps: int = 60
    """Rollouts."""
    prompts: int = 64
    """Prompts per rollout."""
    samples: int = 8
    """Answers per prompt."""
    mini_batches: int = 4
    """Optimizer steps per rollout."""
    lr: float = 3e-4
    """Learning rate of AdamW, constant."""
    clip_norm: float = 1.0
    """Largest norm of the gradients."""
    test_prompts: int = 400
    """Prompts on which the result is measured, the same for all arms and seeds."""
    test_samples: int = 16
    """Answers to each of them."""
    measure_every: int = 5
    """Rollouts between two points of the curves."""
    measure_prompts: int = 96
    """Prompts for a point of the curves."""
    measure_samples: int = 4
    """Answers to each of them."""
    model: str = ""
    """A language model, folder or hub id, that is trained through TRL; empty: the small policy."""
    rank: int = 0
    """Rank of the LoRA by which it is trained; 0: all of its weights are."""
    data: str = ""
    """Its questions and answers: a name (sums, arithmetic), a file, a folder or a hub id."""
    train_examples: int | None = None
    """Use this many of the questions to train on; all by default."""
    answers: Literal["boxed", "number"] = "boxed"
    """What counts of an answer: boxed, what stands in \\boxed{}, which the prompt asks for; number, its last number."""
    max_tokens: int = 512
    """Most tokens of its answers."""
    micro_batch: int = 8
    """Answers in one of its forward passes."""
    top_p: float = 1.0
    """Share of the probability from which its measured answers are drawn."""

    def check(self) -> None:
        """Refuse what cannot run.

        Raises:
            UsageError: A number is out of range.
        """
        names = (
            "width", "depth", "heads", "warmup_batch", "steps", "prompts", "samples", "mini_batches", "test_prompts",
            "test_samples", "measure_every", "measure_prompts", "measure_samples", "max_tokens", "micro_batch",
        )  # fmt: skip
        for name in names:
            if getattr(self, name) < 1:
                raise UsageError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.answers not in ("boxed", "number"):
            raise UsageError(f"answers must be boxed or number, got {self.answers!r}")
        if self.rank < 0:
            raise UsageError(f"rank must be at least 0, got {self.rank}")
        if self.warmup_steps < 0 or not self.lr > 0 or not self.warmup_lr > 0:
            raise UsageError("warmup_steps must be at least 0, lr and warmup_lr above 0")
        if self.samples < 2:
            raise UsageError(f"samples must be at least 2, so that a group has a mean, got {self.samples}")
        if self.mini_batches > self.prompts * self.samples:
            raise UsageError(f"mini_batches must be at most prompts * samples, got {self.mini_batches}")
        if self.width % self.heads:
            raise UsageError(f"width must be a multiple of heads, got {self.width} and {self.heads}")

    def network(self, task: PolicyTask) -> PolicyTransformer:
        """A policy that nobody has trained."""
        length = task.prompt_length + task.new_tokens
        return PolicyTransformer(
            vocabulary=task.vocabulary, length=length, width=self.width, depth=self.depth, heads=self.heads
        )


class RunningMean:
    """A mean that goes on after a kill."""

    def __init__(self) -> None:
        self.total, self.count = 0.0, 0

    def add(self, value: float) -> None:
        """Count one more value."""
        self.total, self.count = self.total + value, self.count + 1

    def value(self, otherwise: float) -> float:
        """The mean so far."""
        return self.total / self.count if self.count else otherwise

    def state_dict(self) -> dict[str, Any]:
        """The sum and the count."""
        return {"total": self.total, "count": self.count}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take them back."""
        self.total, self.count = float(state["total"]), int(state["count"])


def small_start(task: PolicyTask, config: PolicyConfig, seed: int) -> dict[str, Tensor]:
    """The state of the small policy of a seed after supervised training."""
    seed_everything(seed)
    model = config.network(task)
    warm_up(
        model, task, steps=config.warmup_steps, batch_size=config.warmup_batch, lr=config.warmup_lr, seed=seed,
        device=torch.device("cpu"),
    )  # fmt: skip
    return model.state_dict()


def facts_of(task: PolicyTask, text: str) -> Callable[[PolicyConfig], Mapping[str, str]]:
    """An experiment's ``facts``: on which prompts its policy is measured, and what the policy is.

    Args:
        task: Of the small policy.
        text: Its prompts, in words.
    """
    return partial(_facts, task, text)


def _facts(task: PolicyTask, text: str, config: PolicyConfig) -> dict[str, str]:
    measured = f"{config.test_prompts:,} test prompts with {config.test_samples:,} answers each"
    if config.model:
        how = f"{config.model}, LoRA of rank {config.rank}" if config.rank else config.model
        return {"data": f"{config.data}, {measured}", "model": how}
    with torch.device("meta"):  # only its size is asked for
        size = sum(p.numel() for p in config.network(task).parameters())
    shape = f"transformer of {config.depth} blocks, width {config.width}, {size:,} parameters"
    return {"data": f"{text}, {measured}", "model": shape}


def small_step_seconds(task: PolicyTask, config: PolicyConfig) -> float:
    """Seconds of a rollout of the small policy and its updates by the plain policy gradient."""
    model = config.network(task)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)

    def loss(rollout: Rollout, advantages: Tensor) -> Tensor:
        return -(scored(model, rollout)[0] * advantages.unsqueeze(1)).mean()

    return fastest(
        lambda: optimize_policy(
            model,
            optimizer,
            task,
            advantages=lambda rollout: rollout.scores[:, 0],
            loss=loss,
            steps=1,
            prompts=config.prompts,
            samples=config.samples,
            mini_batches=config.mini_batches,
            seed=0,
            device=torch.device("cpu"),
        )
    )


def steps(config: PolicyConfig, arm: str) -> int:
    """Rollouts with updates of a job; drawing and scoring other answers costs half as much as a rollout of as many.

    The supervised steps that all arms of a seed share are counted with `BEFORE`; ten of them cost as much as one.
    """
    taken = 0 if arm == BEFORE.name else config.steps
    looks = taken // config.measure_every + 1
    answers = config.test_prompts * config.test_samples + looks * config.measure_prompts * config.measure_samples
    shared = config.warmup_steps // 10 if arm == BEFORE.name else 0
    return taken + shared + answers // (2 * config.prompts * config.samples)


class PolicyRun:
    """The policy of one arm and seed: optimized as the configuration says, measured on held-out prompts.

    Args:
        config: See there.
        task: What it is to answer.
        job: With the state of `starter`'s policy.
    """

    def __init__(self, config: PolicyConfig, task: PolicyTask, job: Job) -> None:
        self.config, self.task, self.job = config, task, job
        self.model = config.network(task)
        self.model.load_state_dict(job.start)
        self.model.to(job.device)
        self._few = held_out_prompts(task, config.measure_prompts, job.device, "validation")
        self._prompts = held_out_prompts(task, config.test_prompts, job.device)

    def optimize(
        self,
        *,
        advantages: Callable[[Rollout], Tensor],
        loss: Callable[[Rollout, Tensor], Tensor],
        measure: Callable[[int], Row],
        states: Mapping[str, Stateful],
        after_step: Callable[[int], None] | None = None,
    ) -> None:
        """Run `optimize_policy`; the arm `BEFORE` takes no step."""
        config, job = self.config, self.job
        job.diverged = optimize_policy(
            self.model, torch.optim.AdamW(self.model.parameters(), lr=config.lr, weight_decay=0.01), self.task,
            advantages=advantages, loss=loss, steps=0 if job.arm == BEFORE.name else config.steps,
            prompts=config.prompts, samples=config.samples, mini_batches=config.mini_batches, seed=job.seed,
            device=job.device, clip_norm=config.clip_norm, after_step=after_step, measure=measure,
            measure_every=config.measure_every, states=states, asked={"arm": job.arm}, record=job.record,
            folder=job.folder,
        )  # fmt: skip

    def scored(self, rollout: Rollout, **options: bool) -> tuple[Tensor, Tensor, Tensor | None]:
        """Log-probabilities, entropies and second moments of a rollout's answers, by `fused_linear_logprob`."""
        return scored(self.model, rollout, **options)

    def validated(self) -> Rollout:
        """Answers to the prompts of the curves."""
        return self._measured(self._few, self.config.measure_samples)

    def tested(self) -> Rollout:
        """Answers to the prompts of the result."""
        return self._measured(self._prompts, self.config.test_samples)

    def _measured(self, prompts: Tensor, samples: int) -> Rollout:
        # the same random numbers for all arms
        return sample(self.model, self.task, prompts, samples, torch.Generator().manual_seed(MEASURE_SEED))


def scored(
    model: PolicyTransformer, rollout: Rollout, *, entropy_grad: bool = False, second_moment: bool = False
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities, entropies and second moments of a rollout's answers under the policy."""
    return fused_linear_logprob(
        rollout.hidden(model), model.head.weight, rollout.answers, mask=rollout.mask, entropy_grad=entropy_grad,
        return_second_moment=second_moment,
    )  # fmt: skip


def by_prompt(rollout: Rollout, values: Tensor) -> Tensor:
    """Values of all answers ``(N,)`` as ``(prompts, samples)``."""
    return values.view(int(rollout.group[-1]) + 1, -1)


def mean_entropy(rollout: Rollout) -> float:
    """Mean entropy of the answers' tokens, in nats."""
    return (rollout.entropy * rollout.mask).sum().item() / max(1, int(rollout.mask.sum()))
