"""Which cure for oscillation helps a two-bit vision transformer: the measured scale, the product, or the annealing?

Every arm starts from the same trained network, which is also its teacher, and gets the same steps: training with a
cosine schedule, then a last phase at a constant rate, in which one arm anneals. Oscillation is measured in both.
"""

import copy
import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.lab.claim import Arm, Chart, Claim, Experiment, Metric
from weightsmith.lab.data import check_data, load_images
from weightsmith.lab.images import Images
from weightsmith.lab.models import build_model, check_model
from weightsmith.lab.models.vit import ViT
from weightsmith.lab.record import Recorder, Row
from weightsmith.lab.train import Fitted, Schedule, evaluate, fit, seed_everything
from weightsmith.optim import param_groups
from weightsmith.quantize.annealing import ConfidenceGuidedAnnealing
from weightsmith.quantize.distillation import teacher_loss
from weightsmith.quantize.oscillation import Dampening, IterativeFreezing, OscillationTracker, boundary_occupancy
from weightsmith.quantize.prepare import calibrate_, prepare_ofq_


@dataclass(frozen=True, slots=True)
class Config:
    """What the OFQ experiment compares, and how."""

    data: str = "digits"
    """Data set: digits, mnist, fashion_mnist, cifar10, cifar100, imagenet, a hub id or a folder."""
    model: str = "weightsmith.experiments.ofq:small_vit"
    """Model: vit_tiny, module:function, or a Hugging Face id or folder."""
    pretrained: bool = False
    """Start from the trained weights of a Hugging Face model instead of training first."""
    train_examples: int | None = None
    """Use the first so many training rows, validation included; all by default."""
    test_examples: int | None = None
    """Use the first so many test rows; all by default."""
    weight_bits: int = 2
    """Word length of weights within blocks."""
    activation_bits: int = 2
    """Word length of activations within blocks."""
    pretrain_epochs: int = 40
    """Passes over the training data in full precision, before anything else; unused when pretrained."""
    epochs: int = 50
    """Passes with quantised weights and activations."""
    anneal_epochs: int = 10
    """Passes of the last phase."""
    batch_size: int = 64
    """Examples per step."""
    pretrain_lr: float = 1e-3
    """Learning rate of AdamW in full precision, cosine to 0."""
    lr: float = 1e-3
    """Learning rate of AdamW with quantisation, cosine to 0."""
    warmup_epochs: float = 0.0
    """Linear rise before that."""
    anneal_lr: float = 3e-4
    """Constant learning rate of the last phase."""
    weight_decay: float = 0.05
    """On matrices only."""
    augment: bool = False
    """Random crops and flips."""
    boundary: float = 0.005
    """How near to a threshold annealed weights must be, in steps between levels."""
    freeze_threshold: float = 0.02
    """Frequency to which the threshold of iterative freezing falls, from 0.1."""
    dampening: float = 0.1
    """Largest weight of the dampening penalty."""
    mixed_precision: str | None = None
    """no or bf16."""


def arms(config: Config) -> list[Arm]:
    """Full precision, rounding after training, a learnt scale with its cures, and OFQ piece by piece."""
    bits = f"W{config.weight_bits}A{config.activation_bits}"
    return [
        Arm("fp", "full precision, as many steps"),
        Arm("ptq", f"{bits} by rounding alone (StatsQ), no further training"),
        Arm("lsq", f"{bits}, learnt scales (LSQ)"),
        Arm("lsq-freezing", "the same with iterative freezing"),
        Arm("lsq-dampening", "the same with dampening"),
        Arm("statsq", f"{bits}, measured weight scales (StatsQ)"),
        Arm("statsq-qkr", "the same with the query-key product quantised (QKR)"),
        Arm("statsq-qkr-cga", "the same with annealing in the last phase (CGA): all of OFQ"),
    ]


def claims(_: Config) -> list[Claim]:
    """Each piece on its own, then all together."""
    return [
        Claim(
            "A measured weight scale is more accurate than a learnt one",
            "accuracy", "statsq", "lsq", paper="DeiT-S on ImageNet, 2 bits: +6.3 points",
        ),
        Claim("A measured scale jitters less than a learnt one", "scale_jitter", "statsq", "lsq", "lower"),
        Claim(
            "Weights under a measured scale oscillate less than under a learnt one",
            "events", "statsq", "lsq", "lower", paper="what the paper argues from",
        ),
        Claim(
            "Quantising the query-key product is more accurate than quantising both",
            "accuracy", "statsq-qkr", "statsq",
        ),
        Claim(
            "Annealing leaves fewer weights oscillating than the same steps without",
            "anneal_oscillating", "statsq-qkr-cga", "statsq-qkr", "lower",
        ),
        Claim(
            "Annealing costs less than half a point of accuracy",
            "accuracy", "statsq-qkr-cga", "statsq-qkr", margin=-0.5, paper="improves it",
        ),
        Claim(
            "All of OFQ is more accurate than learnt scales",
            "accuracy", "statsq-qkr-cga", "lsq", paper="DeiT-S on ImageNet, 2 bits: 68.00 → 75.72 %",
        ),
        Claim(
            "Iterative freezing leaves fewer weights oscillating than learnt scales alone",
            "anneal_oscillating", "lsq-freezing", "lsq", "lower", paper="arXiv 2203.11086",
        ),
    ]  # fmt: skip


