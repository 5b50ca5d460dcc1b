"""Policy optimization on tasks whose answers can be checked: sample, reward, update.

The loop knows no technique: what an advantage is and what the loss is are functions that it is given. Every rollout and
every shuffle follows from the seed and the step, so that arms differ in nothing else and a killed run goes on exactly.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.core.errors import UsageError
from weightsmith.core.modes import evaluating
from weightsmith.lab.identity import optimizer_words, weights_digest
from weightsmith.lab.models.policy import PolicyTransformer
from weightsmith.lab.progress import Progress
from weightsmith.lab.train import Row, Stateful

_PRIME = 1_000_003


class PolicyTask(Protocol):
    """What a policy is to answer, and how answers are rewarded.

    Attributes:
        vocabulary: Number of tokens.
        prompt_length: Tokens of every prompt.
        new_tokens: Most tokens of an answer.
        end: Token that ends an answer; ``None``: all answers have ``new_tokens``.
    """

    @property
    def vocabulary(self) -> int:
        """See above."""

    @property
    def prompt_length(self) -> int:
        """See above."""

    @property
    def new_tokens(self) -> int:
        """See above."""

    @property
    def end(self) -> int | None:
        """See above."""

    def draw(self, n: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw prompts ``(n, prompt_length)``, and a right answer to each, ``(n, new_tokens)``."""

    def rewards(self, prompts: Tensor, answers: Tensor, mask: Tensor) -> Tensor:
        """Reward answers: ``(n, K)``."""


@dataclass(frozen=True, slots=True)
class Rollout:
    """Sampled answers.

    Attributes:
        prompts: ``(N, P)``.
        answers: ``(N, T)``.
        mask: ``(N, T)``, boolean; the end token counts, what follows it does not.
        logp: ``(N, T)``, log-probability of each token when it was sampled.
        entropy: ``(N, T)``, entropy in nats of the distribution that it was sampled from.
        group: ``(N,)``, number of the prompt.
        scores: ``(N, K)``, rewards.
    """

    prompts: Tensor
    answers: Tensor
    mask: Tensor
    logp: Tensor
    entropy: Tensor
    group: Tensor
    scores: Tensor

    def __len__(self) -> int:
        return len(self.prompts)

    def __getitem__(self, rows: Any) -> "Rollout":
        """Some of the samples."""
        return Rollout(*[getattr(self, field.name)[rows] for field in fields(self)])

    def hidden(self, model: PolicyTransformer) -> Tensor:
        """Hidden states from which the answers' tokens are predicted, ``(N, T, D)``."""
        tokens = torch.cat([self.prompts, self.answers[:, :-1]], 1)
        return model.hidden(tokens)[0][:, self.prompts.shape[1] - 1 :]


@torch.no_grad()
def sample(
    model: PolicyTransformer,
    task: PolicyTask,
    prompts: Tensor,
    samples: int,
    generator: torch.Generator,
    *,
    temperature: float = 1.0,
) -> Rollout:
    """Sample answers to all prompts at once, token by token, with keys and values of past tokens kept.

    Args:
        model: The policy.
        task: Rewards the answers.
        prompts: ``(n, P)``.
        samples: Answers per prompt.
        generator: Where the randomness comes from.
        temperature: Divides the logits; 0 takes the most probable token.

    Returns:
        ``N = n * samples`` answers, those to one prompt side by side.
    """
    n = len(prompts) * samples
    repeated = prompts.repeat_interleave(samples, 0)
    answers = torch.zeros(n, task.new_tokens, dtype=torch.long, device=prompts.device)
    mask = torch.ones(n, task.new_tokens, dtype=torch.bool, device=prompts.device)
    logp, entropy = (torch.zeros(n, task.new_tokens, device=prompts.device) for _ in range(2))
    going = mask[:, 0].clone()
    with evaluating(model):
        states, cache = model.hidden(prompts)
        states = states[:, -1].repeat_interleave(samples, 0)
        cache = [(k.repeat_interleave(samples, 0), v.repeat_interleave(samples, 0)) for k, v in cache]
        for position in range(task.new_tokens):
            log_p = (model.head(states).float() / (temperature or 1.0)).log_softmax(-1)
            chosen = _draw(log_p, generator) if temperature else log_p.argmax(-1)
            answers[:, position], mask[:, position] = chosen, going
            logp[:, position] = log_p.gather(1, chosen[:, None])[:, 0]
            entropy[:, position] = -(log_p.exp() * log_p).sum(-1)
            if task.end is not None:
                going = going & (chosen != task.end)
            if position + 1 == task.new_tokens or not bool(going.any()):
                mask[:, position + 1 :] = False
                break
            new, cache = model.hidden(chosen[:, None], cache)
            states = new[:, 0]
    group = torch.arange(len(prompts), device=prompts.device).repeat_interleave(samples)
    return Rollout(repeated, answers, mask, logp, entropy, group, task.rewards(repeated, answers, mask))


