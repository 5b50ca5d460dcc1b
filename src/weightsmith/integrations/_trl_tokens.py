"""Token rules inside TRL's GRPO trainer: which tokens a rule sees, and how its answer reaches the loss."""

import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError
from weightsmith.core.modes import evaluating
from weightsmith.reweight import Effect, KLCov, TokenRule, Tokens, fused_linear_logprob
from weightsmith.reweight.covariance import UNCLIPPED

OLD_ENTROPY, RAW_REWARDS = "weightsmith_old_entropy", "weightsmith_rewards"
Batch = dict[str, Any]
_FIELDS = ("logp", "old_logp", "advantages", "mask", "entropy", "old_entropy", "second_moment")


def check_rule(trainer: Any, rule: TokenRule) -> None:
    """Refuse settings of the trainer that the rule cannot work with, and give it the rule's clipping range.

    Raises:
        UsageError: Names the setting and what to do.
    """
    if not isinstance(rule, TokenRule):
        raise UsageError(f"token_weighting must be a rule such as Steer(), got {rule!r}")
    theirs = next(base for base in type(trainer).__mro__[1:] if "_compute_loss" in vars(base) and _of_trl(base))
    if theirs.__name__ != "GRPOTrainer":
        raise UsageError(
            f"{theirs.__name__} has a loss of its own, in which tokens cannot be weighted: use GRPOTrainer"
        )
    if trainer.loss_type == "vespo":
        raise UsageError("loss_type 'vespo' takes one advantage per sequence, so tokens cannot be weighted: use 'dapo'")
    every = trainer.args.steps_per_generation * trainer.num_iterations
    if isinstance(rule, KLCov):
        if trainer.args.gradient_accumulation_steps % every == 0:
            raise UsageError(
                "KLCov does nothing on-policy: let steps_per_generation be larger than gradient_accumulation_steps, "
                f"{trainer.args.gradient_accumulation_steps}, or num_iterations larger than 1"
            )
        if trainer.args.delta is not None:
            raise UsageError(f"KLCov does not clip ratios: leave delta at None, got {trainer.args.delta}")
    if rule.clip is not None:
        if trainer.loss_type == "sapo":
            raise UsageError(f"loss_type 'sapo' bounds ratios by itself, not by {type(rule).__name__}: use 'dapo'")
        if trainer.loss_type == "cispo" and rule.clip != UNCLIPPED:
            raise UsageError(
                f"loss_type 'cispo' caps the ratio itself at epsilon_high, which {type(rule).__name__} says as a "
                "distance from 1: set epsilon_high, or use 'dapo'"
            )
        trainer.epsilon_low, trainer.epsilon_high = rule.clip


