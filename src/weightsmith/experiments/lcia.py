"""Does an average with a balance weight forget less than tuning in sequence, and than a fixed average?

Tasks arrive one after another and train the same parameters for the same number of steps. Only the arm LCIA is told
which tasks belong together, by their instructions; the arm dynamic EMA is the same without that.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weightsmith.continual import EWC, ContinualTuner, InstructionRouter, transfer
from weightsmith.core.errors import UsageError, require
from weightsmith.experiments.adapters import with_lora
from weightsmith.experiments.rivals import Replay, distilled, losses_of_examples
from weightsmith.experiments.streams import (
    Stage,
    bytes_per_example,
    check_sequence,
    mean_score,
    pooled,
    stages_of,
    together,
)
from weightsmith.lab.data.instructions import SETS
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric, Value
from weightsmith.lab.job import Job
from weightsmith.lab.task import Task
from weightsmith.lab.tasks import TrainConfig
from weightsmith.lab.train import Hook

_BETAS = (0.99, 0.995, 0.997, 0.999)
_PAPER = "CoIN, LLaVA-7B, mean final accuracy: LoRA 28.74, EMA 0.99 48.09, dynamic EMA 55.33, with groups 64.64"


@dataclass(frozen=True, slots=True)
class Config(TrainConfig):
    """What the LCIA experiment compares, and how."""

    DEFAULT_SETS: ClassVar[Mapping[str, tuple[str, ...]]] = {
        "questions": ("sums", "reversed", "sums-reworded", "capitals")
    }
    DEFAULT_MODELS: ClassVar[Mapping[str, str]] = {**TrainConfig.DEFAULT_MODELS, "images": "mlp"}

    epochs: float = 10
    """Passes over the data of each task."""
    lr: float = 1e-3
    """Learning rate of AdamW, per task as the schedule says."""
    rank: int = 0
    """Rank of LoRA on every linear layer but the head; 0 trains all weights."""
    kinds: tuple[str, ...] = ("0", "-0", "30", "-30")
    """Images: the tasks, as degrees to turn by; with - before them, of the negative."""
    sets: tuple[str, ...] = ()
    """The tasks, as names of data, one each; empty: images are seen in the kinds above, questions are made here."""
    prompts: tuple[str, ...] = ()
    """The instruction of each of your own sets, in their order, for the router."""
    kappa: float = 2.0
    """Scale of the balance weight: 2 as in the authors' code, 0.01 for small adapters."""
    encoder: str = ""
    """Sentence encoder of the router, a folder or hub id; empty compares words."""
    ewc: float = 100.0
    """Strength of EWC."""
    lwf: float = 1.0
    """Strength of LwF's distillation, at temperature 2."""
    fisher: int = 64
    """Examples that EWC measures its weights' importance on."""


def arms(_: Config) -> list[Arm]:
    """LCIA, its parts, the fixed averages, two rivals, and what bounds them."""
    return [
        Arm("lcia", "dynamic average, a group of parameters per kind of instruction", "LCIA"),
        Arm("dynamic", "dynamic average, one group", "dynamic EMA"),
        Arm("eq45", "dynamic average by the paper's equation 45, one group", "dynamic EMA, eq. 45"),
        Arm("groups", "groups of parameters without an average", "groups alone"),
        Arm("plain", "one task after another", "sequential"),
        *(Arm(f"ema-{beta}", f"average with the fixed weight {beta}", f"EMA {beta}") for beta in _BETAS),
        Arm("ewc", "important weights are held in place", "EWC"),
        Arm("lwf", "distillation from the model before the task", "LwF"),
        Arm("replay", "earlier examples, in the bytes that LCIA's other groups take", "replay, equal bytes"),
        Arm("joint", "all tasks at once: an upper bound", "joint training"),
    ]


def claims(config: Config) -> list[Claim]:
    """Better than the fixed average the paper compares with, and than sequential tuning; where it comes from."""
    points, dynamic = config.paper_gain, partial(Claim, metric="score", winner="dynamic")
    return [
        dynamic(
            text="The dynamic average ends better than a fixed average of 0.99", loser="ema-0.99", primary=True,
            worth=config.least, paper=_PAPER, paper_gain=points(7.24),
        ),
        Claim(
            text="LCIA ends better than tuning in sequence", metric="score", winner="lcia", loser="plain",
            primary=True, worth=config.least, paper=_PAPER, paper_gain=points(35.90),
        ),
        dynamic(
            text="The dynamic average forgets less than tuning in sequence", metric="forgetting", loser="plain",
            paper="7.04 against 37.29 points",
        ),
        Claim(text="Groups help the dynamic average", metric="score", winner="lcia", loser="dynamic"),
        Claim(text="The average helps within groups", metric="score", winner="lcia", loser="groups"),
        Claim(text="LCIA ends better than replay of as many bytes", metric="score", winner="lcia", loser="replay"),
        *(
            dynamic(text=f"The dynamic average ends better than a fixed average of {beta}", loser=f"ema-{beta}")
            for beta in _BETAS[1:]
        ),
        dynamic(text="The dynamic average ends better than EWC", loser="ewc"),
        dynamic(text="The dynamic average ends better than LwF", loser="lwf"),
    ]  # fmt: skip


