"""Questions with answers, as a causal language model trains on them and answers them."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weightsmith.core.errors import UsageError, require
from weightsmith.lab.hub import check_hub

_PURPOSE = "the language task"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")
_IGNORED = -100

Row = tuple[str, str]


def find_questions(name: str) -> str:
    """Find a data set of questions: a folder with ``train.jsonl`` and ``test.jsonl``, or a hub id.

    Args:
        name: The folder, its name in ``$WEIGHTSMITH_DATA``, or the id.

    Raises:
        UsageError: There is neither a folder nor a network.
        MissingExtra: ``datasets`` is not installed.
    """
    datasets = require("datasets", extra="hf", purpose=_PURPOSE)
    root = os.environ.get("WEIGHTSMITH_DATA")
    folders = [Path(root, part) for part in (name, name.split("/")[-1])] if root else []
    found = next((folder for folder in (*folders, Path(name)) if folder.is_dir()), None)
    if found is None:
        if "/" not in name:
            raise UsageError(f"data {name!r} is neither a folder nor a hub id owner/name")
        mend = "give a folder with train.jsonl and test.jsonl, each row with question and answer"
        check_hub("dataset", name, cached=lambda: datasets.load_dataset_builder(name), mend=mend)
    return str(found or name)


def load_questions(name: str, split: str, most: int | None, subset: str = "") -> list[Row]:
    """Read the first ``most`` rows of a split; ``subset`` is a hub data set's configuration."""
    datasets = require("datasets", extra="hf", purpose=_PURPOSE)
    source = find_questions(name)
    table = datasets.load_dataset(source, *([subset] if subset and not Path(source).is_dir() else []), split=split)
    if not {"question", "answer"} <= set(table.column_names):
        raise UsageError(f"data {name!r} needs columns question and answer, has {', '.join(table.column_names)}")
    table = table.select(range(min(most or len(table), len(table))))
    return [(str(row["question"]), str(row["answer"])) for row in table]


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
