"""Three rewards for written answers to mathematical questions: right, short, well-formed.

They are the objectives of the paper on dynamic reward weighting (arXiv 2509.11452), as functions of one text each.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from weightsmith.core.errors import UsageError

_ENUMERATOR = re.compile(
    r"(?:^|[\s(])(?:step\s*)?(?:\d+|[ivxlcdm]+|[a-z])[).:\-]|(?:^|\s)[-*\u2022]\s+", re.IGNORECASE | re.MULTILINE
)
_ORDINAL = re.compile(
    r"\b(?:first|second|third|fourth|fifth|sixth|seventh|eighth|ninth|tenth|next|then)\b", re.IGNORECASE
)
_FILLED_BOX = re.compile(r"\\boxed\{\s*[^}\s][^}]*\}")
_BARE_ROOT = re.compile(r"\\sqrt([^{])")
_EMPTY_ROOT = re.compile(r"\\sqrt(?:$|\\sqrt)")
_SLASH = re.compile(r"^(0|-?[1-9][0-9]*)/(0|-?[1-9][0-9]*)$")


def boxed_answer(solution: str) -> str | None:
    r"""Find the content of the last ``\boxed{}``, or of the last ``\fbox{}`` where there is no ``\boxed``.

    A last box without braces, ``\boxed 5``, holds what follows up to a dollar sign. A box that is not closed, or whose
    brace does not follow at once, gives ``None``.
    """
    command = next((name for name in ("\\boxed", "\\fbox") if name in solution), None)
    if command is None:
        return None
    rest = solution[solution.rindex(command) + len(command) :]
    if command == "\\boxed" and rest.startswith(" "):
        return rest[1:].partition("$")[0]
    if not rest.startswith("{"):
        return None
    depth = 0
    for position, letter in enumerate(rest):
        depth += {"{": 1, "}": -1}.get(letter, 0)
        if depth == 0:
            return rest[1:position]
    return None


def boxed_accuracy(solution: str, answer: str) -> float:
    r"""Give 1 when the last ``\boxed{}`` of the solution equals the answer up to LaTeX notation, else 0.

    Notation is that of the MATH data set's own comparison of strings, limits included. It removes ``\%`` but not ``%``.
    It removes what stands before ``=`` when that is at most two characters long, blanks counted. It reads
    ``\sqrt3`` as ``\sqrt{3}`` but not ``\sqrt 3``. What it cannot parse must be equal character by character.

    Which box counts is said at ``boxed_answer`` and differs from the published code in two cases: there a
    ``\boxed 5`` goes before every ``\boxed{}``, and ``\fbox{}`` never scores.

    Args:
        solution: What the policy wrote.
        answer: The right answer, in LaTeX.
    """
    found = boxed_answer(solution)
    if found is None:
        return 0.0
    plain = _plain_latex(found), _plain_latex(answer)
    return float(found == answer if None in plain else plain[0] == plain[1])


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


def _plain_latex(text: str) -> str | None:
    """One spelling for the usual ways to write an answer, after the rules of the MATH data set; ``None``: no rule."""
    text = text.replace("\n", "").replace("\\!", "").replace("\\\\", "\\")
    text = text.replace("tfrac", "frac").replace("dfrac", "frac").replace("\\left", "").replace("\\right", "")
    text = text.replace("^{\\circ}", "").replace("^\\circ", "").replace("\\$", "")
    text, *units = text.split("\\text{ ")  # units on the right
    if len(units) > 1:
        return None
    text = text.replace("\\%", "").replace(" .", " 0.").replace("{.", "{0.")
    text = "0" + text if text.startswith(".") else text
    left, equals, right = text.partition("=")
    if equals and len(left) <= 2 and "=" not in right:
        text = right
    if _EMPTY_ROOT.search(text) is not None:
        return None
    fractions = _braced(_BARE_ROOT.sub(r"\\sqrt{\1}", text).replace(" ", ""))
    if fractions == "0.5":
        return "\\frac{1}{2}"
    return None if fractions is None else _SLASH.sub(r"\\frac{\1}{\2}", fractions)


def _braced(text: str) -> str | None:
    r"""Put braces around two characters after ``\frac``; where there is one only, leave the whole text as it is."""
    found, *parts = text.split("\\frac")
    for part in parts:
        if not part:
            return None
        if part[0] == "{":
            found += f"\\frac{part}"
        elif len(part) == 1:
            return text
        else:
            found += f"\\frac{{{part[0]}}}" + (part[1:] if part[1] == "{" else f"{{{part[1]}}}{part[2:]}")
    return found
