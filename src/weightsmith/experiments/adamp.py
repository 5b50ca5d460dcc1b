"""Do AdamP and SGDP keep weight norms from growing, and are the models better for it?

Two measurements per job: the norm of the kernels at one reference learning rate, and the score at the rate that the
validation split prefers. Beside them a problem in two dimensions whose loss depends on the direction of ``w`` alone,
where the mechanism is visible to the eye; it needs neither data nor a model, and is no claim.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.experiments import plane
from weightsmith.experiments.matrices import MatricesAndRest
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric, Value
from weightsmith.lab.job import Job
from weightsmith.lab.sweep import chosen_rate, tune
from weightsmith.lab.tasks import TrainConfig, shared_task
from weightsmith.lab.train import Fitted, Hook
from weightsmith.optim import SGDP, AdamP


@dataclass(frozen=True, slots=True)
class Config(TrainConfig):
    """What the AdamP experiment compares, and how."""

    epochs: float = 8
    """Passes over the training data."""
    sgd_lrs: tuple[float, ...] = (0.1, 0.3, 0.03)
    """Learning rates that SGD and SGDP are tried at; norms are compared at the first."""
    adam_lrs: tuple[float, ...] = (0.003, 0.01, 0.001)
    """Learning rates that AdamW, AdamP and Muon are tried at; norms are compared at the first."""
    more_lrs: int = 1
    """Further learning rates, around or beyond the best one, for every arm."""
    sgd_weight_decay: float = 5e-4
    """Weight decay of the SGD arms that have one."""
    adam_weight_decay: float = 1e-2
    """Weight decay of the Adam arms that have one."""
    momentum: float = 0.9
    """Momentum of the SGD arms, with Nesterov's look-ahead."""
    delta: float = 0.1
    """Threshold of the scale-invariance test."""
    wd_ratio: float = 0.1
    """Share of the decay that scale-invariant weights keep."""
    without_decay: bool = False
    """Also compare every optimizer without weight decay, where the paper's small contrast is strongest."""

    def rates(self, arm: str) -> tuple[float, ...]:
        """The learning rates of an arm."""
        return self.sgd_lrs if arm.startswith("sgd") else self.adam_lrs


_TITLES = {"sgd": "SGD", "sgdp": "SGDP", "adamw": "AdamW", "adamp": "AdamP"}


def arms(config: Config) -> list[Arm]:
    """Four optimizers, with and without weight decay, and what people would use today."""
    found = [Arm(name, "with weight decay", title) for name, title in _TITLES.items()]
    found.append(Arm("muon", "Muon (torch) on matrices, AdamW on the rest", "Muon"))
    if config.without_decay:
        found += [Arm(f"{name}-wd0", "without weight decay", f"{title}, no decay") for name, title in _TITLES.items()]
    return found


def claims(config: Config) -> list[Claim]:
    """Better, each at its own best rate; and the growth of the norm at least halved."""
    scores = [
        ("adamp", "adamw", "ImageNet top-1: ResNet-18 70.41 → 70.81, ResNet-50 76.65 → 76.94", 0.40),
        ("sgdp", "sgd", "ImageNet top-1: ResNet-18 70.28 → 70.73, ResNet-50 76.64 → 76.71", 0.45),
    ]
    found = [
        Claim(
            text=f"{_TITLES[winner]} beats {_TITLES[loser]}, each at its best learning rate",
            metric="score", winner=winner, loser=loser, primary=True, worth=config.least,
            paper=paper, paper_gain=config.paper_gain(gain),
        )
        for winner, loser, paper, gain in scores
    ]  # fmt: skip
    small = "-wd0" if config.without_decay else ""
    found += [
        Claim(
            text=f"{_TITLES[winner]} at least halves the growth of the weight norm",
            metric="norm_growth", winner=winner + small, loser=loser + small, margin=0.5, relative=True,
            paper="in the plane: norm 1 → 2.93 with momentum 0.9, 1 → 27.87 with 0.99",
        )
        for winner, loser in (("sgdp", "sgd"), ("adamp", "adamw"))
    ]  # fmt: skip
    if config.without_decay:
        found.append(
            Claim(
                text="Without weight decay SGDP beats SGD",
                metric="score", winner="sgdp-wd0", loser="sgd-wd0", worth=config.least,
                paper="ImageNet top-1: ResNet-18 67.94 → 70.21", paper_gain=config.paper_gain(2.27),
            )
        )  # fmt: skip
    return found


def metrics(config: Config) -> list[Metric]:
    """The score, and what the mechanism is about."""
    return [
        config.score_metric(),
        chosen_rate(arms(config)),
        Metric("norm_start", "norm at start", None, ".2f", help="Mean L2 norm of the kernels before training."),
        Metric("norm_growth", "norm growth", "lower", ".3f", help="How much that norm grew at the reference rate."),
        Metric("projected", "projected %", None, ".0f", help="Share of tensors projected at the last step."),
        Metric("plane_norm", "plane: norm", "lower", ".2f", help="Final norm in two dimensions; it starts at 1."),
        Metric("plane_steps", "plane: steps", "lower", ".0f", help=f"Steps until the cosine exceeds {plane.ALIGNED}."),
    ]


