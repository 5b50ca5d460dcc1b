"""Answer questions: trained on the tokens of answers alone."""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.core.own_code import digest
from weightsmith.lab.data.labels import hold_out, validation_facts
from weightsmith.lab.data.text_sets import Row, load_questions, prompt, same_answer
from weightsmith.lab.data.tokens import Bytes, pad_of, padded
from weightsmith.lab.experiment import Metric
from weightsmith.lab.task import Outcome, Split, Task
from weightsmith.lab.tasks.code import code_of
from weightsmith.lab.tasks.config import TaskConfig
from weightsmith.lab.tasks.language import next_token
from weightsmith.lab.tasks.tokenized import (
    IGNORED,
    Rows,
    build_text_model,
    content_digest,
    is_hugging_face,
    tokenizer_of,
)


def make(config: TaskConfig) -> Task:
    """Load questions with answers and make the task."""
    if config.loss or config.metric:
        raise UsageError("loss and metric of your own go with task images or sentences, or with a task of your own")
    if config.new_tokens and not is_hugging_face(config.model_name):
        raise UsageError(f"new_tokens must be 0 for model {config.model_name!r}, which cannot generate")
    name, tokenizer = config.data_name, tokenizer_of(config, Bytes())
    load = partial(load_questions, name, columns=config.columns, subset_name=config.subset)
    train, test = load("train", config.train_examples), load("test", config.test_examples)
    own = load("validation", config.test_examples)
    kept, held = hold_out(len(train), 0.0 if own else config.validation_fraction)
    validation = own or [train[i] for i in held.tolist()]
    parts = {"train": [train[i] for i in kept.tolist()], "validation": validation, "test": test}
    mask = is_hugging_face(config.model_name)
    asked = sum(map(len, parts.values()))
    parts = {split: [row for row in rows if _fits(tokenizer, row, config.length)] for split, rows in parts.items()}
    left_out = asked - sum(map(len, parts.values()))
    if not parts["train"] or not parts["test"]:
        raise UsageError(f"length must leave room for answers, got {config.length}")
    splits = {split: _encode(tokenizer, rows, config.length, mask) for split, rows in parts.items()}
    made = next_token(splits, Metric("accuracy", "answer tokens predicted", "higher", ".4f"))
    if config.new_tokens:
        measure = made["evaluate"]

        def evaluate(model: nn.Module, split: Split) -> Outcome:
            found = measure(model, split)
            exact = exact_matches(model, tokenizer, parts[split], new_tokens=config.new_tokens)
            scores = {**found.scores, "exact": exact}
            return Outcome({**found.metrics, "exact": exact.mean().item()}, scores)

        made |= {
            "evaluate": evaluate,
            "metric": Metric("exact", "exact answers", "higher", ".4f", 1 / len(parts["test"])),
        }
    note = f"; {left_out} of {asked} left out, longer than {config.length} tokens" if left_out else ""
    return Task(
        name=name,
        build=partial(build_text_model, config, tokenizer, classes=None),
        example=partial(splits["train"].__getitems__, list(range(min(2, len(splits["train"]))))),
        fingerprint=digest(content_digest(splits), code_of(config.model, config.checkpoint)),
        facts={
            "data": f"{name}, questions with answers{note}",
            "model": config.model_name,
            **validation_facts(len(own) or None),
        },
        **made,
    )


def _fits(tokenizer: Any, row: Row, length: int) -> bool:
    """Whether a question leaves room for the beginning of its answer."""
    return len(tokenizer(prompt(row[0]))["input_ids"]) < length - 1


def _encode(tokenizer: Any, rows: Sequence[Row], length: int, mask: bool) -> Rows:
    """Tokens of questions and answers, cut at ``length``; an answer that is not cut ends in the tokenizer's sign."""
    end, inputs, targets = tokenizer.eos_token_id, [], []
    for question, answer in rows:
        asked = tokenizer(prompt(question))["input_ids"]
        answered = tokenizer(" " + answer, add_special_tokens=False)["input_ids"]
        ids = [*asked, *answered, *([] if end is None else [end])][:length]
        inputs.append(ids)
        targets.append([*[IGNORED] * len(asked), *ids[len(asked) :]])
    return Rows(
        padded(inputs, pad_of(tokenizer)),
        padded(targets, IGNORED),
        torch.tensor([len(row) for row in inputs], dtype=torch.int64),
        mask=mask,
    )


@torch.no_grad()
def exact_matches(model: Any, tokenizer: Any, rows: Sequence[Row], *, new_tokens: int, batch_size: int = 16) -> Tensor:
    """Whether each generated answer ends in the right number or, where there is none, is the right text, ``(N,)``."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    found = []
    training, device = model.training, next(model.parameters()).device
    model.eval()
    try:
        for first in range(0, len(rows), batch_size):
            some = rows[first : first + batch_size]
            asked = tokenizer([prompt(question) for question, _ in some], return_tensors="pt", padding=True).to(device)
            answers = model.generate(
                input_ids=asked["input_ids"],
                attention_mask=asked["attention_mask"],
                max_new_tokens=new_tokens,
                do_sample=False,
                use_cache=True,
                pad_token_id=tokenizer.pad_token_id,
            )
            texts = tokenizer.batch_decode(answers[:, asked["input_ids"].shape[1] :], skip_special_tokens=True)
            found += [same_answer(text, answer) for text, (_, answer) in zip(texts, some, strict=True)]
    finally:
        model.train(training)
    return torch.tensor(found, dtype=torch.float32)
