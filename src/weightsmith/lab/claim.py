"""What an experiment compares, and what would support or refute it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

from weightsmith.core.errors import UsageError, unknown

if TYPE_CHECKING:
    from weightsmith.lab.record import Recorder

Better = Literal["higher", "lower"]
Config = TypeVar("Config")


@dataclass(frozen=True, slots=True)
class Arm:
    """One of the things compared: the technique, or an honest baseline.

    Attributes:
        name: Folder-safe identifier, for example ``"sgdp"``.
        text: What it is, in a few words.
    """

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Metric:
    """One number that every job returns.

    Attributes:
        name: Key in a job's result.
        label: Heading in tables and plots.
        better: Which way is good, or ``None`` when neither is.
        format: Python format specification for one value.
        help: One sentence that says what is measured.
    """

    name: str
    label: str
    better: Better | None = None
    format: str = ".3f"
    help: str = ""


@dataclass(frozen=True, slots=True)
class Claim:
    """A sentence that the runs can support or refute, paired by seed.

    With ``s = 1`` when higher is better and ``-1`` otherwise, the claim says that
    ``s * (winner - loser) > margin`` on average over seeds.

    Attributes:
        text: The claim in one sentence.
        metric: The metric that decides.
        winner: The arm that should come out ahead.
        loser: The arm it is compared with.
        better: Which way the metric is good.
        margin: By how much at least, in the metric's unit; negative for "not worse by more than".
        relative: The margin is a fraction of the loser's absolute value, seed by seed.
        paper: The paper's own figure, for the reader to compare.
    """

    text: str
    metric: str
    winner: str
    loser: str
    better: Better = "higher"
    margin: float = 0.0
    relative: bool = False
    paper: str = ""


@dataclass(frozen=True, slots=True)
class Chart:
    """A picture drawn from the rows that jobs record while they run.

    Attributes:
        title: What the picture shows, as a statement or a question.
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
class Experiment(Generic[Config]):
    """Arms x seeds -> metrics -> claims.

    Attributes:
        slug: The technique's slug; names the run folder.
        title: Heading of the report.
        question: What a reader learns, in one or two sentences.
        presets: Complete configurations by name; ``"laptop"`` is the default.
        arms: The arms that a configuration compares.
        claims: The claims that a configuration can decide.
        metrics: What every job returns, in the order of the tables.
        charts: Pictures for the report.
        job: ``(config, arm name, seed, recorder) -> metrics``: a pure function; it may be run in any process.
        check: Called once before any job starts; raises :class:`UsageError` for a configuration that cannot run.
        reading: How to read the result honestly; a paragraph for the report.
    """

    slug: str
    title: str
    question: str
    presets: Mapping[str, Config]
    arms: Callable[[Config], Sequence[Arm]]
    claims: Callable[[Config], Sequence[Claim]]
    metrics: tuple[Metric, ...]
    job: Callable[[Config, str, int, "Recorder"], Mapping[str, float]]
    charts: tuple[Chart, ...] = ()
    check: Callable[[Config], None] = lambda config: None
    reading: str = ""

    def preset(self, name: str) -> Config:
        """Look up a preset by name, or say which there are."""
        if name not in self.presets:
            raise unknown("preset", name, self.presets)
        return self.presets[name]

    def describe(self, config: Config) -> dict[str, Any]:
        """Everything a report needs, as plain data: written beside the results, so that they can be read without code.

        Raises:
            UsageError: The experiment contradicts itself, for example a claim about an arm that is not run.
        """
        arms, claims = self.arms(config), self.claims(config)
        names, metrics = {arm.name for arm in arms}, {metric.name for metric in self.metrics}
        for claim in claims:
            if not {claim.winner, claim.loser} <= names or claim.metric not in metrics:
                raise UsageError(f"claim {claim.text!r} names an arm or a metric that this experiment does not have")
        return {
            "slug": self.slug,
            "title": self.title,
            "question": self.question,
            "reading": self.reading,
            "arms": [asdict(arm) for arm in arms],
            "metrics": [asdict(metric) for metric in self.metrics],
            "claims": [asdict(claim) for claim in claims],
            "charts": [asdict(chart) for chart in self.charts],
        }
