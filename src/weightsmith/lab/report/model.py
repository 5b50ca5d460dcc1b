"""What a run says, computed once; the terminal, Markdown and HTML only lay it out."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from weightsmith.lab.experiment import Arm, Chart, Claim, Metric
from weightsmith.lab.record import JobResult
from weightsmith.lab.report.pictures import Picture
from weightsmith.lab.stats import Judgement, Plan, Summary, Verdict


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
        plan: When the data were to be looked at.
        damaged: What could not be read, a line each.
        pictures: What jobs have kept to be looked at.
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
    plan: Plan = field(default_factory=Plan)
    damaged: tuple[str, ...] = ()
    pictures: tuple[Picture, ...] = ()

    @property
    def headline(self) -> str:
        """The result in one line: "2 of 3 claims supported, 1 undecided"."""
        total = len(self.judgements)
        if not total:
            return "No claim to judge: this run describes, it does not decide"
        count = Counter(judgement.verdict for judgement in self.judgements)
        others: tuple[Verdict, ...] = ("refuted", "no relevant effect", "undecided", "not run")
        rest = "".join(f", {count[verdict]} {verdict}" for verdict in others if count[verdict])
        return f"{count['supported']} of {total} claim{'s' if total > 1 else ''} supported{rest}"

    @property
    def primary(self) -> tuple[Judgement, ...]:
        """The claims that the experiment exists for."""
        return tuple(judgement for judgement in self.judgements if judgement.claim.primary)

    @property
    def mechanism(self) -> tuple[Judgement, ...]:
        """The other claims."""
        return tuple(judgement for judgement in self.judgements if not judgement.claim.primary)

    def label(self, arm: str) -> str:
        """How an arm is named to a reader."""
        return next((item.label for item in self.arms if item.name == arm), arm)

    @property
    def shown(self) -> tuple[Metric, ...]:
        """Metrics worth a column: measured in some arm, and neither constant nor equal to an earlier one throughout."""
        columns: dict[str, list[float]] = {}
        shown = []
        claimed = {judgement.claim.metric for judgement in self.judgements}
        for metric in self.metrics:
            values = [job.metrics[metric.name] for job in self.jobs if metric.name in job.metrics]
            if metric.name not in claimed and (not values or len({*values}) == 1 or values in columns.values()):
                continue
            columns[metric.name] = values
            shown.append(metric)
        return tuple(shown)

    @property
    def constants(self) -> dict[str, float]:
        """Metrics that are the same in every job, by label."""
        found = {}
        for metric in self.metrics:
            values = {job.metrics[metric.name] for job in self.jobs if metric.name in job.metrics}
            if metric not in self.shown and len(values) == 1:
                found[metric.label] = values.pop()
        return found

    @property
    def progress(self) -> str:
        """How much of the run is there, and which jobs are not."""
        planned = len(self.planned_arms) * len(self.seeds)
        text = f"{len(self.jobs)} of {planned} jobs finished"
        missing = {arm.name: sorted(set(self.seeds) - self.finished(arm.name)) for arm in self.planned_arms}
        if len(self.jobs) < planned:
            text += f"; missing: {listed(missing)}"
        if self.strays:
            text += f"; {self.strays} more in the folder, of arms or seeds not asked for, left out"
        return text

    @property
    def complete(self) -> bool:
        """Whether every job that was asked for has finished."""
        return len(self.jobs) >= len(self.planned_arms) * len(self.seeds)

    @property
    def planned_arms(self) -> tuple[Arm, ...]:
        """The arms that were to be run: all but those left out."""
        left_out = self.run.get("left_out", ())
        return tuple(arm for arm in self.arms if arm.name not in left_out or self.finished(arm.name))

    def metric(self, claim: Claim) -> Metric:
        """The metric that decides a claim."""
        return next(metric for metric in self.metrics if metric.name == claim.metric)

    def finished(self, arm: str) -> set[int]:
        """The seeds that an arm has finished."""
        return {job.seed for job in self.jobs if job.arm == arm}

    def best(self, metric: Metric) -> frozenset[str]:
        """Names of the arms that a supported claim on this metric puts ahead; the best mean alone is no finding."""
        return frozenset(
            judgement.claim.winner
            for judgement in self.judgements
            if judgement.claim.metric == metric.name and judgement.verdict == "supported"
        )


def listed(seeds: Mapping[str, Sequence[int]]) -> str:
    """``"sgd (seed 2), adam (seeds 0, 1)"``; arms without seeds are left out."""
    return ", ".join(
        f"{arm} (seed{'s' if len(found) > 1 else ''} {', '.join(map(str, found))})"
        for arm, found in seeds.items()
        if found
    )
