"""Which cure for oscillation helps a two-bit transformer: the measured scale, the product, or the annealing?

Every arm starts from the same trained network, which is also its teacher, and gets the same steps: training with a
cosine schedule, then a last phase at a constant rate, in which one arm anneals. Oscillation is measured in both.
"""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from weightsmith.core.device import default_device
from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.experiments.teaching import taught
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric, Value
from weightsmith.lab.job import Job
from weightsmith.lab.models.vit import ViT
from weightsmith.lab.probe import fastest_loss, first_batch
from weightsmith.lab.task import Batch, Task
from weightsmith.lab.tasks import TrainConfig, shared_task
from weightsmith.lab.train import Hook
from weightsmith.optim import param_groups
from weightsmith.quantize.in_training.annealing import ConfidenceGuidedAnnealing
from weightsmith.quantize.in_training.cures import Dampening, IterativeFreezing
from weightsmith.quantize.in_training.oscillation import OscillationTracker, boundary_occupancy
from weightsmith.quantize.in_training.prepare import calibrate_, prepare_ofq_


@dataclass(frozen=True, slots=True)
class Config(TrainConfig):
    """What the OFQ experiment compares, and how."""

    DEFAULT_MODELS: ClassVar[Mapping[str, str]] = {
        **TrainConfig.DEFAULT_MODELS,
        "images": "weightsmith.experiments.ofq:small_vit",
        "sentences": "transformer",
    }

    weight_bits: int = 2
    """Bit width of weights within blocks."""
    activation_bits: int = 2
    """Bit width of activations within blocks."""
    pretrain_epochs: float = 40
    """Passes over the training data in full precision, before anything else; unused when pretrained."""
    epochs: float = 30
    """Passes with quantized weights and activations."""
    anneal_epochs: float = 10
    """Passes of the last phase."""
    pretrain_lr: float = 1e-3
    """Learning rate of AdamW in full precision, cosine to 0."""
    lr: float = 1e-3
    """Learning rate of AdamW with quantization, cosine to 0."""
    warmup_epochs: float = 0.0
    """Linear rise before that."""
    anneal_lr: float = 3e-4
    """Constant learning rate of the last phase."""
    weight_decay: float = 0.05
    """On matrices only."""
    boundary: float = 0.005
    """How near to a threshold annealed weights must be, in steps between levels."""
    freeze_threshold: float = 0.02
    """Frequency to which the threshold of iterative freezing falls, from 0.1."""
    dampening: float = 0.1
    """Largest weight of the dampening penalty."""


def arms(config: Config) -> list[Arm]:
    """Full precision, rounding after training, a learned scale with its cures, and OFQ piece by piece."""
    bits = f"W{config.weight_bits}A{config.activation_bits}"
    return [
        Arm("fp", "full precision, the same number of steps", "full precision"),
        Arm("ptq", f"{bits} by rounding alone, no further training", "rounding alone"),
        Arm("lsq", f"{bits}, learned scales", "LSQ"),
        Arm("lsq-freezing", f"{bits}, learned scales with iterative freezing", "LSQ, freezing"),
        Arm("lsq-dampening", f"{bits}, learned scales with dampening", "LSQ, dampening"),
        Arm("statsq", f"{bits}, measured weight scales", "StatsQ"),
        Arm("statsq-qkr", f"{bits}, StatsQ with the query-key product quantized", "StatsQ + QKR"),
        Arm("statsq-qkr-cga", f"{bits}, StatsQ and QKR with annealing in the last phase", "OFQ"),
    ]


def claims(config: Config) -> list[Claim]:
    """All together, then each piece on its own."""
    return [
        Claim(
            text="OFQ beats learned scales (LSQ)",
            metric="score", winner="statsq-qkr-cga", loser="lsq", primary=True, worth=config.least,
            paper="DeiT-S on ImageNet, 2 bits: 68.00 → 75.72 %", paper_gain=config.paper_gain(7.72),
        ),
        Claim(
            text="Annealing leaves fewer weights oscillating than the same steps without",
            metric="anneal_oscillating", winner="statsq-qkr-cga", loser="statsq-qkr", primary=True,
        ),
        Claim(
            text="A measured weight scale beats a learned one",
            metric="score", winner="statsq", loser="lsq", worth=config.least,
            paper="DeiT-S on ImageNet, 2 bits: +6.3 points", paper_gain=config.paper_gain(6.3),
        ),
        Claim(
            text="Weights under a measured scale oscillate less than under a learned one",
            metric="events", winner="statsq", loser="lsq", paper="what the paper argues from",
        ),
        Claim(
            text="Quantizing the query-key product beats quantizing both",
            metric="score", winner="statsq-qkr", loser="statsq", worth=config.least,
        ),
        Claim(
            text="Annealing costs less than what is worth having",
            metric="score", winner="statsq-qkr-cga", loser="statsq-qkr", margin=-config.least, paper="improves it",
        ),
        Claim(
            text="Iterative freezing leaves fewer weights oscillating than learned scales alone",
            metric="anneal_oscillating", winner="lsq-freezing", loser="lsq", paper="arXiv 2203.11086",
        ),
    ]  # fmt: skip


