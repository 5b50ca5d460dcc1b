"""What an experiment compares, and what would support or refute it."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from torch import Tensor

from weightsmith.core.errors import UsageError, unknown

if TYPE_CHECKING:
    from weightsmith.lab.job import Job
    from weightsmith.lab.task import Task

Better = Literal["higher", "lower"]
Config = TypeVar("Config")
Value = float | Tensor | None
"""A metric of one job: a number; scores per test example ``(N,)``, whose mean counts; ``None``: not measured."""


@dataclass(frozen=True, slots=True)
class Arm:
    """One of the things compared: the technique, or an honest baseline.

    Attributes:
        name: Folder-safe identifier, for example ``"sgdp"``.
        text: What it is, in a few words.
        title: How plots, tables and sentences name it, for example ``"SGDP"``; ``""``: the name.
    """

    name: str
    text: str
    title: str = ""

    @property
    def label(self) -> str:
        """What a reader sees."""
        return self.title or self.name


@dataclass(frozen=True, slots=True)
class Metric:
    """One number that every job returns; it alone says which direction is good.

    Attributes:
        name: Key in a job's result.
        label: Heading in tables and plots.
        better: Which direction is good, or ``None`` when neither is.
        format: Python format specification for one value.
        resolution: Smallest difference between two values of one job, in the metric's unit: one example of a test set.
            ``None``: continuous, or given by the number of scores per example.
        help: One sentence that says what is measured.
        chosen_by: Arms in which the value tells what was chosen between near equals, such as a learning rate picked on
            validation data: other rounding can turn the choice. ``weightsmith verify`` then goes by the other metrics.
        cost: Time or memory of this machine; ``weightsmith verify`` does not compare it.
        failures: How many parts of the job failed and are in none of its means; reports show the sum by arm.
    """

    name: str
    label: str
    better: Better | None = None
    format: str = ".3f"
    resolution: float | None = None
    help: str = ""
    chosen_by: tuple[str, ...] = ()
    cost: bool = False
    failures: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """A sentence that the runs can support or refute, paired by seed.

    With ``s = 1`` when higher values of the metric are better and ``-1`` otherwise, the claim says that
    ``s * (winner - loser) > margin`` on average over seeds.

    Attributes:
        text: The claim as a statement.
        metric: The metric that decides.
        winner: The arm that should come out ahead.
        loser: The arm it is compared with.
        primary: One of the claims that the experiment exists for, two at most; the others are about the mechanism.
        gate: A condition for all other claims: until it is supported, none of them is decided. It is a family of its
            own.
        margin: By how much at least, in the metric's unit; negative for "not worse by more than".
        relative: ``margin``, ``worth`` and ``paper_gain`` are fractions of the loser's absolute value, seed by seed.
        worth: Smallest effect worth having, in the unit of ``margin``, decided before any run; ``None``: any.
        paper: What the paper says, for the reader to compare.
        paper_gain: The paper's own gain ``s * (winner - loser)`` in the unit of ``margin``, where it gives a number.
    """

    text: str
    metric: str
    winner: str
    loser: str
    primary: bool = False
    gate: bool = False
    margin: float = 0.0
    relative: bool = False
    worth: float | None = None
    paper: str = ""
    paper_gain: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Chart:
    """A picture drawn from the rows that jobs record.

    Attributes:
        title: What is drawn.
        x: Row key on the horizontal axis.
        y: Row key on the vertical axis.
        kind: ``"line"``: mean over seeds with a band of one standard deviation; ``"scatter"``: one dot per row.
        phase: Only rows whose ``"phase"`` equals this are drawn; ``None``: all rows that have both keys.
        x_label: Axis title; ``""``: the key.
        y_label: Axis title; ``""``: the key.
        log_x: Logarithmic horizontal axis.
        log_y: Logarithmic vertical axis.
        arms: Only these arms, or all when empty.
    """

    title: str
    x: str
    y: str
    kind: Literal["line", "scatter"] = "line"
    phase: str | None = None
    x_label: str = ""
    y_label: str = ""
    log_x: bool = False
    log_y: bool = False
    arms: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Resources:
    """What one job occupies.

    Attributes:
        cpus: Torch threads, and CPUs on a Ray cluster.
        gpus: Share of a GPU, where there are any; ``0.0``: a whole one.
    """

    cpus: int = 1
    gpus: float = 0.0


_FOLDERS = {"start", "work"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment(Generic[Config]):
    """Arms x seeds -> metrics -> claims -> verdicts.

    Attributes:
        slug: The technique's slug; names the run folder.
        title: Heading of the report.
        question: What a reader learns, as a question of one or two sentences.
        presets: Complete configurations by name; ``"laptop"`` is the default.
        arms: The arms that a configuration compares.
        claims: The claims that a configuration can decide; the declared family, whatever arms are run.
        metrics: What every job returns, in the order of the tables; the task may decide.
        job: ``(config, job) -> metrics``: a function of config, arm and seed alone; it may be run in any process.
        start: ``(config, seed, folder) -> data``: done once per seed, stored, and shared by the arms as ``job.start``,
            for example the state of a pretrained network. It returns tensors, numbers and strings in dicts and lists;
            ``folder`` is for checkpoints, as a job's.
        task: ``config -> Task`` that the jobs train; checked by one real batch before the first job, and described in
            the report.
        facts: ``config -> what the jobs run on``, in words and under the names of `Task.facts`, above all ``"data"``
            and ``"model"``; for the report of an experiment without a task.
        steps: ``(config, arm) -> training steps of a job``, from which ``--dry-run`` estimates the time.
        step_seconds: ``config -> seconds`` of such a step, timed now, where it is no plain step of the task's model;
            ``steps`` then counts evaluations too, in units of steps. ``None``: not known without downloads.
        charts: Pictures for the report.
        check: Called once before any job starts; raises `UsageError` for a configuration that cannot run.
        reading: How to read the result honestly; a paragraph for the report.
        resources: What one job occupies.
        revision: Raise it when results of an earlier version are no longer comparable.
        code: Fingerprint of the user's own code that the jobs call, beside that of the task.
    """

    slug: str
    title: str
    question: str
    presets: Mapping[str, Config]
    arms: Callable[[Config], Sequence[Arm]]
    claims: Callable[[Config], Sequence[Claim]]
    metrics: Callable[[Config], Sequence[Metric]]
    job: Callable[[Config, "Job"], Mapping[str, Value]]
    start: Callable[[Config, int, Path], Any] | None = None
    task: Callable[[Config], "Task"] | None = None
    facts: Callable[[Config], Mapping[str, str]] | None = None
    steps: Callable[[Config, str], int] | None = None
    step_seconds: Callable[[Config], float | None] | None = None
    charts: tuple[Chart, ...] = ()
    check: Callable[[Config], None] = lambda config: None
    reading: str = ""
    resources: Resources = Resources()
    revision: int = 1
    code: str = ""

    def preset(self, name: str) -> Config:
        """Look up a preset by name, or say which there are."""
        if name not in self.presets:
            raise unknown("preset", name, self.presets)
        return self.presets[name]

    def describe(self, config: Config) -> dict[str, Any]:
        """Everything a report needs, as plain data: written beside the results, so that they can be read without code.

        Raises:
            UsageError: The experiment contradicts itself, for example a claim about an arm that it does not have.
        """
        arms, claims, declared = self.arms(config), self.claims(config), self.metrics(config)
        names, metrics = {arm.name for arm in arms}, {metric.name: metric for metric in declared}
        if taken := names & _FOLDERS:
            raise UsageError(f"an arm cannot be named {min(taken)!r}: a run has a folder of that name; rename it")
        for claim in claims:
            if not {claim.winner, claim.loser} <= names or claim.metric not in metrics:
                raise UsageError(f"claim {claim.text!r} names an arm or a metric that this experiment does not have")
            if metrics[claim.metric].better is None:
                raise UsageError(f"claim {claim.text!r} needs a metric with a direction; {claim.metric} has none")
            if claim.worth is not None and not 0 < claim.worth < math.inf:
                raise UsageError(f"worth must be a number above 0, got {claim.worth} in claim {claim.text!r}")
            if claim.gate and claim.primary:
                raise UsageError(f"claim {claim.text!r} must be a gate or primary, not both")
        return {
            "slug": self.slug,
            "title": self.title,
            "question": self.question,
            "reading": self.reading,
            "arms": [asdict(arm) for arm in arms],
            "metrics": [asdict(metric) for metric in declared],
            "claims": [asdict(claim) for claim in claims],
            "charts": [asdict(chart) for chart in self.charts],
        }
