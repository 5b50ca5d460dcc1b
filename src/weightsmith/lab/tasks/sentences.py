"""Classify texts."""

from functools import partial
from typing import Any

import torch
from torch import Tensor

from weightsmith.lab.data.labels import hold_out
from weightsmith.lab.data.sources import source_digest
from weightsmith.lab.data.text_sets import load_sentences
from weightsmith.lab.data.tokens import padded
from weightsmith.lab.fingerprint import digest
from weightsmith.lab.task import Task
from weightsmith.lab.tasks.code import code_of
from weightsmith.lab.tasks.config import TaskConfig
from weightsmith.lab.tasks.scoring import supervised
from weightsmith.lab.tasks.tokenized import Rows, build_text_model, is_hugging_face, tokenizer_of

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
    tokenizer, mask = tokenizer_of(config), is_hugging_face(config.model_name)
    train, test = (_encode(tokenizer, texts, config.length) for texts in (found.train, found.test))
    kept, held = hold_out(len(found.train), config.validation_fraction, found.train_labels)

    def rows(inputs: Tensor, lengths: Tensor, labels: Tensor, at: Tensor) -> Rows:
        return Rows(inputs[at], labels[at], lengths[at], mask=mask)

    splits = {
        "train": rows(*train, found.train_labels, kept),
        "validation": rows(*train, found.train_labels, held),
        "test": rows(*test, found.test_labels, torch.arange(len(found.test))),
    }
    return Task(
        name=name,
        build=partial(build_text_model, config, length=config.length, classes=len(found.classes)),
        example=partial(splits["train"].__getitems__, list(range(min(8, len(kept))))),
        fingerprint=digest(source_digest(name), code_of(config.model, config.loss, config.metric, config.checkpoint)),
        facts={"data": f"{name}, texts of {len(found.classes)} classes", "model": config.model_name},
        **supervised(splits, config.loss, config.metric, batch_size=_BATCH),
    )


def _encode(tokenizer: Any, texts: Any, length: int) -> tuple[Tensor, Tensor]:
    ids = [tokenizer(text, truncation=True, max_length=length)["input_ids"][:length] or [0] for text in texts]
    return padded(ids, tokenizer.pad_token_id or 0), torch.tensor([len(row) for row in ids])
