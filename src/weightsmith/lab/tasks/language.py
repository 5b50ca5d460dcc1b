"""Predict the next token of running text, in windows."""

import math
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.core.outputs import logits_of
from weightsmith.core.own_code import digest
from weightsmith.lab.data.labels import hold_out, subset, validation_facts
from weightsmith.lab.data.text_sets import load_text
from weightsmith.lab.data.tokens import Bytes
from weightsmith.lab.experiment import Metric
from weightsmith.lab.task import Batch, Outcome, Split, Task, forward
from weightsmith.lab.tasks.code import code_of
from weightsmith.lab.tasks.config import TaskConfig
from weightsmith.lab.tasks.tokenized import IGNORED, Rows, build_text_model, content_digest, tokenizer_of
from weightsmith.lab.train import evaluate

_BATCH = 16
_LARGEST = 700.0  # whose exponential is still a number
_FEWEST = 3  # windows: one of them may be held out


def make(config: TaskConfig) -> Task:
    """Load a text and make the task."""
    if config.loss or config.metric:
        raise UsageError("loss and metric of your own go with task images or sentences, or with a task of your own")
    name = config.data_name
    tokenizer = tokenizer_of(config, Bytes())
    windows = {
        split: _windows(name, split, tokenizer, text, config.length)
        for split, text in load_text(name, columns=config.columns, subset_name=config.subset).items()
    }
    for split, found in windows.items():
        count = config.train_examples if split == "train" else config.test_examples
        windows[split] = found[subset(len(found), count)]
    train, own = windows["train"], windows.get("validation")
    kept, held = hold_out(len(train), config.validation_fraction if own is None else 0.0)
    splits = {
        "train": _rows(train[kept]),
        "validation": _rows(train[held] if own is None else own),
        "test": _rows(windows["test"]),
    }
    return Task(
        name=name,
        build=partial(build_text_model, config, tokenizer, classes=None),
        example=partial(splits["train"].__getitems__, list(range(min(2, len(kept))))),
        fingerprint=digest(content_digest(splits), code_of(config.model, config.checkpoint)),
        facts={
            "data": f"{name}, windows of {config.length} tokens",
            "model": config.model_name,
            **validation_facts(None if own is None else len(own)),
        },
        **next_token(splits, Metric("loss", "test loss per token", "lower", ".4f")),
    )


def next_token(splits: dict[str, Rows], metric: Metric, batch_size: int = _BATCH) -> dict[str, Any]:
    """The parts of a task that predicts tokens; every row's targets are its own inputs, or ``IGNORED``."""

    def measure(model: nn.Module, split: Split) -> Outcome:
        found = evaluate(model, splits[split], token_scores, batch_size)
        perplexity = math.exp(min(found.metrics["loss"], _LARGEST))
        return Outcome({**found.metrics, "perplexity": perplexity}, found.scores)

    return {
        "train": splits["train"],
        "losses": lambda model, batch: token_scores(model, batch)["loss"],
        "evaluate": measure,
        "metric": metric,
        "held_out": {split: splits[split] for split in ("validation", "test")},
    }


def token_scores(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    """Mean over a row's targets of ``-log p(token | those before it)``, and the share of tokens that are predicted."""
    assert batch.targets is not None
    logits = logits_of(forward(model, batch))[:, :-1].float()
    targets = batch.targets[:, 1:]
    counted = targets != IGNORED
    loss = nn.functional.cross_entropy(logits.transpose(1, 2), targets, ignore_index=IGNORED, reduction="none")
    right = (logits.argmax(-1) == targets) & counted
    count = counted.sum(1).clamp_min(1)
    return {"loss": loss.sum(1) / count, "accuracy": right.sum(1) / count}


def _windows(name: str, part: str, tokenizer: Any, text: str, length: int) -> Tensor:
    ids = torch.tensor(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
    count = len(ids) // length
    if count < _FEWEST:
        raise UsageError(
            f"the {part} text of {name!r} has {len(ids)} tokens, and at least {_FEWEST} windows of length={length} are "
            "needed: give more text or a smaller length"
        )
    return ids[: count * length].view(count, length)


def _rows(windows: Tensor) -> Rows:
    return Rows(windows, windows, torch.full((len(windows),), windows.shape[1]), mask=False)
