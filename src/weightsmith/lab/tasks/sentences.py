"""Classify texts."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.own_code import digest
from weightsmith.lab.data.labels import hold_out, validation_facts
from weightsmith.lab.data.text_sets import load_sentences
from weightsmith.lab.data.tokens import Words, pad_of, padded
from weightsmith.lab.task import Task
from weightsmith.lab.tasks.code import code_of
from weightsmith.lab.tasks.config import TaskConfig
from weightsmith.lab.tasks.scoring import supervised
from weightsmith.lab.tasks.tokenized import (
    Rows,
    build_text_model,
    content_digest,
    is_hugging_face,
    tokenizer_of,
)

_BATCH = 64


def make(config: TaskConfig) -> Task:
    """Load texts with labels and make the task."""
    name = config.data_name
    found = load_sentences(
        name,
        columns=config.columns,
        subset_name=config.subset,
        train_examples=config.train_examples,
        test_examples=config.test_examples,
    )
    tokenizer, mask = tokenizer_of(config, Words()), is_hugging_face(config.model_name)
    train, test = (_encode(tokenizer, texts, config.length) for texts in (found.train, found.test))
    own = None if found.validation is None else _encode(tokenizer, found.validation, config.length)
    fraction = config.validation_fraction if own is None else 0.0
    kept, held = hold_out(len(found.train), fraction, found.train_labels)

    def rows(inputs: Tensor, lengths: Tensor, labels: Tensor, at: Tensor) -> Rows:
        return Rows(inputs[at], labels[at], lengths[at], mask=mask)

    splits = {
        "train": rows(*train, found.train_labels, kept),
        "validation": (
            rows(*train, found.train_labels, held)
            if own is None
            else rows(*own, found.validation_labels, torch.arange(len(found.validation_labels)))
        ),
        "test": rows(*test, found.test_labels, torch.arange(len(found.test))),
    }
    return Task(
        name=name,
        build=partial(build_text_model, config, tokenizer, classes=len(found.classes)),
        example=partial(splits["train"].__getitems__, list(range(min(8, len(kept))))),
        fingerprint=digest(
            content_digest(splits),
            *found.classes,
            code_of(config.model, config.loss, config.metric, config.checkpoint),
        ),
        facts={
            "data": f"{name}, texts of {len(found.classes)} classes",
            "model": config.model_name,
            **validation_facts(None if own is None else len(found.validation_labels), found.unused),
        },
        **supervised(splits, config.loss, config.metric, batch_size=_BATCH, classes=len(found.classes)),
    )


def _encode(tokenizer: Any, texts: Sequence[str], length: int) -> tuple[Tensor, Tensor]:
    pad = pad_of(tokenizer)
    found = tokenizer(list(texts), truncation=True, max_length=length)["input_ids"]
    rows = [row[:length] or [pad] for row in found]
    return padded(rows, pad), torch.tensor([len(row) for row in rows])