def metrics(config: Config) -> list[Metric]:
    """The measures of the field, what is kept, and what the average did."""
    score = config.score_metric()
    unit = " %" if config.in_points else ""
    points = partial(Metric, better=score.better, format=".2f")
    return [
        replace(score, label=f"final{unit}", help="On the test rows of all tasks, after the last (MFN)."),
        points("over_steps", f"mean over steps{unit}", help="On the tasks seen, mean over all steps (MAA)."),
        points("new", f"right after{unit}", help="On each task right after it was trained (MFT)."),
        Metric("forgetting", "forgetting", "lower", ".2f", help="Lost since the best, mean over tasks."),
        Metric("backward", "backward transfer", "higher", "+.2f", help="Gained since it was trained (BWT)."),
        Metric("forward", f"before{unit}", None, ".2f", help="On each task right before it is trained (FWT)."),
        Metric("groups", "groups", None, ".0f", help="Of parameters."),
        Metric("kept", "bytes kept", "lower", ",.0f", help="From task to task: parameters, what EWC remembers, data."),
        Metric("examples", "of them data", None, ",.0f", help="Bytes of stored examples."),
        Metric("alpha", "median weight", None, ".4f", help="Of the live parameters in the average, at the last step."),
        Metric("fallback", "fallbacks", None, ".2f", help="Share of tensors and steps with the fallback weight."),
    ]


CHARTS = (
    Chart(title="Mean score on the tasks seen", x="tasks", y="seen", phase="after task", y_label="score"),
    Chart(
        title="Final score against bytes kept", x="kept", y="final", kind="scatter", phase="end",
        x_label="bytes kept", y_label="final score", log_x=True,
    ),
    Chart(title="Final score against the score right after each task", x="new", y="final", kind="scatter", phase="end"),
)  # fmt: skip


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    config.check("lr", "kappa", "ewc", "lwf", "fisher")
    if config.rank < 0:
        raise UsageError(f"rank must be at least 0, got {config.rank}")
    if config.loss or config.metric:
        raise UsageError("loss and metric must be those of the task: what is compared is the mean over tasks")
    check_sequence(config, kinds=config.kinds, sets=_sets(config))
    if config.rank:
        require("peft", extra="hf", purpose="LoRA")


def _sets(config: Config) -> tuple[str, ...]:
    return config.sets or (() if config.data else config.DEFAULT_SETS.get(config.task, ()))


@lru_cache(maxsize=1)
def _stages(config: Config) -> list[Stage]:
    return stages_of(config, kinds=config.kinds, sets=_sets(config), prompts=config.prompts)


def task(config: Config) -> Task:
    """The first of the tasks; making all of them checks them."""
    return _stages(config)[0].task


def _router(config: Config) -> InstructionRouter:
    return InstructionRouter(config.encoder or "tfidf", threshold=None if config.encoder else 0.3)


def _groups(config: Config, stages: list[Stage]) -> int:
    """How many groups of parameters LCIA keeps."""
    router = _router(config)
    for stage in stages:
        router.commit(router.assign(stage.instructions), stage.instructions)
    return len(router.groups)


def _tuner(config: Config, arm: str, model: nn.Module) -> ContinualTuner:
    grouped = arm in ("lcia", "groups")
    router = _router(config) if grouped else InstructionRouter(lambda texts: torch.ones(len(texts), 1))
    options: dict[str, Any] = {"kappa": config.kappa}
    if arm == "eq45":
        options = {"mode": "paper"}
    elif arm.startswith("ema-"):
        options = {"mode": "fixed", "fallback_beta": float(arm[4:])}
    return ContinualTuner(model, router, **options)


