"""Questions with answers, as a causal language model trains on them and answers them."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weightsmith.core.errors import UsageError, require
from weightsmith.experiments._source import PURPOSE, find_source

_SUMS = "arithmetic"
_COLUMNS = (("question", "answer"), ("query", "response"))  # the second pair is MetaMathQA's
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_IGNORED = -100

Row = tuple[str, str]


def find_questions(name: str) -> str:
    """Find a data set of questions; see `find_source`. ``"arithmetic"`` is made here and needs none."""
    return name if name == _SUMS else find_source(name, "question and answer")


def load_questions(name: str, split: str, most: int | None, subset: str = "") -> list[Row]:
    """Read the first ``most`` rows of a split.

    Args:
        name: ``"arithmetic"``, or see `find_questions`.
        split: ``"train"`` or ``"test"``.
        most: At most so many rows; ``None``: all, of arithmetic 2000 and 200.
        subset: A hub data set's configuration.

    Raises:
        UsageError: The columns are not known.
    """
    if name == _SUMS:
        return _sums(split, most)
    datasets = require("datasets", extra="hf", purpose=PURPOSE)
    source = find_questions(name)
    table = datasets.load_dataset(source, *([subset] if subset and not Path(source).is_dir() else []), split=split)
    columns = next((pair for pair in _COLUMNS if set(pair) <= set(table.column_names)), None)
    if columns is None:
        names = " or ".join(" and ".join(pair) for pair in _COLUMNS)
        raise UsageError(f"data {name!r} needs columns {names}, has {', '.join(table.column_names)}")
    question, answer = columns
    table = table.select(range(min(most or len(table), len(table))))
    return [(str(row[question]), str(row[answer])) for row in table]


def _sums(split: str, most: int | None) -> list[Row]:
    # all sums in one fixed order: the test takes the last ones
    order = torch.randperm(98**2 * 8, generator=torch.Generator().manual_seed(0))
    chosen = order[: most or 2000] if split == "train" else order[-(most or 200) :]
    rows = []
    for index in chosen.tolist():
        a, b, c = index // (98 * 8) + 2, index // 8 % 98 + 2, index % 8 + 2
        rows.append(
            (f"What is ({a} + {b}) * {c}?", f"{a} + {b} = {a + b}. {a + b} * {c} = {(a + b) * c}.\n#### {(a + b) * c}")
        )
    return rows


@dataclass(frozen=True, slots=True)
class Encoded:
    """Questions and answers as tokens; the loss counts the answers'.

    Attributes:
        inputs: ``(N, T)``, padded on the right.
        labels: ``(N, T)``, ``-100`` where nothing is to be learnt.
    """

    inputs: Tensor
    labels: Tensor

    def loss(self, model: Any, rows: Tensor) -> Tensor:
        """Mean cross-entropy per answer token of some rows ``(B,)``."""
        total, _, count = self._score(model, rows)
        return total / count

    @torch.no_grad()
    def measure(self, model: Any, batch_size: int) -> dict[str, float]:
        """Mean loss per answer token, and the share of answer tokens that are predicted."""
        sums = torch.zeros(3, dtype=torch.float64)
        for rows in torch.arange(len(self.inputs)).split(batch_size):
            sums += torch.stack([part.double().cpu() for part in self._score(model, rows)])
        loss, correct, count = sums.tolist()
        return {"loss": loss / count, "accuracy": correct / count}

    def _score(self, model: Any, rows: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        inputs, labels = self.inputs[rows].to(model.device), self.labels[rows].to(model.device)
        width = int((labels != _IGNORED).any(0).nonzero().max()) + 1  # what follows the longest answer is padding
        logits = model(input_ids=inputs[:, :width]).logits[:, :-1].float()
        labels = labels[:, 1:width]
        loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten(), ignore_index=_IGNORED, reduction="sum")
        return loss, (logits.argmax(-1) == labels).sum(), (labels != _IGNORED).sum()


def encode(tokenizer: Any, rows: Sequence[Row], length: int) -> Encoded:
    """Turn rows into tokens, cut at ``length``; rows whose answer is cut off whole are left out."""
    inputs = torch.full((len(rows), length), tokenizer.eos_token_id or 0)
    labels = torch.full((len(rows), length), _IGNORED)
    for index, (question, answer) in enumerate(rows):
        asked = tokenizer(prompt(question))["input_ids"]
        ids = torch.tensor([*asked, *tokenizer(" " + answer, add_special_tokens=False)["input_ids"]])[: length - 1]
        ids = torch.cat([ids, ids.new_tensor([tokenizer.eos_token_id or 0])])
        inputs[index, : len(ids)] = ids
        labels[index, len(asked) : len(ids)] = ids[len(asked) :]
    kept = (labels != _IGNORED).sum(1) > 1
    if not kept.any():
        raise UsageError(f"length must leave room for answers, got {length}")
    return Encoded(inputs[kept], labels[kept])


def prompt(question: str) -> str:
    """What stands before an answer."""
    return f"Question: {question}\nAnswer:"


@torch.no_grad()
def exact_matches(model: Any, tokenizer: Any, rows: Sequence[Row], *, new_tokens: int, batch_size: int) -> float:
    """Share of questions whose generated answer ends in the right number."""
    tokenizer.padding_side = "left"
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    right = 0
    for first in range(0, len(rows), batch_size):
        some = rows[first : first + batch_size]
        asked = tokenizer([prompt(question) for question, _ in some], return_tensors="pt", padding=True)
        ids, mask = asked["input_ids"].to(model.device), asked["attention_mask"].to(model.device)
        answers = model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=new_tokens,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )
        texts = tokenizer.batch_decode(answers[:, ids.shape[1] :], skip_special_tokens=True)
        right += sum(final_number(text) == final_number(a) for text, (_, a) in zip(texts, some, strict=True))
    return right / len(rows)


def final_number(text: str) -> float | None:
    """The number that an answer gives: the first after ``####``, or else the last one."""
    marked = text.partition("####")[2]
    numbers = _NUMBER.findall(marked or text)
    return float(numbers[0 if marked else -1].replace(",", "")) if numbers else None
