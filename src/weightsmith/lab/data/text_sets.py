"""Texts by name: sentences with labels, running text, questions with answers."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError
from weightsmith.lab.data.instructions import SETS, make_rows
from weightsmith.lab.data.labels import check_counts, hold_out, own_validation, parts_of, subset, unused_validation
from weightsmith.lab.data.sources import column, load_tables, read_labels

TEXT_COLUMNS = ("text", "sentence", "content", "review", "document", "title")
PAIRS = (("sentence1", "sentence2"), ("premise", "hypothesis"), ("question1", "question2"), ("text1", "text2"))
LABEL_COLUMNS = ("label", "labels", "class", "target", "category", "y", "sentiment")
QUESTION_COLUMNS = ("question", "query", "prompt", "instruction", "input")
ANSWER_COLUMNS = ("answer", "response", "completion", "output", "solution")
SUMS = "arithmetic"
_SPLITS = ("train", "validation", "test")
_ALL_SUMS = 98**2 * 8
_TEST_SUMS = _ALL_SUMS // 10
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
        validation: Texts of the data's own validation split beside ``train`` and ``test``; ``None``: there is none.
        validation_labels: ``(V,)``, int64.
        unused: Why a validation split is not used, in words.
    """

    train: Sequence[str]
    test: Sequence[str]
    train_labels: Tensor
    test_labels: Tensor
    classes: tuple[str, ...]
    validation: Sequence[str] | None
    validation_labels: Tensor
    unused: str


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
    tables = load_tables(name, subset=subset_name)
    texts, label = _text_and_label(name, tables["train"], columns)
    labels, class_names = read_labels(name, tables, label)
    *parts, classes = parts_of(name, labels, class_names, train_examples=train_examples, test_examples=test_examples)
    train, test = (_rows(name, tables[part.split].select(part.rows.tolist()), texts) for part in parts)
    own = own_validation(name, labels, class_names, examples=test_examples)
    validation = _rows(name, tables[own.split].select(own.rows.tolist()), texts) if own else None
    own_labels = own.labels if own else torch.empty(0, dtype=torch.int64)
    unused = unused_validation(labels)
    return Sentences(train, test, parts[0].labels, parts[1].labels, classes, validation, own_labels, unused)


def load_text(name: str, *, columns: tuple[str, ...] = (), subset_name: str = "") -> dict[str, str]:
    """Load running text by split, rows joined by empty lines.

    A data set without a test split uses its validation split as such, or gives up the last tenth of its text.

    Returns:
        ``train`` and ``test``; and ``validation``, where the data have all three.

    Raises:
        UsageError: There are no such data, or no text in them.
    """
    tables = load_tables(name, subset=subset_name)
    texts = {split: "\n\n".join(_texts(name, tables[split], columns)) for split in _SPLITS if split in tables}
    if "test" not in texts and "validation" in texts:
        texts["test"] = texts.pop("validation")
    if "test" not in texts:
        cut = len(texts["train"]) * 9 // 10
        texts = {"train": texts["train"][:cut], "test": texts["train"][cut:]}
    return texts


def load_questions(
    name: str, split: str, count: int | None = None, *, columns: tuple[str, ...] = (), subset_name: str = ""
) -> list[Row]:
    """Load questions and answers.

    Args:
        name: ``"arithmetic"`` or a set of `weightsmith.lab.data.instructions`, which are made here, or see
            `weightsmith.lab.data.sources.locate`.
        split: ``"train"`` or ``"test"``; data without a test split give up a fifth of their rows. ``"validation"`` is
            empty where the data do not have all three.
        count: At most this many rows, chosen by a seed; ``None``: all, of arithmetic 2000 and 200.
        columns: Names of the two columns; empty: usual names.
        subset_name: Configuration of a hub data set.

    Raises:
        UsageError: There are no such data or columns.
    """
    check_counts(count=count)
    if split == "validation" and (name == SUMS or name in SETS):
        return []
    if name == SUMS:
        return _sums(split, count)
    if name in SETS:
        return make_rows(name, split, count)
    table = _train_or_test(load_tables(name, subset=subset_name), split)
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


def same_answer(given: str, wanted: str) -> bool:
    """Whether two answers end in the same number or, where none is wanted, say the same."""
    number = final_number(wanted)
    if number is not None:
        return final_number(given) == number
    return given.strip().casefold() == wanted.strip().casefold()


def _train_or_test(tables: dict[str, Any], split: str) -> Any:
    train = tables["train"]
    if split == "validation":
        return tables["validation"] if {"validation", "test"} <= tables.keys() else train.select([])
    tested = next((tables[name] for name in ("test", "validation") if name in tables), None)
    if tested is not None:
        return train if split == "train" else tested
    kept, held = hold_out(len(train), 0.2, seed=2)
    return train.select((kept if split == "train" else held).tolist())


def _text_and_label(name: str, table: Any, columns: tuple[str, ...]) -> tuple[list[str], str]:
    """The columns whose texts are joined, and the column of labels."""
    if len(columns) == 1:
        raise UsageError(f"columns must name the texts and, last, the labels, got {columns}")
    if columns:
        *texts, label = (column(name, table, asked, (), "") for asked in columns)
        return texts, label
    pair = next((list(pair) for pair in PAIRS if set(pair) <= set(table.column_names)), None)
    return (
        pair or [column(name, table, None, TEXT_COLUMNS, "texts")],
        column(name, table, None, LABEL_COLUMNS, "labels"),
    )


def _texts(name: str, table: Any, columns: tuple[str, ...]) -> list[str]:
    """What is written in each row that is not empty."""
    if columns:
        chosen = [column(name, table, asked, (), "") for asked in columns]
    else:
        strings = [key for key, feature in table.features.items() if "string" in str(getattr(feature, "dtype", ""))]
        chosen = [key for key in strings if key.lower() in TEXT_COLUMNS][:1] or strings
    if not chosen:
        raise UsageError(f"data {name!r} has no column of text, only {', '.join(table.column_names)}")
    rows = table.select_columns(chosen)
    texts = ["\n".join(str(row[key]) for key in chosen if row[key]) for row in rows]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UsageError(f"data {name!r} holds no text")
    return texts


def _rows(name: str, table: Any, columns: Sequence[str]) -> list[str]:
    """The texts of every row, empty ones too."""
    return ["\n".join(_text(name, row[key]) for key in columns) for row in table.select_columns(list(columns))]


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str | int | float):
        raise UsageError(f"data {name!r}: a text is {value!r}, not a string")
    return str(value)


def _sums(split: str, count: int | None) -> list[Row]:
    # all sums in one fixed order: the last tenth is for the test
    order = torch.randperm(_ALL_SUMS, generator=torch.Generator().manual_seed(0))
    train, test = order[:-_TEST_SUMS], order[-_TEST_SUMS:]
    chosen = train[: count or 2000] if split == "train" else test[-(count or 200) :]
    rows = []
    for index in chosen.tolist():
        a, b, c = index // (98 * 8) + 2, index // 8 % 98 + 2, index % 8 + 2
        rows.append(
            (f"What is ({a} + {b}) * {c}?", f"{a} + {b} = {a + b}. {a + b} * {c} = {(a + b) * c}.\n#### {(a + b) * c}")
        )
    return rows