def metrics(config: Config) -> list[Metric]:
    """The score, and how much the weights oscillate."""
    score = config.score_metric()
    return [
        score,
        Metric(
            "start_score", f"{score.label}, before", None, score.format, help="Of the network that arms start from."
        ),
        Metric("events", "events", "lower", ".3f", help="Oscillations per weight and 100 steps, second half."),
        Metric("scale_jitter", "scale jitter", "lower", ".2e", help="Mean change of a scale per step over its mean."),
        Metric("anneal_events", "events at the end", "lower", ".3f", help="The same as events, last phase."),
        Metric(
            "anneal_oscillating", "oscillating %", "lower", ".2f", help="Weights above 0.005, after the last phase."
        ),
        Metric("occupancy", "near threshold %", "lower", ".2f", help="Weights within 0.005 steps of a threshold."),
    ]


CHARTS = (
    Chart(title="Validation loss while quantized weights train", x="epoch", y="validation_loss", phase="training"),
    Chart(title="Weights that oscillate, %", x="epoch", y="oscillating", phase="training"),
    Chart(title="Weights that oscillate in the last phase, %", x="epoch", y="oscillating", phase="last"),
    Chart(title="Weights near a threshold in the last phase, %", x="epoch", y="occupancy", phase="last"),
)


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    config.check("anneal_epochs", "pretrain_epochs")
    if config.mixed_precision == "fp16":
        raise UsageError("mixed_precision must be None, 'no' or 'bf16': the penalty's gradients are not scaled")


def small_vit(*, channels: int, size: int, classes: int) -> ViT:
    """A vision transformer that trains in a minute: width 32, three blocks, four heads, four by four patches."""
    return ViT(
        channels=channels, size=size, classes=classes, width=32, depth=3, patch=size // 4 if size % 4 == 0 else None
    )


def start(config: Config, seed: int, folder: Path) -> dict[str, Any]:
    """The trained network that all arms of a seed begin with, its score, and how it was trained."""
    task = shared_task(config)
    model = config.network(task, seed)
    rows: Sequence[Mapping[str, float]] = ()
    if not (config.pretrained or config.checkpoint):
        optimizer = torch.optim.AdamW(param_groups(model, config.weight_decay), lr=config.pretrain_lr)
        rows = config.fit(model, optimizer, task, seed, epochs=config.pretrain_epochs, folder=folder).rows
    return {"weights": model.state_dict(), "score": config.score(task, model), "rows": list(rows)}


def job(config: Config, job: Job) -> Mapping[str, Value]:
    """Quantize the trained network as the arm says, and train on."""
    task = shared_task(config)
    for row in job.start["rows"]:
        job.record(row, phase="before")
    model, teacher = config.network(task, job.seed), config.network(task, job.seed)
    for network in (model, teacher):
        network.load_state_dict(job.start["weights"])
    if job.arm != "fp":
        _prepare_(model.to(job.device), config, job.arm, task.example().to(job.device))
    measured: Mapping[str, Value] = {}
    if job.arm != "ptq":
        measured = _train(config, job, task, model, teacher.to(job.device).eval().requires_grad_(False))
    names = (metric.name for metric in metrics(config))
    start_score = float(torch.as_tensor(job.start["score"]).double().mean())
    return {**dict.fromkeys(names), **measured, "score": config.score(task, model), "start_score": start_score}


def _prepare_(model: nn.Module, config: Config, arm: str, batch: Batch) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeightsmithWarning)  # biases of query and key are dropped, as in the paper
        prepare_ofq_(
            model,
            weight_bits=config.weight_bits,
            activation_bits=config.activation_bits,
            weight="lsq" if arm.startswith("lsq") else "statsq",
            qk_reparam="auto" if "qkr" in arm else False,
        )
        calibrate_(model, batch.inputs)