def job(config: Config, job: Job) -> Mapping[str, Value]:
    """Let the tasks arrive, and score all of them after each."""
    stages = _stages(config)
    model = config.network(task(config), job.seed).to(job.device)
    model = with_lora(model, config.rank) if config.rank else model
    one = sum(p.nbytes for p in model.parameters() if p.requires_grad)
    tuner = _tuner(config, job.arm, model)
    averaged = job.arm not in ("plain", "groups", "ewc", "lwf", "replay", "joint")
    ewc = EWC(model, config.ewc)
    replay = Replay((_groups(config, stages) - 1) * one if job.arm == "replay" else 0, [])
    rows: list[tuple[str, dict[str, float]]] = []
    alphas: list[float] = []
    fallback: float | None = None
    sequence = stages
    if job.arm == "joint":
        everything = [(stage.task, torch.arange(len(stage.task.train))) for stage in stages]
        sequence = [replace(stages[-1], task=together(config, everything))]
    for at, stage in enumerate(sequence):
        loss: Any = None
        if job.arm == "ewc" and at:
            loss = lambda m, b, task=stage.task: task.losses(m, b).mean() + ewc.penalty()  # noqa: E731
        if job.arm == "lwf" and at:
            loss = partial(distilled, stage.task, copy.deepcopy(model).eval(), config.lwf)
        trained = replay.with_new(config, stage.task)
        taken = steps(config, job.arm) if job.arm == "joint" else config.total_steps(stage.task)
        with tuner.task(stage.instructions):
            ema = tuner.ema if averaged else None
            tuner.ema = ema
            optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=config.lr)
            fitted = config.fit(
                model, optimizer, trained, job.seed + at, steps=taken, loss=loss, validate="never",
                hooks=[Hook(after_step=ema.step, state=ema)] if ema is not None else (),
                record=partial(job.record, phase=f"task {at + 1}"), folder=job.folder / f"task-{at + 1}",
            )  # fmt: skip
            job.diverged = job.diverged or fitted.diverged
        if job.diverged:
            return dict.fromkeys((metric.name for metric in metrics(config)), float("nan"))
        if ema is not None:
            alphas, fallback = list(ema.last_alpha.values()), ema.fallback_fraction
        if job.arm == "replay":
            replay.add(stage.task, job.seed)
        if job.arm == "ewc":
            ewc.consolidate(losses_of_examples(stage.task, model, config.fisher, job.seed + at))
        values = [_score(config, tuner, other) for other in stages]
        rows.append((stage.name, {other.name: mean_score(v) for other, v in zip(stages, values, strict=True)}))
        seen = [rows[-1][1][other.name] for other in (stages if job.arm == "joint" else stages[: at + 1])]
        job.record({"tasks": at + 1, "seen": sum(seen) / len(seen)}, phase="after task")
        tuner.use(tuner.assignment.group if tuner.assignment is not None else 1)
    data = sum(len(stage.task.train) * bytes_per_example(stage.task) for stage in stages)
    examples = data if job.arm == "joint" else replay.nbytes
    kept = {"ewc": one + ewc.nbytes, "lwf": 2 * one}.get(job.arm, tuner.nbytes) + examples
    measured = transfer(rows, better=task(config).metric.better or "higher")
    final = sum(rows[-1][1].values()) / len(stages)
    job.record({"kept": float(kept), "final": final, "new": measured.new}, phase="end")
    found: dict[str, Value] = dict.fromkeys(metric.name for metric in metrics(config))
    found |= {"score": pooled(values, final), "kept": float(kept), "examples": float(examples)}
    found["groups"] = float(len(tuner.router.groups))
    if job.arm == "joint":
        return found
    names = ("over_steps", "new", "forgetting", "backward", "forward")
    found |= {name: getattr(measured, name) for name in names}
    median = float(torch.tensor(alphas).median()) if alphas else None
    return found | {"alpha": median, "fallback": fallback}


def _score(config: Config, tuner: ContinualTuner, stage: Stage) -> float | Tensor:
    tuner.use(stage.instructions)
    return config.score(stage.task, tuner.model)


def steps(config: Config, _: str) -> int:
    """Training steps of a job."""
    return sum(config.total_steps(stage.task) for stage in _stages(config))


EXPERIMENT = Experiment(
    slug="lcia",
    title="Dynamic EMA and instruction groups (LCIA)",
    question=(
        "A model that is tuned on one task after another forgets the earlier ones. Does an average whose weight "
        "follows gradients and distances forget less than a fixed one, and how much is due to groups of related tasks?"
    ),
    presets={
        "smoke": Config(train_examples=600, test_examples=100, epochs=10, batch_size=16),
        "laptop": Config(steps=150, batch_size=16),
        "long": Config(
            task="questions", model="HuggingFaceTB/SmolLM2-135M-Instruct", pretrained=True, rank=8, kappa=0.01,
            lr=5e-4, steps=60, batch_size=8, length=48, train_examples=300, test_examples=50, sets=tuple(SETS),
        ),
        "paper": Config(
            task="questions", model="HuggingFaceTB/SmolLM2-1.7B-Instruct", pretrained=True, rank=128, lr=2e-4, epochs=1,
            length=512, sets=tuple(SETS), mixed_precision="bf16",
        ),
    },
    arms=arms,
    claims=claims,
    metrics=metrics,
    job=job,
    task=task,
    steps=steps,
    charts=CHARTS,
    check=check,
    reading=(
        "LCIA and 'groups alone' read the task's instructions, at test time too, and the others do not. Every average "
        "is a point between keeping and learning, so look at it beside all fixed weights; none was chosen on the test "
        "split. 'Bytes kept' is what is needed from task to task: the trained parameters of every group, what EWC "
        "remembers, LwF's model before, stored examples, or for joint training all data. Replay may keep as many "
        "bytes as LCIA: what its groups take beyond the first goes to random examples of earlier tasks. While "
        "training, a dynamic average needs two more copies of the trained parameters, a fixed one needs one."
    ),
)  # fmt: skip