METRICS = (
    Metric("accuracy", "test accuracy %", "higher", ".2f", "On the test split, at the end."),
    Metric("start_accuracy", "accuracy before %", None, ".2f", "Of the network that all arms start from."),
    Metric(
        "events", "events", "lower", ".3f", "Oscillations per weight and 100 steps, second half of quantised training."
    ),
    Metric("scale_jitter", "scale jitter", "lower", ".2e", "Mean change of a weight scale per step over its mean."),
    Metric("anneal_events", "events at the end", "lower", ".3f", "Oscillations per weight and 100 steps, last phase."),
    Metric(
        "anneal_oscillating",
        "oscillating %",
        "lower",
        ".2f",
        "Weights with a frequency above 0.005, after the last phase.",
    ),
    Metric("occupancy", "near threshold %", "lower", ".2f", "Weights within 0.005 steps of a threshold, at the end."),
)

CHARTS = (
    Chart("Validation accuracy while quantised weights train", "epoch", "validation_accuracy", phase="training"),
    Chart("Weights that oscillate", "epoch", "oscillating", phase="training", y_label="frequency above 0.005, %"),
    Chart("The same in the last phase", "epoch", "oscillating", phase="last", y_label="frequency above 0.005, %"),
    Chart("Weights near a threshold, last phase", "epoch", "occupancy", phase="last", y_label="within 0.005 steps, %"),
)


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    if config.mixed_precision == "fp16":
        raise UsageError("mixed_precision must be None, 'no' or 'bf16': the teacher's gradients are not scaled")
    if min(config.epochs, config.anneal_epochs) < 1 or (config.pretrain_epochs < 1 and not config.pretrained):
        raise UsageError("epochs, anneal_epochs and (unless pretrained) pretrain_epochs must be at least 1")
    check_model(config.model)
    check_data(config.data)


def small_vit(*, channels: int, size: int, classes: int) -> ViT:
    """A vision transformer that trains in a minute: width 32, three blocks, four heads, four by four patches."""
    return ViT(
        channels=channels, size=size, classes=classes, width=32, depth=3, patch=size // 4 if size % 4 == 0 else None
    )


class Taught(nn.Module):
    """A student whose gradients, in training, are also those of the teacher's loss; logits are the student's own.

    Args:
        student: Maps ``(B, C, H, W)`` to logits.
        teacher: Likewise; stays as it is.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module) -> None:
        super().__init__()
        self.student = student
        self._teacher = [teacher.eval().requires_grad_(False)]  # in a list: out of reach of train() and optimisers

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to logits ``(B, classes)``."""
        logits = self.student(x)
        if not self.training:
            return logits
        with torch.no_grad():
            goal = self._teacher[0].to(x.device)(x)
        return _WithLoss.apply(logits, teacher_loss(logits, goal))