class TokenPlan:
    """What a rule has answered for the micro-batches of the optimizer step in flight.

    Args:
        trainer: The trainer.
        rule: The rule.
        whole_batch: Let the rule see the tokens of all micro-batches and processes of an optimizer step at once.
    """

    def __init__(self, trainer: Any, rule: TokenRule, *, whole_batch: bool) -> None:
        self.trainer, self.rule, self.whole_batch = trainer, rule, whole_batch
        self.live: Batch | None = None
        self.logp: Tensor | None = None
        self.entropy: Tensor | None = None
        self.effect: Effect | None = None
        self.count: Tensor | None = None
        self._ready: list[tuple[Effect, Tensor]] = []
        self._update, self._done = -1, 0
        self._hidden: Tensor | None = None
        self._head_checked = False

    def prepare(self, model: Any, inputs: Batch, score: Any) -> None:
        """Before each micro-batch; at the first of several, score all of them without gradient and ask the rule.

        Args:
            model: As the trainer computes the loss with.
            inputs: The micro-batch at hand.
            score: TRL's own ``_get_per_token_logps_and_entropies``.
        """
        steps = self.trainer.current_gradient_accumulation_steps
        if self._update != self.trainer.state.global_step:  # an optimizer step begins
            self._update, self._done, self._ready = self.trainer.state.global_step, 0, []
        self._done += 1
        if not self.whole_batch or steps == 1 or self._ready:
            return
        window = self._window(inputs, steps - self._done + 1)
        seen = []
        with torch.no_grad(), evaluating(model):
            for batch in window:
                with self.hidden_states(model):
                    logps, entropies, _ = score(model, **forward_arguments(score, batch))
                seen.append(self.tokens(batch, logps, entropies))
        self._ready = self._answer(seen)

    def take(self, logps: Tensor, entropies: Tensor) -> None:
        """In the pass with gradient: fold the answer into the advantages of the micro-batch."""
        assert self.live is not None
        self.logp, self.entropy = logps, entropies
        own = None
        if not self._ready:
            own = self.tokens(self.live, logps, entropies)
            self._ready = self._answer([own])
        self.effect, self.count = self._ready.pop(0)
        advantages = self.live["advantages"]
        advantages = advantages[:, None] if advantages.dim() == 1 else advantages
        if self.effect.advantages is not None:
            advantages = self.effect.advantages.to(advantages.dtype)
        if self.effect.weights is not None:
            factor = torch.where(_mask(self.live) > 0, self.effect.weights, 1.0)
            advantages = advantages * factor.to(advantages.dtype)
        self.live["advantages"] = advantages.expand(logps.shape)

    def extra_loss(self, inputs: Batch) -> Tensor | None:
        """What the rule adds to the loss beside weights: a penalty on drift, a bonus for entropy."""
        effect, extra = self.effect, None
        assert effect is not None
        assert self.logp is not None
        mask = _mask(inputs)
        if effect.drift is not None and inputs.get("old_per_token_logps") is not None:
            drift = torch.where(mask > 0, self.logp - inputs["old_per_token_logps"], 0.0).abs()
            extra = _aggregated(self.trainer, effect.drift.to(drift) * drift, mask, inputs)
        if effect.entropy_coef:
            assert self.entropy is not None
            assert self.count is not None
            processes = self.trainer.accelerator.num_processes if self.whole_batch else 1
            bonus = torch.where(mask > 0, self.entropy, 0.0).sum() * processes / self.count
            extra = -effect.entropy_coef * bonus + (0.0 if extra is None else extra)
        return extra

    def tokens(self, batch: Batch, logps: Tensor, entropies: Tensor) -> Tokens:
        """What a rule sees of a micro-batch."""
        second = self._second_moment(batch, logps) if "second_moment" in self.rule.needs else None
        return Tokens.of(
            logps, batch["advantages"], _mask(batch), old_logp=batch.get("old_per_token_logps"), entropy=entropies,
            old_entropy=batch.get(OLD_ENTROPY), second_moment=second, rewards=batch.get(RAW_REWARDS),
            clip=self._clip(),
        )  # fmt: skip

    def _clip(self) -> tuple[float, float]:
        """Where the loss has no gradient; ``cispo`` and ``sapo`` bound the ratio and always have one."""
        if self.trainer.loss_type in ("cispo", "sapo"):
            return UNCLIPPED
        return self.trainer.epsilon_low, self.trainer.epsilon_high

    @contextmanager
    def hidden_states(self, model: Any) -> Iterator[None]:
        """Keep the last hidden states of the forward pass within the block, for rules that need the second moment."""
        if "second_moment" not in self.rule.needs:
            yield
            return

        def keep(_: Any, __: Any, output: Any) -> None:
            self._hidden = output.last_hidden_state.detach()

        handle = self._network(model).base_model.register_forward_hook(keep)
        try:
            yield
        finally:
            handle.remove()

    def _window(self, inputs: Batch, steps: int) -> list[Batch]:
        """``inputs`` and the micro-batches after it: ``steps`` at most, as far as they have been generated."""
        trainer = self.trainer
        held, step = trainer._buffered_inputs, trainer._step
        every = trainer.args.steps_per_generation * trainer.num_iterations
        left = min(steps, every - step % every)
        return [inputs] + [held[(step + ahead) % trainer.args.steps_per_generation] for ahead in range(1, left)]

    def _answer(self, seen: list[Tokens]) -> list[tuple[Effect, Tensor]]:
        """Ask the rule once about all tokens, and cut its answer into micro-batches."""
        accelerator = self.trainer.accelerator
        together = _joined(seen)
        rows, width, rank = len(together.mask), together.mask.shape[1], 0
        if self.whole_batch and accelerator.num_processes > 1:
            together, rank = _gathered(accelerator, together), accelerator.process_index
        effect = self.rule(together)
        for name, value in effect.metrics.items():
            self.trainer._metrics["train"][name].append(float(value))
        # what was not seen together is a part of the step: the bonus is a mean over all of it
        count = together.mask.sum().clamp(min=1) * (self.trainer.current_gradient_accumulation_steps / len(seen))
        parts, start = [], rank * rows
        for batch in seen:
            part = slice(start, start + len(batch.mask))
            parts.append((_cut(effect, part, width), count))
            start = part.stop
        return parts

    def _network(self, model: Any) -> Any:
        network = self.trainer.accelerator.unwrap_model(model)
        return network.get_base_model() if hasattr(network, "get_base_model") else network

    @torch.no_grad()
    def _second_moment(self, batch: Batch, logps: Tensor) -> Tensor:
        assert self._hidden is not None
        network, targets = self._network(self.trainer.model), batch["completion_ids"]
        head, length = network.get_output_embeddings(), targets.shape[1]
        hidden, self._hidden = self._hidden[:, :-1][:, -length:], None
        mask = batch["completion_mask"]
        found, _, second = fused_linear_logprob(
            hidden, head.weight, targets, bias=head.bias, temperature=self.trainer.temperature, mask=mask,
            return_second_moment=True,
        )  # fmt: skip
        if not self._head_checked:
            self._head_checked = True
            away = (torch.where(mask > 0, found - logps, 0.0)).abs().mean()
            if not bool(away < 0.05):
                raise UsageError(
                    f'Steer("exact") cannot follow the output head of {type(network).__name__}: its log-probabilities '
                    "are not those of hidden states times the head's weight (scaled or capped logits); use "
                    '"released" or "theorem"'
                )
        assert second is not None
        return second


