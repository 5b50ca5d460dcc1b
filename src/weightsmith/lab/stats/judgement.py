"""What the seeds say about one claim."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from weightsmith.lab.experiment import Claim

Verdict = Literal["supported", "refuted", "no relevant effect", "undecided", "not run"]


@dataclass(frozen=True, slots=True)
class Judgement:
    """What the seeds say about one claim.

    ``difference``, ``low``, ``high``, ``threshold``, ``worth`` and ``smallest`` are in the metric's unit, positive in
    the claim's favor; ``nan`` where these runs say nothing.

    Attributes:
        claim: The claim.
        verdict: ``supported``, ``refuted``, ``no relevant effect``, ``undecided`` or ``not run``.
        reason: Why, in one sentence.
        n: Paired seeds in which neither arm diverged.
        look: Seeds of the look that was judged, diverged ones included; ``None`` before the first look.
        difference: Mean over seeds of ``s * (winner - loser)``.
        low: Lower end of the interval of ``difference`` that decides.
        high: Upper end.
        level: Probability with which that interval may miss, for example 0.007.
        threshold: What ``difference`` has to exceed.
        worth: Smallest effect worth having, or ``None``.
        p: Two-sided p-value after the correction for looks and family: decided when at most 0.05.
        over: What the interval covers.
        smallest: Smallest effect that such runs show in 80 % of cases.
        seeds_needed: For an undecided claim with ``worth``, seeds in all that would show an effect of ``worth`` in 80 %
            of cases; where these runs already would, the seeds that show half of it, so that one verdict or another is
            likely. ``None``: no number of seeds does.
        examples_needed: Test examples in all that would, when they and not the seeds are too few.
        too_few: For an undecided claim, which of the two contributes more to the width of the interval.
        excludes_paper: The interval excludes the paper's gain; ``None`` where the paper gives no number.
        winner_diverged: Seeds of the look in which the winner diverged.
        loser_diverged: Seeds of the look in which the loser diverged.
    """

    claim: Claim
    verdict: Verdict
    reason: str
    n: int = 0
    look: int | None = None
    difference: float = math.nan
    low: float = math.nan
    high: float = math.nan
    level: float = math.nan
    threshold: float = math.nan
    worth: float | None = None
    p: float = math.nan
    over: Literal["seeds", "seeds and examples"] = "seeds"
    smallest: float = math.nan
    seeds_needed: int | None = None
    examples_needed: int | None = None
    too_few: Literal["seeds", "examples"] | None = None
    excludes_paper: bool | None = None
    winner_diverged: int = 0
    loser_diverged: int = 0

    @property
    def closes(self) -> bool:
        """Whether it is a gate that is not met, so that no other claim is decided."""
        return self.claim.gate and self.verdict != "supported"


def decided(judgements: Sequence[Judgement]) -> bool:
    """The stop rule: a gate failed, or every primary claim that ran (each, where none is primary) has a verdict."""
    if any(judged.closes and judged.verdict == "refuted" for judged in judgements):
        return True
    deciding = [judged for judged in judgements if judged.claim.primary] or judgements
    return all(judged.verdict != "undecided" for judged in deciding)
