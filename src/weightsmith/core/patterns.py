r"""Regular expressions out of other people's files, matched in steps that grow with the name and not exponentially.

Python's ``re`` tries all ways to split ``aaaa...`` for ``(a+)+b``: a configuration could stop a program for years. Here
all positions that a part can end at are followed at once. Known are literals, ``.``, classes, ``\d \w \s \b`` and their
opposites, ``^ $``, groups, ``|`` and ``* + ? {m,n}``, lazy or not.
"""

import re
from collections.abc import Callable
from functools import lru_cache, partial

from weightsmith.core.errors import UsageError, brief, reason

_Ends = partial[frozenset[int]]
"""A function of a name, the places where a part of the pattern can begin and a budget: where it can end."""

_MOST_STEPS = 2_000_000
_LONGEST = 200_000
_COUNT = re.compile(r"\{(\d{0,4})(,?)(\d{0,4})\}")
_CLASS = re.compile(r"\[\^?\]?(?:\\.|[^\]\\])*\]", re.DOTALL)
_ASSERTIONS = {"\\b", "\\B", "\\A", "\\Z", "^", "$"}
_KNOWN_LETTERS = frozenset("dDwWsSbBAZnrtfva")


@lru_cache(maxsize=4096)
def compile_pattern(pattern: str, where: str) -> Callable[[str], bool]:
    """Make a function that tells whether the whole of a name matches a pattern.

    Args:
        pattern: A regular expression out of a file.
        where: The file and the key, for errors.

    Raises:
        UsageError: It is no regular expression, or uses what is not known here, such as ``(?=``; the function raises
            one when a match would take too many steps.
    """
    parser = _Parser(pattern, where)
    ends = parser.alternatives()
    if parser.at < len(pattern):
        raise parser.fault("has a ) too many")
    return partial(_matches, ends, pattern, where)


def _matches(ends: _Ends, pattern: str, where: str, name: str) -> bool:
    return len(name) in ends(name, frozenset([0]), _Budget(pattern, where))


class _Budget:
    def __init__(self, pattern: str, where: str) -> None:
        self._left, self._pattern, self._where = _MOST_STEPS, pattern, where

    def spend(self, steps: int) -> None:
        self._left -= steps + 1
        if self._left < 0:
            raise UsageError(
                f"{self._where}: the pattern {brief(self._pattern)} takes too many steps; write it simpler"
            )


class _Parser:
    def __init__(self, pattern: str, where: str) -> None:
        self._pattern, self._where, self.at, self._depth = pattern, where, 0, 0
        if len(pattern) > _LONGEST:
            raise self.fault(f"is longer than {_LONGEST} characters")

    def fault(self, what: str) -> UsageError:
        return UsageError(f"{self._where}: the pattern {brief(self._pattern)} {what}")

    def alternatives(self) -> _Ends:
        branches = [self._sequence()]
        while self._next("|"):
            branches.append(self._sequence())
        return branches[0] if len(branches) == 1 else partial(_any_of, branches)

    def _next(self, mark: str) -> bool:
        found = self._pattern.startswith(mark, self.at)
        self.at += len(mark) if found else 0
        return found

    def _sequence(self) -> _Ends:
        parts: list[partial[frozenset[int]]] = []
        while self.at < len(self._pattern) and self._pattern[self.at] not in "|)":
            part = self._repeated(self._part())
            if part.func is _literal and parts and parts[-1].func is _literal:
                part = partial(_literal, parts.pop().args[0] + part.args[0])
            parts.append(part)
        return partial(_one_after_the_other, parts)

    def _part(self) -> _Ends:
        if self._next("("):
            return self._group()
        begin = self.at
        if self._pattern[begin] in "*+?":
            raise self.fault(f"repeats nothing at {begin}")
        if self._pattern[begin] == "[":
            found = _CLASS.match(self._pattern, begin)
            self.at = found.end() if found else len(self._pattern)
        else:
            self.at += 2 if self._pattern[begin] == "\\" else 1
        atom = self._pattern[begin : self.at]
        if len(atom) == 1 and atom not in ".^$[\\":
            return partial(_literal, atom)
        if len(atom) == 2 and atom[0] == "\\" and not atom[1].isalnum():
            return partial(_literal, atom[1])
        if len(atom) > 1 and atom[0] == "\\" and atom[1].isalnum() and atom[1] not in _KNOWN_LETTERS:
            raise self.fault(f"has {atom}, which is not supported here")
        try:
            one = re.compile(atom)
        except (re.error, OverflowError) as error:
            raise self.fault(f"is not a regular expression: {reason(error)}") from None
        return partial(_assertion if atom in _ASSERTIONS else _character, one)

    def _group(self) -> _Ends:
        if self._next("?") and not self._next(":"):
            raise self.fault(f"has a group at {self.at - 2} of a kind that is not supported here")
        self._depth += 1
        if self._depth > 50:
            raise self.fault("is nested too deeply")
        inner = self.alternatives()
        self._depth -= 1
        if not self._next(")"):
            raise self.fault("has a ( too many")
        return inner

    def _repeated(self, part: _Ends) -> _Ends:
        least, most = 1, 1
        count = _COUNT.match(self._pattern, self.at)
        if self._next("*"):
            least, most = 0, _MOST_STEPS
        elif self._next("+"):
            least, most = 1, _MOST_STEPS
        elif self._next("?"):
            least, most = 0, 1
        elif count and (count[1] or count[3]):
            self.at = count.end()
            least = int(count[1] or 0)
            most = least if not count[2] else int(count[3] or _MOST_STEPS)
        else:
            return part
        if most < least:
            raise self.fault("has a repeat whose most is below its least")
        if not self._next("?") and self.at < len(self._pattern) and self._pattern[self.at] in "*+":
            raise self.fault(f"repeats a repeat at {self.at}")
        return partial(_repeats, part, least, most)


def _literal(text: str, name: str, starts: frozenset[int], budget: _Budget) -> frozenset[int]:
    budget.spend(len(starts))
    return frozenset(at + len(text) for at in starts if name.startswith(text, at))


def _character(atom: re.Pattern[str], name: str, starts: frozenset[int], budget: _Budget) -> frozenset[int]:
    budget.spend(len(starts))
    return frozenset(at + 1 for at in starts if at < len(name) and atom.fullmatch(name, at, at + 1))


def _assertion(atom: re.Pattern[str], name: str, starts: frozenset[int], budget: _Budget) -> frozenset[int]:
    budget.spend(len(starts))
    return frozenset(at for at in starts if atom.match(name, at))


def _one_after_the_other(parts: list[_Ends], name: str, starts: frozenset[int], budget: _Budget) -> frozenset[int]:
    for part in parts:
        if not starts:
            break
        starts = part(name, starts, budget)
    return starts


def _any_of(branches: list[_Ends], name: str, starts: frozenset[int], budget: _Budget) -> frozenset[int]:
    return frozenset().union(*(branch(name, starts, budget) for branch in branches))


def _repeats(part: _Ends, least: int, most: int, name: str, starts: frozenset[int], budget: _Budget) -> frozenset[int]:
    for _ in range(least):
        after = part(name, starts, budget)
        if after == starts:
            break
        starts = after
    reached, front = starts, starts
    for _ in range(most - least):
        front = part(name, front, budget) - reached
        if not front:
            break
        reached |= front
    return reached
