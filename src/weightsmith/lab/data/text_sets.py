"""Texts by name: sentences with labels, running text, questions with answers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError
from weightsmith.lab.data.labels import check_counts, classes_of, subset
from weightsmith.lab.data.sources import column, load_tables

TEXT_COLUMNS = ("text", "sentence", "content", "review", "document", "title", "sentence1", "premise")
LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "y", "sentiment")
QUESTION_COLUMNS = ("question", "query", "prompt", "instruction", "input")
ANSWER_COLUMNS = ("answer", "response", "completion", "output", "solution")
SUMS = "arithmetic"
_NUMBER = re.compile(r"-?\d[\d,]*(?:\.\d+)?")

Row = tuple[str, str]


@dataclass(frozen=True, slots=True)
class Sentences:
    """Texts and their classes, by split.

    Attributes:
        train: Texts to train on, validation included.
        test: Texts to test on.
        train_labels: ``(N,)``, int64.
        test_labels: ``(M,)``, int64.
        classes: Names.
    """

    train: Sequence[str]
    test: Sequence[str]
    train_labels: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]


def load_sentences(
    name: str,
    *,
    columns: tuple[str, ...] = (),
    subset_name: str = "",
    train_examples: int | None = None,
    test_examples: int | None = None,
) -> Sentences:
    """Load texts with a label each; rows are left out by a seed, in the same share of every class.

    Raises:
        UsageError: There are no such data or columns, a class is unknown, or there is one class only.
    """
    check_counts(train_examples=train_examples, test_examples=test_examples)
    if columns and len(columns) != 2:
        raise UsageError(f"columns must name the texts and the labels, got {columns}")
    tables = load_tables(name, subset=subset_name)
    text, label = columns or (None, None)
    text = column(name, tables["train"], text, TEXT_COLUMNS, "texts")
    label = column(name, tables["train"], label, LABEL_COLUMNS, "labels")
    train, test = _train_and_test(tables)
    first, second, classes = classes_of(name, train[:][label], test[:][label])
    rows = subset(len(train), train_examples, first), subset(len(test), test_examples, second)
    texts = [
        [_text(name, value) for value in table.select(r.tolist())[:][text]]
        for table, r in zip((train, test), rows, strict=True)
    ]
    return Sentences(texts[0], texts[1], first[rows[0]], second[rows[1]], classes)


def load_text(name: str, *, columns: tuple[str, ...] = (), subset_name: str = "") -> tuple[str, str]:
    """Load running text: what to train on and what to test on, rows joined by empty lines.

    A data set without a test split gives up the last tenth of its text.

    Raises:
        UsageError: There are no such data, or no text in them.
    """
    tables = load_tables(name, subset=subset_name)
    split = next((split for split in ("test", "validation") if split in tables), None)
    train = _joined(name, tables["train"], columns)
    if split is not None:
        return train, _joined(name, tables[split], columns)
    cut = len(train) * 9 // 10
    return train[:cut], train[cut:]


def load_questions(
    name: str, split: str, count: int | None = None, *, columns: tuple[str, ...] = (), subset_name: str = ""
) -> list[Row]:
    """Load questions and answers.

    Args:
        name: ``"arithmetic"``, which is made here, or see :func:`weightsmith.lab.data.sources.locate`.
        split: ``"train"`` or ``"test"``; data without a test split give up a fifth of their rows.
        count: At most this many rows, chosen by a seed; ``None``: all, of arithmetic 2000 and 200.
        columns: Names of the two columns; empty: usual names.
        subset_name: Configuration of a hub data set.

    Raises:
        UsageError: There are no such data or columns.
    """
    check_counts(count=count)
    if name == SUMS:
        return _sums(split, count)
    tables = load_tables(name, subset=subset_name)
    train, test = _train_and_test(tables)
    table = train if split == "train" else test
    if columns and len(columns) != 2:
        raise UsageError(f"columns must name the questions and the answers, got {columns}")
    asked, answered = columns or (None, None)
    question = column(name, table, asked, QUESTION_COLUMNS, "questions")
    answer = column(name, table, answered, ANSWER_COLUMNS, "answers")
    table = table.select(subset(len(table), count).tolist())
    return [(_text(name, row[question]), _text(name, row[answer])) for row in table]


def prompt(question: str) -> str:
    """What stands before an answer."""
    return f"Question: {question}\nAnswer:"


def final_number(text: str) -> float | None:
    """The number that an answer gives: the first after ``####``, or else the last one."""
    marked = text.partition("####")[2]
    numbers = _NUMBER.findall(marked or text)
    return float(numbers[0 if marked else -1].replace(",", "")) if numbers else None


def _train_and_test(tables: dict[str, Any]) -> tuple[Any, Any]:
    split = next((split for split in ("test", "validation") if split in tables), None)
    if split is not None:
        return tables["train"], tables[split]
    parts = tables["train"].train_test_split(test_size=0.2, seed=0)
    return parts["train"], parts["test"]


def _joined(name: str, table: Any, columns: tuple[str, ...]) -> str:
    strings = [
        key for key, feature in table.features.items() if getattr(feature, "dtype", "") in ("string", "large_string")
    ]
    if columns:
        chosen = [column(name, table, asked, (), "") for asked in columns]
    else:
        chosen = [key for key in strings if key.lower() in TEXT_COLUMNS][:1] or strings
    if not chosen:
        raise UsageError(f"data {name!r} has no column of text, only {', '.join(table.column_names)}")
    texts = ("\n".join(str(row[key]) for key in chosen if row[key]) for row in table)
    joined = "\n\n".join(text for text in texts if text.strip())
    if not joined:
        raise UsageError(f"data {name!r} holds no text")
    return joined


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise UsageError(f"data {name!r}: a text is {value!r}, not a string")
    return value


def _sums(split: str, count: int | None) -> list[Row]:
    # all sums in one fixed order: the test takes the last ones
    order = torch.randperm(98**2 * 8, generator=torch.Generator().manual_seed(0))
    chosen = order[: count or 2000] if split == "train" else order[-(count or 200) :]
    rows = []
    for index in chosen.tolist():
        a, b, c = index // (98 * 8) + 2, index // 8 % 98 + 2, index % 8 + 2
        rows.append(
            (f"What is ({a} + {b}) * {c}?", f"{a} + {b} = {a + b}. {a + b} * {c} = {(a + b) * c}.\n#### {(a + b) * c}")
        )
    return rows
