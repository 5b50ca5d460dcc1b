"""Greedy soup: add checkpoints, best first, as long as the average does not get worse.

Source: "Model soups: averaging weights of multiple fine-tuned models improves accuracy without increasing inference
time" (arXiv 2203.05482), recipe 1.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from weightsmith.average.checkpoints import RunCheckpoint, as_checkpoints
from weightsmith.average.merge import merge_checkpoints
from weightsmith.average.report import MergeReport
from weightsmith.core.errors import UsageError
from weightsmith.core.files import temporary_folder


def greedy_members(count: int, evaluate: Callable[[Sequence[int]], float]) -> list[int]:
    """Choose which of ``count`` models to average.

    Args:
        count: How many there are.
        evaluate: ``members -> score`` of their uniform average, higher is better; on held-out data. A score of NaN is
            that of a model that has diverged, which is left out.

    Returns:
        The members, in ascending order.

    Raises:
        UsageError: There are none, or every score is NaN.
    """
    if count < 1:
        raise UsageError("there is nothing to average")
    alone = [evaluate([index]) for index in range(count)]
    usable = [index for index in range(count) if not math.isnan(alone[index])]
    if not usable:
        raise UsageError(f"evaluate gave NaN for each of the {count} models: none can be averaged")
    first, *others = sorted(usable, key=lambda index: -alone[index])
    members, score = [first], alone[first]
    for index in others:
        candidate = sorted([*members, index])
        new_score = evaluate(candidate)
        if new_score >= score:
            members, score = candidate, new_score
    return members


def greedy_soup(
    checkpoints: Sequence[Path | str | RunCheckpoint],
    out: Path | str,
    evaluate: Callable[[Path], float],
    **options: Any,
) -> MergeReport:
    """Merge the checkpoints that a greedy soup keeps.

    ``2n - 1`` folders are evaluated; candidates are made beside ``out`` and removed.

    Args:
        checkpoints: Folders of one architecture, see `find_checkpoints`.
        out: The folder to make.
        evaluate: ``folder -> score``, higher is better; on held-out data. It loads the folder by ``from_pretrained``.
        **options: Further arguments of `merge_checkpoints`, for example ``lora_mode``.
    """
    found = as_checkpoints(checkpoints)
    target = Path(out)
    options["scheme"] = "uniform"

    def score(members: Sequence[int]) -> float:
        if len(members) == 1:
            return evaluate(found[members[0]].path)
        with temporary_folder(target) as folder:
            candidate = folder / "candidate"
            merge_checkpoints([found[index] for index in members], candidate, **options)
            return evaluate(candidate)

    return merge_checkpoints([found[index] for index in greedy_members(len(found), score)], target, **options)
