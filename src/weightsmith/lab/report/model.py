"""What a run says, computed once; the terminal, Markdown and HTML only lay it out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from weightsmith.lab.claim import Arm, Chart, Claim, Metric
from weightsmith.lab.record import JobResult
from weightsmith.lab.stats import Judgement, Summary


@dataclass(frozen=True, slots=True)
class Report:
    """A run and what follows from it.

    Attributes:
        run: The content of ``run.json``.
        arms: What is compared, in the experiment's order.
        metrics: What every job returns, in the experiment's order.
        charts: The pictures that the experiment declares.
        seeds: The seeds that were asked for.
        jobs: The finished jobs among ``arms`` x ``seeds``, in that order.
        strays: Finished jobs of other arms or seeds in the same folder; they count nowhere.
        table: Mean and spread by arm name, then metric name.
        judgements: One per claim, in the experiment's order.
    """

    run: Mapping[str, Any]
    arms: tuple[Arm, ...]
    metrics: tuple[Metric, ...]
    charts: tuple[Chart, ...]
    seeds: tuple[int, ...]
    jobs: tuple[JobResult, ...]
    strays: int
    table: Mapping[str, Mapping[str, Summary]]
    judgements: tuple[Judgement, ...]

    @property
    def headline(self) -> str:
        """The result in one sentence: "2 of 3 claims supported, 1 inconclusive"."""
        total = len(self.judgements)
        if not total:
            return "No claim to judge: this run describes, it does not decide"
        count = Counter(judgement.verdict for judgement in self.judgements)
        rest = "".join(f", {count[verdict]} {verdict}" for verdict in ("refuted", "inconclusive") if count[verdict])
        return f"{count['supported']} of {total} claim{'s' if total > 1 else ''} supported{rest}"

    @property
    def progress(self) -> str:
        """How much of the run is there, and which jobs are not."""
        planned = len(self.arms) * len(self.seeds)
        text = f"{len(self.jobs)} of {planned} jobs finished"
        missing = {arm.name: sorted(set(self.seeds) - self.finished(arm.name)) for arm in self.arms}
        if len(self.jobs) < planned:
            text += f"; missing: {listed(missing)}"
        if self.strays:
            text += f"; {self.strays} more in the folder, of arms or seeds not asked for, left out"
        return text

    @property
    def complete(self) -> bool:
        """Whether every job that was asked for has finished."""
        return len(self.jobs) == len(self.arms) * len(self.seeds)

    def metric(self, claim: Claim) -> Metric:
        """The metric that decides a claim."""
        return next(metric for metric in self.metrics if metric.name == claim.metric)

    def finished(self, arm: str) -> set[int]:
        """The seeds that an arm has finished."""
        return {job.seed for job in self.jobs if job.arm == arm}

    def best(self, metric: Metric) -> frozenset[str]:
        """Names of the arms with the best mean; empty when neither way is good or nothing tells the arms apart.

        Only arms with the most finite values compete: the mean over a diverged arm's surviving seeds would flatter it.
        """
        cells = {arm.name: self.table[arm.name][metric.name] for arm in self.arms}
        most = max((cell.n for cell in cells.values()), default=0)
        means = {name: cell.mean for name, cell in cells.items() if cell.n == most > 0}
        if metric.better is None or not means:
            return frozenset()
        top = max(means.values()) if metric.better == "higher" else min(means.values())
        winners = frozenset(name for name, mean in means.items() if mean == top)
        return winners if len(winners) < len(means) else frozenset()


def listed(seeds: Mapping[str, Sequence[int]]) -> str:
    """``"sgd (seed 2), adam (seeds 0, 1)"``; arms without seeds are passed over."""
    return ", ".join(
        f"{arm} (seed{'s' if len(found) > 1 else ''} {', '.join(map(str, found))})"
        for arm, found in seeds.items()
        if found
    )
