"""From runs to verdicts: paired effects over seeds and test examples, looks, families of claims.

- ``judge``, ``Judgement``: a verdict per claim.
- ``Plan``, ``decided``: when the data are looked at, and when a run may stop.
- ``noise``: what some seeds can show at all.
- ``summarize``: mean and spread of one metric.
"""

from weightsmith.lab.stats.effect import Effect, effect_of
from weightsmith.lab.stats.judge import FEWEST_SEEDS, Judgement, Verdict, decided, judge
from weightsmith.lab.stats.levels import ALPHA, LOOKS, Plan
from weightsmith.lab.stats.noise import noise
from weightsmith.lab.stats.summary import Summary, step_of, summarize

__all__ = [
    "ALPHA",
    "FEWEST_SEEDS",
    "LOOKS",
    "Effect",
    "Judgement",
    "Plan",
    "Summary",
    "Verdict",
    "decided",
    "effect_of",
    "judge",
    "noise",
    "step_of",
    "summarize",
]
