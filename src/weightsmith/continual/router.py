"""Which group of parameters a task belongs to, from its instructions.

Tasks with similar instructions share parameters; a task unlike all before it gets new ones:

    similarity(task, group) = mean over i in task, j in group of cos(v_i, v_j)
    s, k = maximum over groups;  s >= threshold: group k;  else, in training, a new group

Source: Qiao et al., ICML 2025, arXiv 2410.10868, section 4.4 and appendices H and I, and the authors' ``LoRASelect``,
which takes the group's mean where the text speaks of a maximum.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from weightsmith.continual.encoder import SentenceEncoder
from weightsmith.continual.similarity import EncodedSimilarity, Encoder, tfidf_similarity
from weightsmith.core.errors import UsageError, brief, unknown
from weightsmith.core.files import write_atomically
from weightsmith.core.json_files import read_json

_ONE_EACH, _SETS, _ENCODED = 0.90, 0.30, 0.75
_SHAPE = {"groups": [[str]]}


@dataclass(frozen=True, slots=True)
class Assignment:
    """Where a task belongs.

    Attributes:
        group: Number of the group, from 1; of a new one, the next number.
        is_new: The group does not exist yet.
        similarity: Of the nearest group; ``None`` where there is no group yet.
        all_similarities: Of every group, in order.
    """

    group: int
    is_new: bool
    similarity: float | None
    all_similarities: tuple[float, ...]


class InstructionRouter:
    """Assign tasks to groups by their instructions.

    An instruction is the prompt without the question or input. `assign` decides and changes nothing; `commit` adds a
    task's instructions to its group once it has been trained.

    Args:
        backend: ``"tfidf"`` compares words, English ones by default; a folder or hub id of a sentence encoder, or a
            function ``(list of n texts) -> (n, d)``, compares meaning, in the encoder's languages.
        threshold: Similarity in [0, 1] from which a task joins a group. ``None``: 0.75 for an encoder; for words the
            authors' values, 0.90 while the task and all groups have one instruction each, else 0.30.
        reduce: Similarity to a group is the mean of all pairs, as in the authors' code, or their maximum.
        fallback: Which group answers at test time when none is near enough: the latest one, as in the authors' code,
            the nearest one, or an error.
        stop_words: For words: ``"english"`` leaves English function words out, ``None`` none.

    Attributes:
        groups: The instructions of every group; group ``k`` is ``groups[k - 1]``.

    Raises:
        UsageError: An argument is not known or out of range.

    Example:
        >>> router = InstructionRouter()
        >>> router.commit(router.assign(["Add the numbers"]), ["Add the numbers"])
        >>> router.assign(["Reverse the letters of the word"]).is_new
        True
    """

    def __init__(
        self,
        backend: Literal["tfidf"] | Path | str | Encoder = "tfidf",
        threshold: float | None = None,
        *,
        reduce: Literal["mean", "max"] = "mean",
        fallback: Literal["latest", "nearest", "error"] = "latest",
        stop_words: Literal["english"] | None = "english",
    ) -> None:
        if threshold is not None:
            check_threshold(threshold)
        if reduce not in ("mean", "max"):
            raise unknown("reduce", str(reduce), ("mean", "max"))
        if fallback not in ("latest", "nearest", "error"):
            raise unknown("fallback", str(fallback), ("latest", "nearest", "error"))
        if stop_words not in ("english", None):
            raise UsageError(f"stop_words must be 'english' or None, got {stop_words!r}")
        if not callable(backend) and not isinstance(backend, str | Path):
            raise TypeError(f"backend must be a name, a folder or a function, got {type(backend).__name__}")
        self.threshold, self.reduce, self.fallback = threshold, reduce, fallback
        self.groups: list[list[str]] = []
        self._encoded: EncodedSimilarity | None = None
        self._similarity = partial(tfidf_similarity, stop_words=stop_words is not None)
        if backend != "tfidf":
            encoder = backend if callable(backend) else SentenceEncoder(backend)
            self._encoded = EncodedSimilarity(encoder)

    def similarities(self, instructions: Sequence[str]) -> tuple[float, ...]:
        """How near a task is to every group, in order."""
        task = distinct(instructions)
        measure: Any = self._similarity
        if self._encoded is not None:
            self._encoded.prepare([*task, *(text for group in self.groups for text in group)])
            measure = self._encoded
        found = []
        for group in self.groups:
            pairs = [measure(one, other) for one in task for other in group]
            found.append(max(pairs) if self.reduce == "max" else math.fsum(pairs) / len(pairs))
        return tuple(found)

    def assign(self, instructions: Sequence[str], train: bool = True) -> Assignment:
        """Decide where a task belongs; for a single prompt give a list of one.

        Args:
            instructions: The task's instructions; repeated ones count once.
            train: A task that is unlike all groups gets a new one; at test time ``fallback`` decides.

        Raises:
            UsageError: There is no instruction; or at test time no group, or none near enough (``fallback="error"``).
        """
        instructions = distinct(instructions)  # a generator can be read only once
        found = self.similarities(instructions)
        if not found:
            if not train:
                raise UsageError("the router has no groups: train and commit a task first")
            return Assignment(1, True, None, ())
        nearest = max(range(len(found)), key=found.__getitem__)
        best = found[nearest]
        threshold = self._threshold(instructions)
        if best >= threshold:
            return Assignment(nearest + 1, False, best, found)
        if train:
            return Assignment(len(found) + 1, True, best, found)
        if self.fallback == "error":
            raise UsageError(
                f"no group is near enough: the nearest, {nearest + 1}, has similarity {best:.2f}, below threshold "
                f"{threshold:g}"
            )
        return Assignment(nearest + 1 if self.fallback == "nearest" else len(found), False, best, found)

    def _threshold(self, instructions: Sequence[str]) -> float:
        if self.threshold is not None:
            return self.threshold
        if self._encoded is not None:
            return _ENCODED
        single = len(distinct(instructions)) == 1 and all(len(group) == 1 for group in self.groups)
        return _ONE_EACH if single else _SETS

    def commit(self, assignment: Assignment | int, instructions: Sequence[str]) -> None:
        """Add a trained task's instructions to a group; the next number makes a new group.

        Raises:
            UsageError: There is no such group, or no instruction.
        """
        group = assignment.group if isinstance(assignment, Assignment) else assignment
        new = distinct(instructions)
        if isinstance(group, bool) or not isinstance(group, int) or not 1 <= group <= len(self.groups) + 1:
            raise UsageError(f"group must be between 1 and {len(self.groups) + 1}, which is a new one, got {group!r}")
        if group > len(self.groups):
            self.groups.append([])
        held = self.groups[group - 1]
        held += [text for text in new if text not in held]

    def state_dict(self) -> dict[str, Any]:
        """The groups, as plain data; the backend and the settings are those of the constructor."""
        return {"groups": [list(group) for group in self.groups]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` gave."""
        self.groups = [distinct(group) for group in state["groups"]]

    def save(self, path: Path | str) -> None:
        """Write the groups as JSON."""
        write_atomically(Path(path), json.dumps(self.state_dict(), indent=2, ensure_ascii=False) + "\n")

    def load(self, path: Path | str) -> None:
        """Read what `save` wrote.

        Raises:
            UsageError: The file is missing or damaged; the groups are as before.
        """
        self.load_state_dict(read_json(path, _SHAPE))


def distinct(instructions: Sequence[str]) -> list[str]:
    """The instructions without repetition, in order.

    Raises:
        UsageError: There is none, or one holds half of a character (a lone surrogate).
        TypeError: It is one text, or not of texts.
    """
    if isinstance(instructions, str):
        raise TypeError(f"instructions must be a list of texts, got one text: give [{instructions[:40]!r}]")
    found = list(dict.fromkeys(instructions))
    if not found:
        raise UsageError("instructions must hold at least one text, got none")
    if wrong := [text for text in found if not isinstance(text, str)]:
        raise TypeError(f"instructions must hold texts, got {type(wrong[0]).__name__}")
    if broken := [text for text in found if not text.isascii() and any("\ud800" <= c <= "\udfff" for c in text)]:
        raise UsageError(f"instructions must be whole characters, which files can hold, got {brief(broken[0])}")
    return found


def check_threshold(threshold: float) -> None:
    """Refuse a threshold that is no similarity.

    Raises:
        UsageError: It is not between 0 and 1.
    """
    if isinstance(threshold, bool) or not isinstance(threshold, int | float) or not 0 <= threshold <= 1:
        raise UsageError(f"threshold must be between 0 and 1, got {threshold!r}")
