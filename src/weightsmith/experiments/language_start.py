"""With which policy the arms of a seed begin, small or a language model, and what a rollout of it costs."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.device import default_device
from weightsmith.core.errors import UsageError, require
from weightsmith.experiments.adapters import with_lora
from weightsmith.experiments.policies import PolicyConfig, small_start, small_step_seconds
from weightsmith.lab.data.text_sets import Row, load_questions
from weightsmith.lab.policy import PolicyTask
from weightsmith.lab.probe import fastest, fastest_loss
from weightsmith.lab.progress import seed_everything
from weightsmith.lab.tasks.config import TaskConfig, make_task
from weightsmith.lab.train import fit
from weightsmith.reweight import fused_linear_logprob

_TIMED_TOKENS = 32
_LONGEST_QUESTION = 256


def starter(task: PolicyTask) -> Callable[[Any, int, Path], Any]:
    """An experiment's ``start``: the policy of a seed after supervised training, with which all its arms begin."""
    return partial(_start, task)


def step_timer(task: PolicyTask) -> Callable[[Any], float]:
    """An experiment's ``step_seconds``: a rollout and its updates by the plain policy gradient."""
    return partial(_step_seconds, task)


def language_model(config: PolicyConfig) -> Any:
    """The configuration's language model, with LoRA where it has a rank."""
    transformers = require("transformers", extra="hf", purpose="training a language model")
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=torch.float32)
    return with_lora(model, config.rank) if config.rank else model


def train_questions(config: PolicyConfig) -> list[Row]:
    """Questions and answers to train on, those of the curves included.

    Raises:
        UsageError: There are no more than the curves take.
    """
    rows = load_questions(config.data, "train", config.train_examples)
    if len(rows) <= config.measure_prompts:
        raise UsageError(f"data must hold more than measure_prompts, {config.measure_prompts}, got {len(rows)}")
    return rows


def token_logprobs(model: Any, tokens: Tensor, seen: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
    """Log-probabilities and entropies of the last tokens of each row, and second moments, by `fused_linear_logprob`.

    Args:
        model: A causal language model of Hugging Face, with or without adapters of PEFT.
        tokens: ``(N, P + T)``, prompts and answers.
        seen: ``(N, P + T)``, bool: no padding.
        mask: ``(N, T)``, bool: tokens of answers that count.
    """
    size = tokens.shape[1] - mask.shape[1]
    bare = model.get_base_model() if hasattr(model, "get_base_model") else model
    states = bare.base_model(input_ids=tokens, attention_mask=seen).last_hidden_state
    return fused_linear_logprob(
        states[:, size - 1 : -1], bare.get_output_embeddings().weight, tokens[:, size:], mask=mask
    )


def _start(task: PolicyTask, config: PolicyConfig, seed: int, folder: Path) -> dict[str, Tensor]:
    if not config.model:
        return small_start(task, config, seed)
    if not config.rank and not config.warmup_steps:  # comes trained
        return {}
    seed_everything(seed)
    model = language_model(config)
    if config.warmup_steps:
        questions = TaskConfig(
            task="questions", data=config.data, model=config.model, train_examples=config.train_examples,
            validation_fraction=config.measure_prompts / len(train_questions(config)),
            length=config.max_tokens + _LONGEST_QUESTION,
        )  # fmt: skip
        fit(
            model, torch.optim.AdamW(_trained(model).values(), lr=config.warmup_lr, weight_decay=0.01),
            make_task(questions), steps=config.warmup_steps, batch_size=config.warmup_batch, seed=seed,
            schedule="constant", clip_norm=1.0, validate="never", folder=folder,
        )  # fmt: skip
    return {name: value.detach().cpu() for name, value in _trained(model).items()}


def _trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def _step_seconds(task: PolicyTask, config: PolicyConfig) -> float:
    """Of a language model: short answers to some prompt are drawn and learned from; longer ones cost in proportion."""
    if not config.model:
        return small_step_seconds(task, config)
    seed_everything(0)
    model = language_model(config).to(default_device())
    new = min(config.max_tokens, _TIMED_TOKENS)
    ids = torch.randint(model.config.vocab_size, (config.samples, _TIMED_TOKENS), device=model.device)

    def draw() -> None:
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), min_new_tokens=new, max_new_tokens=new)

    tokens = torch.randint(model.config.vocab_size, (config.micro_batch, _TIMED_TOKENS + new), device=model.device)
    all_of_it = torch.ones_like(tokens, dtype=torch.bool)

    def loss() -> Tensor:
        return token_logprobs(model, tokens, all_of_it, all_of_it[:, _TIMED_TOKENS:])[0].mean()

    passes = config.prompts * config.samples / config.micro_batch
    return (config.prompts * fastest(draw, 2) + passes * fastest_loss(loss)) * config.max_tokens / new
