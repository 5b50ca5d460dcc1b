"""How large an effect some seeds can show, from the spread of one arm alone: measure it before believing a gain."""

import math
from collections.abc import Sequence

from weightsmith.core.errors import UsageError
from weightsmith.lab.stats.effect import Effect
from weightsmith.lab.stats.levels import ALPHA
from weightsmith.lab.stats.summary import summarize

COUNTS = (3, 5, 10, 20, 50)


def noise(values: Sequence[float], counts: Sequence[int] = COUNTS) -> dict[int, float]:
    """Smallest difference between two arms that ``n`` seeds show four times out of five, for each ``n`` of ``counts``.

    The arms are taken to vary alike and independently, so that a difference has twice the variance of one arm; pairing
    by seed can only help. One claim, one look, level 0.05.

    Args:
        values: The metric of one arm, a value per seed; at least three.
        counts: Numbers of seeds.

    Raises:
        UsageError: There are too few values.
    """
    summary = summarize(values)
    if summary.n < 3:
        raise UsageError(f"the noise of a metric takes at least 3 seeds with finite values, got {summary.n}")
    effect = Effect(0.0, 2 * summary.sd**2, 0.0, summary.n)
    return {n: float(effect.detectable(ALPHA, n)) if summary.sd else math.nan for n in counts}