CHARTS = (
    Chart(title="Mean norm of the kernels", x="epoch", y="norm", phase="reference", y_label="mean norm"),
    Chart(
        title="Effective step size", x="epoch", y="effective_step", phase="reference", y_label="effective step",
        log_y=True,
    ),
    Chart(title="Validation loss", x="epoch", y="validation_loss", phase="reference", y_label="validation loss"),
    Chart(
        title="Validation score against the learning rate", x="rate", y="score", kind="scatter", phase="sweep",
        x_label="learning rate", y_label="validation score", log_x=True,
    ),
    Chart(title="The plane problem: norm", x="step", y="norm", phase="plane", y_label="norm of w", log_y=True),
    Chart(title="The plane problem: cosine to the optimum", x="step", y="cosine", phase="plane", y_label="cosine"),
)  # fmt: skip


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    config.check()
    for name in ("sgd_lrs", "adam_lrs"):
        if not getattr(config, name) or min(getattr(config, name)) <= 0:
            raise UsageError(f"{name} must hold learning rates above 0, got {getattr(config, name)}")


def job(config: Config, job: Job) -> Mapping[str, Value]:
    """Train one arm with one seed at every rate of its sweep, and solve the plane problem."""
    task = shared_task(config)
    reference = config.rates(job.arm)[0]
    measured: dict[str, float] = {}

    def train(lr: float, folder: Path) -> Fitted:
        model = config.network(task, job.seed)
        kernels = _kernels(model)
        start = _mean_norm(kernels)
        optimizer = _optimizer(config, job.arm, list(model.parameters()), lr)
        look = Hook(
            after_row=lambda _: {
                "norm": _mean_norm(kernels),
                "effective_step": _step(kernels, lr, job.arm),
                "projected": _projected(optimizer),
            }
        )
        phase = "reference" if lr == reference else "other rates"
        record = partial(job.record, phase=phase, rate=lr)
        fitted = config.fit(model, optimizer, task, job.seed, hooks=[look], record=record, folder=folder)
        if lr == reference:
            # from the rows: an optimizer that a resumed run has read back has not made a step
            projected = [row["projected"] for row in fitted.rows if "projected" in row]
            measured.update(
                norm_start=start,
                norm_growth=_mean_norm(kernels) - start,
                projected=projected[-1] if projected else math.nan,
            )
        return fitted

    tuned = tune(config, task, job, config.rates(job.arm), train, more=config.more_lrs)
    return {
        "score": tuned.score,
        "best_lr": tuned.value,
        **measured,
        **plane.solve(partial(_optimizer, config, job.arm), job),
    }


def _optimizer(config: Config, arm: str, params: list[Tensor], lr: float) -> torch.optim.Optimizer:
    name, _, without = arm.partition("-")
    decay = {"sgd": config.sgd_weight_decay}.get(name[:3], config.adam_weight_decay) * (not without)
    projection: dict[str, Any] = {"delta": config.delta, "wd_ratio": config.wd_ratio}
    momentum = {"momentum": config.momentum, "nesterov": config.momentum > 0}
    sgd: dict[str, Any] = {"lr": lr, "weight_decay": decay, **momentum}
    if name == "sgd":
        return torch.optim.SGD(params, **sgd)
    if name == "sgdp":
        return SGDP(params, **sgd, **projection)
    if name == "adamw":
        return torch.optim.AdamW(params, lr=lr, weight_decay=decay)
    if name == "muon":
        return MatricesAndRest(params, lr=lr, weight_decay=decay)
    return AdamP(params, lr=lr, weight_decay=decay, **projection)


def _kernels(model: nn.Module) -> list[Tensor]:
    """The weights that normalization usually follows: convolutions where there are any, else every matrix."""
    convolutions = [
        module.weight for module in model.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    return convolutions or [parameter for parameter in model.parameters() if parameter.dim() >= 2]


def _mean_norm(kernels: list[Tensor]) -> float:
    return torch.stack([kernel.detach().norm() for kernel in kernels]).mean().item()


def _step(kernels: list[Tensor], lr: float, arm: str) -> float:
    # section 2 of the paper: the step on the unit sphere is lr / |w|^2 for gradient descent; Adam's update does not
    # scale with the gradient, which falls as 1 / |w|, so one power is left
    power = 2 if arm.startswith("sgd") else 1
    return torch.stack([lr / kernel.detach().norm() ** power for kernel in kernels]).mean().item()


def _projected(optimizer: torch.optim.Optimizer) -> float:
    if not isinstance(optimizer, SGDP | AdamP):
        return 0.0
    stats = optimizer.projection_stats()
    fired = sum(group.channel + group.layer for group in stats)
    return 100 * fired / max(1, fired + sum(group.none for group in stats))


def steps(config: Config, _: str) -> int:
    """Training steps of a job."""
    return (len(config.sgd_lrs) + config.more_lrs) * config.total_steps(shared_task(config))


EXPERIMENT = Experiment(
    slug="adamp",
    title="AdamP and SGDP against AdamW and SGD",
    question=(
        "Weights in front of a normalization layer do not change the loss when they grow, but their steps get smaller. "
        "Do the projected optimizers stop that growth, and are the models better for it?"
    ),
    presets={
        "smoke": Config(train_examples=400, epochs=2, sgd_lrs=(0.1,), adam_lrs=(0.003,), more_lrs=0),
        "laptop": Config(),
        "paper": Config(
            data="imagenet", model="resnet18", epochs=100, batch_size=256, augment=True, sgd_weight_decay=1e-4,
            mixed_precision="bf16", without_decay=True,
        ),
    },
    arms=arms,
    claims=claims,
    metrics=metrics,
    charts=CHARTS,
    job=job,
    task=shared_task,
    steps=steps,
    check=check,
    reading=(
        "The norm is measured at one reference learning rate per family, the score at the rate that each arm's "
        "validation score prefers, seed by seed; every arm gets the same number of rates. A smaller norm means a "
        "larger effective step late in training, so an arm without projection can make up for it with another rate or "
        "with weight decay: a gain in accuracy is not to be expected on every model. The share of projected tensors "
        "tells whether the method does anything on this model at all: without normalization layers it fires by chance."
    ),
)  # fmt: skip
