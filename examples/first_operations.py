"""A text task with four classes: which operation does the solution of a word problem begin with?

GSM8K's answers mark every calculation, such as ``<<48/2=24>>``; the question alone is the text. Writes train.csv and
test.csv, for example for labels that are then made wrong:

python examples/first_operations.py operations
weightsmith run meta-rescaling --task sentences --data operations --train-examples 4000
"""

import argparse
import csv
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from weightsmith.lab.data.text_sets import load_questions

NAMES = {"+": "add", "-": "subtract", "*": "multiply", "/": "divide"}
_FIRST = re.compile(r"<<[^<>=]*?\d\s*([-+*/])")


def rows_of(data: str, split: str) -> list[tuple[str, str]]:
    """Questions and the names of the first operations of their solutions; rows without one are left out."""
    found = [(question, _FIRST.search(answer)) for question, answer in load_questions(data, split)]
    return [(question, NAMES[match[1]]) for question, match in found if match]


def main(arguments: Sequence[str] | None = None) -> int:
    """Write both splits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--data", default="gsm8k", help="questions and answers that mark their calculations")
    options = parser.parse_args(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    for split in ("train", "test"):
        rows = rows_of(options.data, split)
        with (options.folder / f"{split}.csv").open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("text", "label"), *rows])
        sys.stdout.write(f"{split}: {len(rows)} rows\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
