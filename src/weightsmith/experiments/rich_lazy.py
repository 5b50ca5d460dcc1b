"""Does the rank of initial weights decide how lazily a network learns, or only their largest singular value?

A recurrent network starts from the same random matrix, cut to several ranks at the same Frobenius norm, again at the
same spectral norm, and once at both: a cut at equal Frobenius norm also raises the largest singular value. Beside it a
linear network in which the alignment of the kernel is known in closed form.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.core.outputs import logits_of
from weightsmith.diagnose import KernelOptions, LazinessProbe, effective_rank
from weightsmith.experiments import linear_network
from weightsmith.experiments.decisions import last_alone
from weightsmith.experiments.starts import start_
from weightsmith.init import apply_
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric, Value
from weightsmith.lab.job import Job
from weightsmith.lab.task import Task
from weightsmith.lab.tasks import TrainConfig, shared_task
from weightsmith.lab.train import Hook

_TASKS = "weightsmith.experiments.decisions:"
_PAPER = "shown in figures: lower rank, larger change, on all tasks"
_TRAINED = ("kernel", "representation", "change", "signs", "score", "loss")


@dataclass(frozen=True, slots=True)
class Config(TrainConfig):
    """What the experiment on rich and lazy learning compares, and how."""

    task: str = f"{_TASKS}two_alternatives"
    """What to train on: two_alternatives, matching, context or rows_of_images of weightsmith.experiments.decisions,
    or any other task, with --where and --layers."""
    more_tasks: tuple[str, ...] = ()
    """Further tasks; measures are means over all of them."""
    batch_sizes: tuple[int, ...] = ()
    """Examples per step of each task; batch_size for all by default."""
    units: int = 100
    """Hidden units of the recurrent network."""
    alpha: float = 1.0
    """Its step over its time constant."""
    ranks: tuple[int, ...] = (1, 10, 33)
    """Ranks below the full one, lowest first."""
    gain: float = 1.25
    """Standard deviation of the random matrix times the root of its size."""
    where: tuple[str, ...] = ("hidden.weight",)
    """Globs over names of the parameters that are initialized and studied."""
    layers: tuple[str, ...] = ("states",)
    """Globs over names of the modules whose activity is compared, at the last step."""
    steps: int | None = 1000
    """Optimizer steps."""
    batch_size: int = 32
    """Examples per step."""
    schedule: Any = "constant"
    """Learning-rate schedule, per step."""
    lr: float = 0.003
    """Learning rate of SGD."""
    momentum: float = 0.9
    """Momentum of SGD."""
    probe: int = 320
    """Test examples on which activity is compared."""
    kernel_probe: int = 32
    """Of these, how many have the tangent kernel."""
    looks: int = 4
    """How often the measures are taken during training."""

    @property
    def tasks(self) -> tuple["Config", ...]:
        """This configuration for each task."""
        names = (self.task, *self.more_tasks)
        sizes = self.batch_sizes or (self.batch_size,) * len(names)
        return tuple(
            replace(self, task=name, more_tasks=(), batch_sizes=(), batch_size=size)
            for name, size in zip(names, sizes, strict=True)
        )


def arms(config: Config) -> list[Arm]:
    """Ranks at equal Frobenius norm, at equal spectral norm, at both, and what people would use today."""
    found = [Arm("full", "full rank", "full rank")]
    for norm, text in (("frobenius", ""), ("spectral", ", spectral norm")):
        found += [
            Arm(f"r{rank}-{norm}", f"rank {rank}, {norm} norm kept", f"rank {rank}{text}") for rank in config.ranks
        ]
    high = config.ranks[-1]
    return [
        *found,
        Arm(f"r{high}-both", f"rank {high}, Frobenius and spectral norm kept", f"rank {high}, both norms"),
        Arm("orthogonal", "all singular values equal, Frobenius norm kept", "orthogonal"),
        Arm("aligned", "rank 1 along the task, in the linear network alone", "aligned"),
    ]


def claims(config: Config) -> list[Claim]:
    """Lazier with a higher rank, at either norm and at both, in kernel, activity and weights; and in theory."""
    low, high = config.ranks[0], config.ranks[-1]
    less = f"less from full rank than from rank {low}"
    lazier = partial(Claim, winner="full", loser=f"r{low}-frobenius", worth=0.05)
    own = [
        lazier(
            text=f"At equal Frobenius norm the kernel moves {less} on {_name(one)}", metric=f"kernel {_name(one)}",
            paper=_PAPER,
        )
        for one in (config.tasks if config.more_tasks else ())
    ]  # fmt: skip
    return [
        lazier(text=f"At equal Frobenius norm the kernel moves {less}", metric="kernel", primary=True, paper=_PAPER),
        lazier(
            text=f"At equal spectral norm the kernel moves {less}", metric="kernel", loser=f"r{low}-spectral",
            primary=True, paper="control not in the paper",
        ),
        *own,
        lazier(
            text=f"With both norms equal the kernel moves less from full rank than from rank {high}", metric="kernel",
            loser=f"r{high}-both", paper="control not in the paper",
        ),
        lazier(text=f"At equal Frobenius norm activity moves {less}", metric="representation", paper=_PAPER),
        lazier(text=f"At equal Frobenius norm weights move {less}", metric="change", relative=True, paper=_PAPER),
        lazier(
            text=f"In a linear network the kernel moves {less}", metric="linear",
            paper="rises with the rank, on average over tasks",
        ),
        lazier(
            text="In a linear network the kernel moves less from an aligned start of rank 1 than from full rank",
            metric="linear", winner="aligned", loser="full", paper="an aligned start stays lazy",
        ),
        Claim(
            text="Full rank decides as well as orthogonal weights, to 1 %", metric="score", winner="full",
            loser="orthogonal", margin=-1.0,
        ),
    ]  # fmt: skip


def metrics(config: Config) -> list[Metric]:
    """The three measures of laziness, the task, and the linear network beside its formula."""
    own = [
        Metric(f"kernel {_name(one)}", f"kernel alignment, {_name(one)}", "higher", ".3f", help="On this task alone.")
        for one in (config.tasks if config.more_tasks else ())
    ]
    return [
        Metric("kernel", "kernel alignment", "higher", ".3f", help="Tangent kernel before and after; 1: lazy."),
        Metric("representation", "representation alignment", "higher", ".3f", help="At the last step, not centered."),
        Metric("change", "weight change", "lower", ".3f", help="Frobenius norm, of the studied weights."),
        Metric("signs", "equal signs", "higher", ".3f", help="Activities whose sign is the same; 1: lazy."),
        Metric("score", "score on the task", _better(config), ".2f", help="On the test split."),
        Metric("loss", "training loss", None, ".3f", help="Mean since the last look."),
        Metric("rank", "effective rank", None, ".1f", help="Participation ratio of the studied weights at the start."),
        *own,
        Metric("linear", "linear network", "higher", ".3f", help="Kernel alignment of a small linear network."),
        Metric("linear_gap", "off the formula", "lower", ".4f", help="Distance of that from the theory."),
        *(
            metric
            for scale in linear_network.SCALES[1:]
            for metric in (
                Metric(f"linear_{scale:g}", f"linear, norm {scale:g}", "higher", ".3f", help="From larger weights."),
                Metric(f"linear_gap_{scale:g}", f"off, norm {scale:g}", "lower", ".4f", help="From the theory."),
            )
        ),
    ]


def _better(config: Config) -> Any:
    return shared_task(config.tasks[0]).metric.better


def _name(config: Config) -> str:
    return config.task.rpartition(":")[2]


CHARTS = (
    Chart(title="Kernel alignment with the start", x="step", y="kernel", y_label="kernel alignment"),
    Chart(title="Representation alignment with the start", x="step", y="representation", y_label="alignment"),
    Chart(title="Weight change", x="step", y="change", y_label="Frobenius norm"),
    Chart(
        title="Kernel alignment against the effective rank of the start", x="rank", y="kernel", kind="scatter",
        phase="end", x_label="participation ratio", y_label="kernel alignment", log_x=True,
    ),
)  # fmt: skip


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    config.check("units", "gain", "alpha", "lr", "probe", "kernel_probe", "looks")
    if not config.ranks or list(config.ranks) != sorted(set(config.ranks)) or config.ranks[0] < 1:
        raise UsageError(f"ranks must rise from at least 1, got {config.ranks}")
    if config.batch_sizes and len(config.batch_sizes) != 1 + len(config.more_tasks):
        raise UsageError(f"batch_sizes must have one number per task, got {config.batch_sizes}")
    if ":" in config.task and config.ranks[-1] >= config.units:
        raise UsageError(f"ranks must be below units={config.units}, got {config.ranks}")


def job(config: Config, job: Job) -> Mapping[str, Value]:
    """Train one start in the linear network, and on every task."""
    linear = linear_network.measure(
        _in_the_linear_network(config, job.arm), job.seed,
        lambda w, arm, generator: start_(w, arm, config.gain, generator),
    )  # fmt: skip
    if job.arm == "aligned":
        return {**dict.fromkeys((metric.name for metric in metrics(config)), None), **linear}
    found = [_train(one, job) for one in config.tasks]
    means: dict[str, Value] = {name: sum(one[name] for one in found) / len(found) for name in found[0]}
    own = {f"kernel {_name(one)}": each["kernel"] for one, each in zip(config.tasks, found, strict=True)}
    return {**means, **linear, **(own if config.more_tasks else {})}


def _in_the_linear_network(config: Config, arm: str) -> str:
    """The arm with its rank at the same share of the largest."""
    name, _, norm = arm.partition("-")
    if not norm:
        return arm
    return f"r{max(1, round(int(name[1:]) * linear_network.INPUTS / config.units))}-{norm}"


def _train(config: Config, job: Job) -> dict[str, float]:
    task = shared_task(config)
    model = config.network(task, job.seed).to(job.device)
    generator = torch.Generator().manual_seed(job.seed)  # the same matrix for all ranks
    apply_(model, lambda w: start_(w, job.arm, config.gain, generator), list(config.where))
    held_out = task.held_out["test"]
    inputs = held_out.__getitems__(list(range(min(config.probe, len(held_out))))).inputs
    probe = LazinessProbe(
        model, inputs, layers=list(config.layers), params=list(config.where), activity=_last_step,
        outputs=_decision if last_alone(task) else None, kernel=KernelOptions(), kernel_samples=config.kernel_probe,
    )  # fmt: skip
    before = probe.snapshot(model)
    weights = [w for w in before.weights.values() if w.dim() >= 2]
    rank = sum(float(effective_rank(w, "participation")) for w in weights) / len(weights)
    latest: dict[str, float] = {}

    def look(network: nn.Module) -> dict[str, float]:
        report = probe.compare(before, network)
        layers = report.representation_alignment
        latest.update(
            kernel=report.kernel_alignment,
            representation=sum(layers.values()) / len(layers),
            change=report.weight_change,
            signs=sum(report.sign_similarity.values()) / len(report.sign_similarity),
        )
        return dict(latest)

    optimizer = torch.optim.SGD(model.parameters(), lr=config.lr, momentum=config.momentum)
    total = config.total_steps(task)
    fitted = config.fit(
        model, optimizer, task, job.seed, rows_at=max(1, -(-total // config.looks)), validate="never",
        hooks=[Hook(after_row=look)], record=lambda row: job.record(dict(row), phase=_name(config)),
        folder=job.folder / _name(config).replace("/", "-"),
    )  # fmt: skip
    job.diverged = job.diverged or fitted.diverged
    if fitted.diverged:
        return {**dict.fromkeys(_TRAINED, float("nan")), "rank": rank}
    if not latest:  # the run had ended before this call, which only read its rows
        look(model)
    job.record({"rank": rank, "kernel": latest["kernel"]}, phase="end")
    return {**latest, "score": _score(task, model), "loss": fitted.rows[-1]["train_loss"], "rank": rank}


def _score(task: Task, model: nn.Module) -> float:
    return float(task.evaluate(model, "test").metrics[task.metric.name])


def _last_step(returned: Any) -> Tensor:
    h = logits_of(returned)
    return h[:, -1] if h.dim() == 3 else h.flatten(1)


def _decision(returned: Any) -> Tensor:
    return logits_of(returned)[:, -1]


def steps(config: Config, arm: str) -> int:
    """Training steps of a job."""
    return 0 if arm == "aligned" else sum(one.total_steps(shared_task(one)) for one in config.tasks)


EXPERIMENT = Experiment(
    slug="rich-lazy",
    title="The rank of initial weights and lazy learning",
    question=(
        "At the same norm, does a recurrent network that starts from low-rank weights learn features, and one that "
        "starts from full rank only a readout? And is it the rank that decides, or the largest singular value?"
    ),
    presets={
        "smoke": Config(steps=60, units=24, ranks=(1, 10), probe=64, kernel_probe=8, looks=2),
        "laptop": Config(more_tasks=(f"{_TASKS}matching", f"{_TASKS}context"), looks=3),
        "paper": Config(
            more_tasks=(f"{_TASKS}matching", f"{_TASKS}context", f"{_TASKS}rows_of_images"), data="mnist",
            batch_sizes=(32, 32, 32, 200), steps=10_000, units=300, ranks=(1, 30, 100), validation_fraction=1 / 12,
            looks=10,
        ),
    },
    arms=arms,
    claims=claims,
    metrics=metrics,
    charts=CHARTS,
    job=job,
    task=lambda config: shared_task(config.tasks[0]),
    steps=steps,
    check=check,
    reading=(
        "Alignments near 1 mean that a network has stayed close to the kernel machine that it was; higher is lazier, "
        "not better. A cut at equal Frobenius norm raises the largest singular value: rank and gain change together. "
        "The arms at equal spectral norm hold that value and let the Frobenius norm fall instead; at both norms a cut "
        "needs a quarter of the full rank at least. Only if all orders agree is it the rank. All ranks of a seed are "
        "cut from one random matrix. The linear network starts from weights of norm 0.001, where the theory holds to "
        "about four digits, of 0.1, where it is close, and of 1, where it is not meant to hold; a distance above 0.01 "
        "at the first two would refute it."
    ),
)  # fmt: skip
