"""What paired runs say about claims: summaries, looks, intervals, verdicts, power and noise. Pure functions.

`judge` gives one `Judgement` per claim, `decided` is the stop rule, `Plan` the looks.
"""

from weightsmith.lab.stats.judgement import Judgement, Verdict, decided
from weightsmith.lab.stats.looks import LEVEL, LOOKS, Plan, next_look
from weightsmith.lab.stats.noise import Noise, noise
from weightsmith.lab.stats.pairs import Result, Results
from weightsmith.lab.stats.power import detectable, seeds_needed
from weightsmith.lab.stats.summaries import Summary, summarize
from weightsmith.lab.stats.verdicts import judge

__all__ = [
    "LEVEL",
    "LOOKS",
    "Judgement",
    "Noise",
    "Plan",
    "Result",
    "Results",
    "Summary",
    "Verdict",
    "decided",
    "detectable",
    "judge",
    "next_look",
    "noise",
    "seeds_needed",
    "summarize",
]