def warm_up(
    model: PolicyTransformer,
    task: PolicyTask,
    *,
    steps: int,
    batch_size: int,
    lr: float,
    seed: int,
    device: torch.device,
) -> None:
    """Teach a policy right answers by supervised steps, so that some of its own answers are right.

    Args:
        model: Trained in place.
        task: Gives prompts and right answers.
        steps: Steps of AdamW.
        batch_size: Answers per step.
        lr: Learning rate.
        seed: Of the answers.
        device: Where the model is.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    for step in range(steps):
        prompts, answers = (part.to(device) for part in task.draw(batch_size, _generator(seed, step, 0)))
        logits = model(torch.cat([prompts, answers[:, :-1]], 1))[:, prompts.shape[1] - 1 :]
        losses = F.cross_entropy(logits.transpose(1, 2), answers, reduction="none")
        counted = _until_end(answers, task.end)
        optimizer.zero_grad()
        ((losses * counted).sum() / counted.sum()).backward()
        optimizer.step()


def optimize_policy(
    model: PolicyTransformer,
    optimizer: torch.optim.Optimizer,
    task: PolicyTask,
    *,
    advantages: Callable[[Rollout], Tensor],
    loss: Callable[[Rollout, Tensor], Tensor],
    steps: int,
    prompts: int,
    samples: int,
    mini_batches: int,
    seed: int,
    device: torch.device,
    clip_norm: float = 1.0,
    after_step: Callable[[int], None] | None = None,
    measure: Callable[[int], Row] | None = None,
    measure_every: int = 5,
    states: Mapping[str, Stateful] | None = None,
    asked: Mapping[str, Any] | None = None,
    record: Callable[[Row], None] | None = None,
    folder: Path | None = None,
) -> bool:
    """Sample, reward, update, over and over.

    Args:
        model: The policy, trained in place.
        optimizer: Of its parameters.
        task: Gives prompts and rewards.
        advantages: Called once per rollout, before any update: ``rollout -> (N,)`` or ``(N, T)``.
        loss: ``(part of a rollout, its advantages) -> scalar``.
        steps: Rollouts.
        prompts: Prompts per rollout.
        samples: Answers per prompt.
        mini_batches: Optimizer steps per rollout.
        seed: Of prompts, samples and shuffles.
        device: Where the model is.
        clip_norm: Largest norm of all gradients.
        after_step: Called with the number of rollouts done, after the updates of each.
        measure: ``step -> numbers``, to record before the first and after every ``measure_every``-th step.
        measure_every: See ``measure``; the last step always has a row.
        states: What else changes on the way, saved with the run in flight.
        asked: What else makes this run what it is, compared when it resumes.
        record: Takes each row.
        folder: Where the run in flight is saved.

    Returns:
        Whether training diverged: a loss or a weight was not finite.

    Raises:
        UsageError: The samples cannot be split into so many mini-batches.
    """
    if not 1 <= mini_batches <= prompts * samples:
        raise UsageError(f"mini_batches must be between 1 and {prompts * samples}, got {mini_batches}")
    sizes = {
        "steps": steps, "prompts": prompts, "samples": samples, "mini_batches": mini_batches, "seed": seed,
        "clip_norm": clip_norm, "measure_every": measure_every, "first weights": weights_digest(model),
        "optimizer": optimizer_words(optimizer),
    }  # fmt: skip
    parts = {"model": model, "optimizer": optimizer} | {f"hook {name}": part for name, part in (states or {}).items()}
    progress = Progress(folder, {**sizes, **(asked or {})}, parts, seconds=30.0, writes=True)
    for row in progress.rows:
        if record is not None:
            record(row)

    def note(step: int) -> None:
        if measure is not None and len(progress.rows) < 1 + step // measure_every + (step % measure_every > 0):
            progress.rows.append({"step": float(step), **measure(step)})
            if record is not None:
                record(progress.rows[-1])

    if not progress.step:
        note(0)
    while progress.step < steps and not progress.diverged:
        step = progress.step
        asked_prompts = task.draw(prompts, _generator(seed, step, 1))[0].to(device)
        rollout = sample(model, task, asked_prompts, samples, _generator(seed, step, 2))
        gains = advantages(rollout)
        order = torch.randperm(len(rollout), generator=_generator(seed, step, 3))
        total = 0.0
        for rows in order.chunk(mini_batches):
            optimizer.zero_grad()
            found = loss(rollout[rows], gains[rows])
            found.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
            if not bool(found.isfinite()) or not bool(norm.isfinite()):
                progress.diverged = True
                break
            optimizer.step()
            total += found.item()
        progress.count(total)
        if after_step is not None:
            after_step(progress.step)
        if progress.step % measure_every == 0 or progress.step == steps:
            note(progress.step)
        progress.save_if_due()
    progress.save()
    return progress.diverged


def held_out_prompts(
    task: PolicyTask, n: int, device: torch.device, split: Literal["validation", "test"] = "test"
) -> Tensor:
    """Prompts that are the same for all seeds and arms."""
    return task.draw(n, torch.Generator().manual_seed(7919 if split == "test" else 6007))[0].to(device)


def pass_at_least_once(right: Tensor, k: int) -> Tensor:
    """Chance that one of ``k`` samples is right, estimated without bias from more: ``1 - C(n - c, k) / C(n, k)``.

    Args:
        right: ``(prompts, n)``, boolean.
        k: At most ``n``.

    Returns:
        ``(prompts,)``.

    Source:
        arXiv 2107.03374, equation 1.
    """
    n, wrong = right.shape[1], (~right).sum(1).double()
    if not 1 <= k <= n:
        raise UsageError(f"k must be between 1 and the number of samples, {n}, got {k}")
    chances = [(wrong - i).clamp(min=0) / (n - i) for i in range(k)]
    return 1 - torch.stack(chances).prod(0)


def _draw(log_p: Tensor, generator: torch.Generator) -> Tensor:
    # on the generator's device, so that every device draws the same
    noise = torch.rand(log_p.shape, generator=generator).clamp_(1e-12).log_().neg_().log_().neg_()
    return (log_p + noise.to(log_p.device)).argmax(-1)


def _until_end(answers: Tensor, end: int | None) -> Tensor:
    if end is None:
        return torch.ones_like(answers, dtype=torch.bool)
    ended = (answers == end).long().cumsum(1)
    return (ended - (answers == end).long()) == 0


def _generator(seed: int, step: int, purpose: int) -> torch.Generator:
    return torch.Generator().manual_seed((seed * _PRIME + step) * 4 + purpose)
