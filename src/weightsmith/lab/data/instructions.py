"""Small instruction sets that are made here: the same skill under several wordings, and other skills."""

from collections.abc import Callable
from dataclasses import dataclass

import torch

Row = tuple[str, str]
_NUMBERS = 98


@dataclass(frozen=True, slots=True)
class InstructionSet:
    """One set.

    Attributes:
        wordings: The instruction, said in several ways.
        answer: What comes out of an input.
        numbers: Inputs are two numbers, else a word.
    """

    wordings: tuple[str, ...]
    answer: Callable[[str], str]
    numbers: bool = False


def _sum(text: str) -> str:
    return str(sum(int(part) for part in text.split(" and ")))


SETS = {
    "sums": InstructionSet(("Add the two numbers", "Compute the sum of both numbers"), _sum, numbers=True),
    "reversed": InstructionSet(("Reverse the letters of the word",), lambda word: word[::-1]),
    "sums-reworded": InstructionSet(("Add the two given numbers together",), _sum, numbers=True),
    "capitals": InstructionSet(("Write in capitals",), str.upper),
    "reversed-reworded": InstructionSet(("Reverse the order of the letters in this word",), lambda word: word[::-1]),
    "endings": InstructionSet(("Which character comes last?",), lambda word: word[-1]),
}
"""By name; a sequence of tasks goes through them in this order."""


def make_rows(name: str, split: str, count: int | None = None) -> list[Row]:
    """Questions, which begin with the instruction, and answers.

    Args:
        name: One of ``SETS``. Sets with the same skill have different inputs.
        split: ``"train"`` or ``"test"``; no input is in both.
        count: At most this many rows; ``None``: 400 and 100, or as many as there are words.
    """
    made = SETS[name]
    inputs = _pairs() if made.numbers else _words()
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(0)).tolist()
    cut = len(order) // 5
    part = order[:cut] if split == "test" else order[cut:]
    skill = name.partition("-")[0]
    skilled = [key for key in SETS if key.partition("-")[0] == skill]
    shared = part[skilled.index(name) :: len(skilled)][: count or (100 if split == "test" else 400)]
    return [
        (f"{made.wordings[at % len(made.wordings)]}: {inputs[index]}", made.answer(inputs[index]))
        for at, index in enumerate(shared)
    ]


def _pairs() -> list[str]:
    return [f"{a} and {b}" for a in range(2, _NUMBERS) for b in range(2, _NUMBERS)]


def _words() -> list[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # common words that are installed anyway

    return sorted(word for word in ENGLISH_STOP_WORDS if len(word) > 2)