class _WithLoss(torch.autograd.Function):
    """Passes its first argument on, and lets the second be minimised along with whatever is made of it."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], grads[0].new_ones(())


def job(config: Config, arm: str, seed: int, record: Recorder) -> Mapping[str, float]:
    """Train in full precision, then as the arm says."""
    data, trained, start, rows = _start(config, seed)
    for row in rows:
        record(row, phase="before")
    seed_everything(seed)
    model, teacher = copy.deepcopy(trained), copy.deepcopy(trained)
    metrics = {metric.name: math.nan for metric in METRICS} | {"start_accuracy": start}
    if arm != "fp":
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "the biases of query and key", WeightsmithWarning)  # as in the paper
            prepare_ofq_(
                model,
                weight_bits=config.weight_bits,
                activation_bits=config.activation_bits,
                weight="lsq" if arm.startswith("lsq") else "statsq",
                qk_reparam="qkr" in arm,
            )
        first, _ = data.train.__getitems__(list(range(min(config.batch_size, len(data.train)))))
        calibrate_(model.to(first.device), first)
    if arm != "ptq":
        metrics |= _train(config, arm, data, Taught(model, teacher) if arm != "fp" else model, seed, record)
    return metrics | {"accuracy": 100 * evaluate(model, data.test)["accuracy"]}


@lru_cache(maxsize=2)  # the arms of a seed that fall to one process share what they start from
def _start(config: Config, seed: int) -> tuple[Images, nn.Module, float, list[Row]]:
    """The data, the trained network that all arms of a seed begin with, its test accuracy, and how it was trained."""
    seed_everything(seed)
    data = load_images(
        config.data, train_examples=config.train_examples, test_examples=config.test_examples, augment=config.augment
    )
    rows: list[Row] = []
    shape = {"channels": data.channels, "size": data.size, "classes": data.classes}
    model = build_model(config.model, **shape, pretrained=config.pretrained)
    if not config.pretrained:
        optimizer = torch.optim.AdamW(param_groups(model, config.weight_decay), lr=config.pretrain_lr)
        _fit(config, data, model, optimizer, config.pretrain_epochs, seed, rows.append)
    return data, model, 100 * evaluate(model, data.test)["accuracy"], rows


def _train(
    config: Config, arm: str, data: Images, model: nn.Module, seed: int, record: Recorder
) -> Mapping[str, float]:
    optimizer = torch.optim.AdamW(param_groups(model, config.weight_decay), lr=config.lr)
    batch = min(config.batch_size, len(data.train))
    steps = config.epochs * (len(data.train) // batch)
    tracker = OscillationTracker(model) if arm != "fp" else None
    damp = Dampening(model, steps, weight=config.dampening) if arm == "lsq-dampening" else None
    if tracker is not None:
        tracker.attach(optimizer)
    if arm == "lsq-freezing":
        freezing = IterativeFreezing(model, steps, threshold=(0.1, config.freeze_threshold))
        optimizer.register_step_pre_hook(lambda *_: freezing.step())
    epochs = 0

    def penalise() -> None:
        if damp is not None:
            damp().backward()
            damp.step()

    def look(_: nn.Module) -> dict[str, float]:
        nonlocal epochs
        epochs += 1
        if tracker is None:
            return {}
        seen = tracker.report()
        if epochs == config.epochs // 2:
            tracker.reset()
        return {"oscillating": seen["oscillating"], "occupancy": boundary_occupancy(model)}

    options: dict[str, Any] = {"before_step": penalise, "after_epoch": look}
    fitted = _fit(
        config, data, model, optimizer, config.epochs, seed, lambda row: record(row, phase="training"), **options,
        warmup_epochs=config.warmup_epochs,
    )  # fmt: skip
    if fitted.diverged:
        return {"accuracy": math.nan}
    found = tracker.report() if tracker is not None else {}
    if tracker is not None:
        tracker.reset()
    if arm.endswith("cga"):
        ConfidenceGuidedAnnealing(model, config.boundary).attach(optimizer)
    for group in optimizer.param_groups:
        group["lr"] = config.anneal_lr
    _fit(
        config, data, model, optimizer, config.anneal_epochs, seed + 2**31, lambda row: record(row, phase="last"),
        **options, schedule="constant",
    )  # fmt: skip
    if tracker is None:
        return {}
    last = tracker.report()
    return {
        "events": found["events"],
        "scale_jitter": found["scale_jitter"],
        "anneal_events": last["events"],
        "anneal_oscillating": last["oscillating"],
        "occupancy": boundary_occupancy(model),
    }


def _fit(
    config: Config,
    data: Images,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    seed: int,
    record: Any,
    *,
    schedule: Schedule = "cosine",
    **options: Any,
) -> Fitted:
    return fit(
        model,
        optimizer,
        data,
        epochs=epochs,
        batch_size=config.batch_size,
        seed=seed,
        schedule=schedule,
        mixed_precision=config.mixed_precision,
        record=record,
        **options,
    )


EXPERIMENT = Experiment(
    slug="ofq",
    title="Oscillation-free quantisation, piece by piece",
    question=(
        "Weights that train with two bits keep crossing rounding thresholds. Do a measured scale, a quantised "
        "query-key product and a last phase of annealing calm them, and is the network better for it?"
    ),
    presets={
        "smoke": Config(train_examples=300, pretrain_epochs=2, epochs=2, anneal_epochs=1),
        "laptop": Config(),
        "paper": Config(
            data="imagenet",
            model="facebook/deit-small-distilled-patch16-224",
            pretrained=True,
            epochs=300,
            anneal_epochs=30,
            batch_size=560,
            lr=5.47e-4,
            warmup_epochs=5,
            anneal_lr=1e-5,
            augment=True,
            freeze_threshold=0.011,
        ),
    },
    arms=arms,
    claims=claims,
    metrics=METRICS,
    charts=CHARTS,
    job=job,
    check=check,
    reading=(
        "Accuracy on a small data set moves by a point from seed to seed, so read its claims with their intervals. An "
        "event is a change of a code against the direction of its last change. A measured scale moves less than a "
        "learnt one, but its levels leave no room at zero, where most weights are: fewer flips do not follow. The last "
        "phase has a constant rate that is high enough for weights to leave the annealing range within it; with the "
        "paper's 1e-5 that takes thirty times as many steps. Baselines are run with one setting each, not tuned."
    ),
)
