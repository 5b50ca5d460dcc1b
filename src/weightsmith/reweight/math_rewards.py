"""Three rewards for written answers to mathematical questions: right, short, well-formed.

They are the objectives of the paper on dynamic reward weighting (arXiv 2509.11452), as functions of one text each.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from weightsmith.core.errors import UsageError

_ENUMERATOR = re.compile(
    r"(?:^|[\s(])(?:step\s*)?(?:\d+|[ivxlcdm]+|[a-z])[).:\-]|(?:^|\s)[-*\u2022](?=\s)", re.IGNORECASE | re.MULTILINE
)
_ORDINAL = re.compile(
    r"\b(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|next|then)\b", re.IGNORECASE
)
_FILLED_BOX = re.compile(r"\\boxed\{[^\s}]")
_BARE_FRACTION = re.compile(r"\\frac(?!\{)\s*([^\s{}\\])\s*(\{[^{}]*\}|[^\s{}\\])?")
_BARE_ROOT = re.compile(r"\\sqrt(?![{\[])\s*(\w)")
_SLASH = re.compile(r"^(-?\d+)/(-?\d+)$")


def boxed_answer(solution: str) -> str | None:
    r"""Find the content of the last ``\boxed{}`` (or ``\fbox{}``); ``None`` without one, or when it is not closed."""
    start = max(solution.rfind("\\boxed"), -1)
    start = start if start >= 0 else solution.rfind("\\fbox")
    if start < 0:
        return None
    spaced = re.match(r"\\boxed ([^$]*)", solution[start:])
    if spaced is not None:
        return spaced[1]
    opened = solution.find("{", start)
    if opened < 0:
        return None
    depth = 0
    for position in range(opened, len(solution)):
        depth += {"{": 1, "}": -1}.get(solution[position], 0)
        if depth == 0:
            return solution[opened + 1 : position]
    return None


def boxed_accuracy(solution: str, answer: str) -> float:
    r"""Give 1 when the last ``\boxed{}`` of the solution equals the answer up to LaTeX notation, else 0.

    Args:
        solution: What the policy wrote.
        answer: The right answer, in LaTeX.
    """
    found = boxed_answer(solution)
    return float(found is not None and _plain_latex(found) == _plain_latex(answer))


def clarity(solution: str) -> float:
    r"""Give 1 for a filled ``\boxed{}`` and at least two enumerators, or two ordinal words, else 0.

    Enumerators are numbers, single letters and roman numerals before one of ``) . : -``, and bullets. A known weakness
    of the rule: ``x = 3 - 2 - 1`` counts as two bullets.
    """
    if _FILLED_BOX.search(solution) is None:
        return 0.0
    return float(len(_ENUMERATOR.findall(solution)) >= 2 or len(_ORDINAL.findall(solution)) >= 2)


class Conciseness:
    """Give 1 to answers shorter than the mean length of all training rollouts so far, these included, else 0."""

    def __init__(self) -> None:
        self._total, self._count = 0.0, 0

    @property
    def mean(self) -> float:
        """Mean length so far, infinite before the first."""
        return self._total / self._count if self._count else float("inf")

    def __call__(
        self, lengths: Iterable[int], answers: Iterable[int] | None = None, *, count: bool = True
    ) -> list[float]:
        """Score a batch of rollouts.

        Args:
            lengths: Tokens of each rollout, end-of-sequence tokens included; they enter the mean.
            answers: Tokens of each decoded answer, which are compared with it; ``None``: ``lengths``.
            count: Whether these are training rollouts, which the mean is of.

        Raises:
            UsageError: The two have different lengths.
        """
        lengths = list(lengths)
        compared = lengths if answers is None else list(answers)
        if len(compared) != len(lengths):
            raise UsageError(f"answers must hold one number per rollout, {len(lengths)}, got {len(compared)}")
        if count:
            self._total, self._count = self._total + sum(lengths), self._count + len(lengths)
        return [float(length < self.mean) for length in compared]

    def state_dict(self) -> dict[str, Any]:
        """The sum of all lengths and their number."""
        return {"total": self._total, "count": self._count}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take them back."""
        self._total, self._count = float(state["total"]), int(state["count"])


def _plain_latex(text: str) -> str:
    """One spelling for the usual ways to write an answer, after the rules of the MATH data set."""
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace("\\left", "").replace("\\right", "")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "")
    if text.count("\\text{ ") == 1:  # units on the right
        text = text.split("\\text{ ")[0]
    text = text.replace("\\%", "").replace("%", "")
    text = text.replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    left, equals, right = text.partition("=")
    if equals and len(left.strip()) <= 2 and "=" not in right:
        text = right
    text = _BARE_ROOT.sub(r"\\sqrt{\1}", text).replace(" ", "")
    text = _BARE_FRACTION.sub(_braced, text)
    if text == "0.5":
        text = "\\frac{1}{2}"
    return _SLASH.sub(lambda found: f"\\frac{{{found[1]}}}{{{found[2]}}}", text)


def _braced(found: re.Match[str]) -> str:
    above, below = found[1], found[2]
    if below is None:
        return found[0]
    return f"\\frac{{{above}}}{below if below.startswith('{') else f'{{{below}}}'}"