def _train(config: Config, job: Job, task: Task, model: nn.Module, teacher: nn.Module) -> Mapping[str, Value]:
    optimizer = torch.optim.AdamW(param_groups(model, config.weight_decay), lr=config.lr)
    steps = config.total_steps(task)
    tracker = OscillationTracker(model) if job.arm != "fp" else None
    hooks = []
    if tracker is not None:
        tracker.attach(optimizer)
        hooks.append(Hook(after_row=_looking(tracker, optimizer, steps // 2), state=tracker))
    if job.arm == "lsq-freezing":
        freezing = IterativeFreezing(model, steps, threshold=(0.1, config.freeze_threshold))
        hooks.append(Hook(before_step=freezing.step, state=freezing))
    if job.arm == "lsq-dampening":
        damp = Dampening(model, steps, weight=config.dampening)
        hooks.append(Hook(penalty=damp, before_step=damp.step, state=damp))
    with taught(model, teacher, task) as loss:
        fit = partial(config.fit, model, optimizer, task, loss=loss if tracker is not None else None, hooks=hooks)
        fitted = fit(
            seed=job.seed, warmup=config.warmup_epochs, record=partial(job.record, phase="training"),
            folder=job.folder / "training",
        )  # fmt: skip
        if fitted.diverged:
            job.diverged = True
            return {}
        found = tracker.report() if tracker is not None else {}
        if tracker is not None:
            tracker.reset()
        if job.arm.endswith("cga"):
            ConfidenceGuidedAnnealing(model, config.boundary).attach(optimizer)
        for group in optimizer.param_groups:
            group["lr"] = config.anneal_lr
        last = fit(
            seed=job.seed + 2**31, epochs=config.anneal_epochs, schedule="constant",
            record=partial(job.record, phase="last"), folder=job.folder / "last",
        )  # fmt: skip
    job.diverged = last.diverged
    if tracker is None:
        return {}
    ended = tracker.report()
    return {
        "events": found["events"],
        "scale_jitter": found["scale_jitter"],
        "anneal_events": ended["events"],
        "anneal_oscillating": ended["oscillating"],
        "occupancy": boundary_occupancy(model),
    }


def _looking(tracker: OscillationTracker, optimizer: torch.optim.Optimizer, half: int) -> Any:
    """Report what oscillates with every row, and restart counting at half of the steps."""

    def look(model: nn.Module) -> dict[str, float]:
        seen = tracker.report()
        taken = int(next(iter(optimizer.state.values()))["step"])
        if taken >= half and tracker.steps == taken:  # it has never been reset
            tracker.reset()
        return {"oscillating": seen["oscillating"], "occupancy": boundary_occupancy(model)}

    return look


def steps(config: Config, arm: str) -> int:
    """Training steps of a job; the start that arms share is counted once, with the first."""
    each = config.total_steps(shared_task(config)) / config.epochs
    epochs = 0.0 if arm == "ptq" else config.epochs + config.anneal_epochs
    if arm == arms(config)[0].name and not (config.pretrained or config.checkpoint):
        epochs += config.pretrain_epochs
    return math.ceil(each * epochs)


def step_seconds(config: Config) -> float:
    """Time a step of a quantized network that learns from its teacher."""
    task, device = shared_task(config), torch.device(default_device())
    model, teacher = (config.network(task, 0).to(device) for _ in range(2))
    _prepare_(model, config, "statsq-qkr", task.example().to(device))
    batch = first_batch(task, config.batch_size, model)
    with taught(model, teacher.eval().requires_grad_(False), task) as loss:
        return fastest_loss(lambda: loss(model, batch))


EXPERIMENT = Experiment(
    slug="ofq",
    title="Oscillation-free quantization, piece by piece",
    question=(
        "Weights that train with two bits keep crossing rounding thresholds. Do a measured scale, a quantized "
        "query-key product and a last phase of annealing calm them, and is the network better for it?"
    ),
    presets={
        "smoke": Config(train_examples=300, pretrain_epochs=2, epochs=2, anneal_epochs=1),
        "laptop": Config(),
        "paper": Config(
            data="imagenet", model="facebook/deit-small-distilled-patch16-224", pretrained=True, epochs=300,
            anneal_epochs=30, batch_size=560, lr=5.47e-4, warmup_epochs=5, anneal_lr=1e-5, augment=True,
        ),
    },
    arms=arms,
    claims=claims,
    metrics=metrics,
    charts=CHARTS,
    start=start,
    job=job,
    task=shared_task,
    steps=steps,
    step_seconds=step_seconds,
    check=check,
    reading=(
        "All arms of a seed start from the same network and see the same batches. An event is a change of a code "
        "against the direction of its last change. A measured scale moves less than a learned one, but its levels "
        "leave no room at zero, where most weights are: fewer events do not follow. The last phase has a "
        "constant rate that is high enough for weights to leave the annealing range within it; with the paper's 1e-5 "
        "that takes thirty times as many steps. Baselines are run with one setting each, not tuned."
    ),
)  # fmt: skip
