r"""Four tasks on real text that arrive one after another, the first skill again under other words as the third.

Made of GSM8K's word problems, each in one task only: which operation the solution begins with, the largest number in
the text, the operation again, and how many calculations the solution has. Writes a folder with train.jsonl and
test.jsonl per task, for example for a small language model with LoRA:

python examples/word_problems.py problems
weightsmith run lcia --preset long --length 72 --new-tokens 4 \
    --sets problems/operation problems/largest problems/operation-reworded problems/calculations \
    --prompts "Name the first operation" "Give the largest number" "With which operation do you begin" \
    "Count the calculations"
"""

import argparse
import json
import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from weightsmith.lab.data.text_sets import load_questions

OPERATIONS = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
_CALCULATION = re.compile(r"<<[^<>=]*?\d\s*([-+*/])")
_NUMBER = re.compile(r"\d[\d,]*")


def _operation(_: str, solution: str) -> str:
    return OPERATIONS[_CALCULATION.findall(solution)[0]]


def _largest(question: str, _: str) -> str:
    return str(max(int(number.replace(",", "")) for number in _NUMBER.findall(question)))


def _calculations(_: str, solution: str) -> str:
    return str(len(_CALCULATION.findall(solution)))


TASKS: dict[str, tuple[str, Callable[[str, str], str]]] = {
    "operation": ("Name the first operation", _operation),
    "largest": ("Give the largest number", _largest),
    "operation-reworded": ("With which operation do you begin", _operation),
    "calculations": ("Count the calculations", _calculations),
}


def rows_of(data: str, split: str, words: int) -> dict[str, list[dict[str, str]]]:
    """The rows of each task; problems longer than ``words``, or that name no calculation or number, are left out."""
    problems = [
        (question, solution)
        for question, solution in load_questions(data, split)
        if len(question.split()) <= words and _CALCULATION.search(solution) and _NUMBER.search(question)
    ]
    return {
        name: [
            {"question": f"{instruction}: {question}", "answer": answer(question, solution)}
            for question, solution in problems[at :: len(TASKS)]
        ]
        for at, (name, (instruction, answer)) in enumerate(TASKS.items())
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the tasks."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", default="gsm8k", help="questions and answers that mark their calculations")
    parser.add_argument("--words", type=int, default=36, help="longer problems are left out")
    options = parser.parse_args(arguments)
    for split in ("train", "test"):
        for name, rows in rows_of(options.data, split, options.words).items():
            (options.folder / name).mkdir(parents=True, exist_ok=True)
            lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            (options.folder / name / f"{split}.jsonl").write_text(lines, encoding="utf-8")
            sys.stdout.write(f"{name}, {split}: {len(rows)} rows\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