def forward_arguments(score: Any, batch: Batch) -> dict[str, Any]:
    """The arguments with which TRL scores a micro-batch for the loss, read off the signature of its method."""
    own = {
        "input_ids": torch.cat([batch["prompt_ids"], batch["completion_ids"]], 1),
        "attention_mask": torch.cat([batch["prompt_mask"], batch["completion_mask"]], 1),
        "logits_to_keep": batch["completion_ids"].shape[1],
        "compute_entropy": True,
    }
    ours = {"model", "batch_size", "compute_aux_loss", *own}
    others = [name for name in inspect.signature(score).parameters if name not in ours]
    return own | {name: batch[name] for name in others if batch.get(name) is not None}


def _of_trl(base: type) -> bool:
    return base.__module__.partition(".")[0] == "trl"


def _mask(batch: Mapping[str, Any]) -> Tensor:
    mask: Tensor = batch["completion_mask"]
    return mask * batch["tool_mask"] if "tool_mask" in batch else mask


def _joined(seen: list[Tokens]) -> Tokens:
    def cat(name: str) -> Tensor | None:
        parts = [getattr(tokens, name) for tokens in seen]
        return None if parts[0] is None else torch.cat(parts)

    parts: dict[str, Any] = {name: cat(name) for name in (*_FIELDS, "rewards")}
    return replace(seen[0], **parts)


def _gathered(accelerator: Any, tokens: Tokens) -> Tokens:
    def gather(name: str) -> Tensor | None:
        value = getattr(tokens, name)
        if value is None:
            return None
        if value.dim() == 2:  # processes pad to different lengths
            value = accelerator.pad_across_processes(value.to(torch.uint8) if name == "mask" else value, dim=1)
        found: Tensor = accelerator.gather(value.contiguous())
        return found > 0 if name == "mask" else found

    parts: dict[str, Any] = {name: gather(name) for name in (*_FIELDS, "rewards")}
    return replace(tokens, **parts)


def _cut(effect: Effect, rows: slice, width: int) -> Effect:
    def part(value: Tensor | None) -> Tensor | None:
        return None if value is None else value[rows, :width]

    return replace(
        effect, advantages=part(effect.advantages), weights=part(effect.weights), drift=part(effect.drift), metrics={}
    )


def _aggregated(trainer: Any, losses: Tensor, mask: Tensor, inputs: Batch) -> Tensor:
    """As TRL turns losses per token into one number, by ``loss_type``."""
    sums, lengths = (losses * mask).sum(1), mask.sum(1)
    steps: int = trainer.current_gradient_accumulation_steps
    if trainer.loss_type in ("grpo", "sapo"):
        return (sums / lengths.clamp(min=1)).mean() / steps
    if trainer.loss_type == "bnpo":
        return sums.sum() / lengths.sum().clamp(min=1) / steps
    if trainer.loss_type == "dr_grpo":
        longest: int = trainer.max_completion_length
        return sums.sum() / (len(sums) * longest) / steps
    if trainer.loss_type == "luspo":
        return sums.mean() / steps
    normalizer: Tensor = inputs["num_items_in_batch"].clamp(min=1) / trainer.accelerator.num_processes
    per_generation: int = trainer.args.steps_per_generation
    return sums.sum() / (normalizer * steps / per_generation)
