"""Do AdamP and SGDP keep weight norms from growing, and does that help?

Two measurements per job. A problem in two dimensions whose loss depends on the direction of ``w`` alone, where the
mechanism is visible to the eye; and a network on real images, trained at every learning rate of a sweep. The norm is
compared at one reference learning rate, the accuracy at the rate that the validation split prefers.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.experiments._images import ImageTask
from weightsmith.lab.claim import Arm, Chart, Claim, Experiment, Metric
from weightsmith.lab.images import Images
from weightsmith.lab.record import Recorder
from weightsmith.lab.sweep import best_of
from weightsmith.lab.train import evaluate, fit
from weightsmith.optim import SGDP, AdamP

_TOY_STEPS = 400
_TOY_LR = 0.1
_ALIGNED = 0.999


@dataclass(frozen=True, slots=True)
class Config(ImageTask):
    """What the AdamP experiment compares, and how."""

    sgd_lrs: tuple[float, ...] = (0.01, 0.03, 0.1, 0.3)
    """Learning rates that SGD and SGDP are tried at."""
    adam_lrs: tuple[float, ...] = (0.001, 0.003, 0.01, 0.03)
    """Learning rates that AdamW and AdamP are tried at."""
    sgd_reference_lr: float = 0.1
    """The one of sgd_lrs at which norms are compared."""
    adam_reference_lr: float = 0.001
    """The one of adam_lrs at which norms are compared."""
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
    without_decay: bool = True
    """Also compare every optimiser without weight decay, where the paper's small contrast is strongest."""


def arms(config: Config) -> list[Arm]:
    """Four optimisers, with and without weight decay."""
    names = {"sgd": "SGD", "sgdp": "SGDP", "adamw": "AdamW", "adamp": "AdamP"}
    with_decay = [Arm(name, f"{title}, with weight decay") for name, title in names.items()]
    without = [Arm(f"{name}-wd0", f"{title}, without weight decay") for name, title in names.items()]
    return with_decay + (without if config.without_decay else [])


def claims(config: Config) -> list[Claim]:
    """Norm growth at least halved; accuracy better; the plane problem solved in fewer steps."""
    small = "-wd0" if config.without_decay else ""
    found = [
        Claim(
            "SGDP at least halves the growth of the weight norm",
            "norm_growth", f"sgdp{small}", f"sgd{small}", "lower", 0.5, relative=True,
            paper="2-D problem: norm 1 → 2.93 with momentum 0.9, 1 → 27.87 with 0.99",
        ),
        Claim(
            "AdamP at least halves the growth of the weight norm",
            "norm_growth", f"adamp{small}", f"adamw{small}", "lower", 0.5, relative=True,
        ),
        Claim(
            "SGDP reaches the optimum of the plane problem in fewer steps",
            "plane_steps", "sgdp", "sgd", "lower",
        ),
        Claim(
            "SGDP is more accurate than SGD, each at its best rate",
            "accuracy", "sgdp", "sgd", paper="ImageNet top-1: ResNet-18 70.28 → 70.73, ResNet-50 76.64 → 76.71",
        ),
        Claim(
            "AdamP is more accurate than AdamW, each at its best rate",
            "accuracy", "adamp", "adamw", paper="ImageNet top-1: ResNet-18 70.41 → 70.81, ResNet-50 76.65 → 76.94",
        ),
    ]  # fmt: skip
    if config.without_decay:
        found.append(
            Claim(
                "Without weight decay SGDP is more accurate than SGD",
                "accuracy", "sgdp-wd0", "sgd-wd0", paper="ImageNet top-1: ResNet-18 67.94 → 70.21",
            )
        )  # fmt: skip
    return found


METRICS = (
    Metric("accuracy", "test accuracy %", "higher", ".2f", "On the test split, at the rate chosen on validation."),
    Metric("best_lr", "chosen rate", None, ".3g", "Learning rate with the best validation accuracy."),
    Metric("norm_start", "norm at start", None, ".2f", "Mean L2 norm of the kernels before training."),
    Metric("norm_growth", "norm growth", "lower", ".3f", "How much that norm grew at the reference rate."),
    Metric("projected", "projected %", None, ".0f", "Share of tensors projected at the last step, reference rate."),
    Metric("plane_norm", "plane: norm", "lower", ".2f", "Final norm in the two-dimensional problem; it starts at 1."),
    Metric("plane_steps", "plane: steps", "lower", ".0f", f"Steps until the cosine first exceeds {_ALIGNED}."),
)

CHARTS = (
    Chart("How the norm of the kernels grows", "epoch", "norm", phase="reference", y_label="mean norm"),
    Chart(
        "What is left of the step size",
        "epoch",
        "effective_step",
        phase="reference",
        y_label="effective step",
        log_y=True,
    ),
    Chart("Validation accuracy", "epoch", "validation_accuracy", phase="reference", y_label="validation accuracy"),
    Chart(
        "Accuracy against the effective step size, one dot per rate and seed",
        "effective_step",
        "validation_accuracy",
        "scatter",
        phase="sweep",
        x_label="effective step after training at constant rate",
        y_label="validation accuracy",
        log_x=True,
    ),
    Chart("The plane problem: norm", "step", "norm", phase="plane", y_label="norm of w", log_y=True),
    Chart("The plane problem: cosine to the optimum", "step", "cosine", phase="plane", y_label="cosine"),
)


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    for family in ("sgd", "adam"):
        rates, reference = getattr(config, f"{family}_lrs"), getattr(config, f"{family}_reference_lr")
        if reference not in rates:
            raise UsageError(f"{family}_reference_lr must be one of {family}_lrs {rates}, got {reference}")
    config.check()


def job(config: Config, arm: str, seed: int, record: Recorder) -> Mapping[str, float]:
    """Train one arm with one seed at every rate of its sweep, and solve the plane problem."""
    name, _, suffix = arm.partition("-")
    optimizer = partial(_optimizer, config, name, decay=not suffix)
    plane_norm, plane_steps = _plane(optimizer, seed, record)

    data = config.images()
    family = "sgd" if name.startswith("sgd") else "adam"
    reference: dict[str, float] = {}

    def attempt(lr: float) -> tuple[float, nn.Module]:
        is_reference = lr == getattr(config, f"{family}_reference_lr")
        score, model, numbers = _train(config, data, optimizer, family, lr, seed, record, is_reference)
        if is_reference:
            reference.update(numbers)
        return score, model

    best_lr, model = best_of(getattr(config, f"{family}_lrs"), attempt)
    return {
        "accuracy": 100 * evaluate(model, data.test)["accuracy"],
        "best_lr": best_lr,
        "plane_norm": plane_norm,
        "plane_steps": plane_steps,
        **reference,
    }


MakeOptimizer = Callable[[list[Tensor], float], torch.optim.Optimizer]


def _train(
    config: Config,
    data: Images,
    optimizer: MakeOptimizer,
    family: str,
    lr: float,
    seed: int,
    record: Recorder,
    is_reference: bool,
) -> tuple[float, nn.Module, dict[str, float]]:
    model = config.network(data, seed)
    kernels = _kernels(model)
    start = _mean_norm(kernels)
    opt = optimizer(list(model.parameters()), lr)
    rows: list[Mapping[str, float]] = []

    def numbers(_: nn.Module) -> dict[str, float]:
        return {"norm": _mean_norm(kernels), "effective_step": _effective_step(kernels, lr, family)}

    def keep(row: Mapping[str, float]) -> None:
        rows.append(row)
        record(row, phase="reference" if is_reference else "other rates", rate=lr)

    fitted = fit(
        model,
        opt,
        data,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=seed,
        schedule=config.schedule,
        mixed_precision=config.mixed_precision,
        after_epoch=numbers,
        record=keep,
    )
    score = math.nan if fitted.diverged else evaluate(model, data.validation)["accuracy"]
    record({"rate": lr, "validation_accuracy": score, **numbers(model)}, phase="sweep")
    results = {"norm_start": start, "norm_growth": _mean_norm(kernels) - start, "projected": _projected(opt)}
    return score, fitted.model, results


def _optimizer(config: Config, name: str, params: list[Tensor], lr: float, *, decay: bool) -> torch.optim.Optimizer:
    sgd: dict[str, Any] = {"lr": lr, "momentum": config.momentum, "nesterov": config.momentum > 0}
    sgd["weight_decay"] = config.sgd_weight_decay if decay else 0.0
    adam: dict[str, Any] = {"lr": lr, "weight_decay": config.adam_weight_decay if decay else 0.0}
    projection: dict[str, Any] = {"delta": config.delta, "wd_ratio": config.wd_ratio}
    if name == "sgd":
        return torch.optim.SGD(params, **sgd)
    if name == "sgdp":
        return SGDP(params, **sgd, **projection)
    if name == "adamw":
        return torch.optim.AdamW(params, **adam)
    return AdamP(params, **adam, **projection)


def _plane(optimizer: MakeOptimizer, seed: int, record: Recorder) -> tuple[float, float]:
    """Minimise ``-cos(w, (1, 0))`` from a point of the unit circle that the seed chooses, far from the optimum."""
    angle = 2.0 + torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    w = torch.stack([angle.cos(), angle.sin()])[None].requires_grad_()
    opt = optimizer([w], _TOY_LR)
    for group in opt.param_groups:
        group["weight_decay"] = 0.0  # the problem is about the norm that momentum adds
    steps = math.nan
    for step in range(_TOY_STEPS + 1):
        cosine = w[0, 0] / w.norm()
        record({"step": step, "norm": w.norm().item(), "cosine": cosine.item()}, phase="plane")
        if cosine > _ALIGNED and math.isnan(steps):
            steps = float(step)
        opt.zero_grad()
        (-cosine).backward()
        opt.step()
    return w.norm().item(), steps if math.isfinite(steps) else float(_TOY_STEPS)


def _kernels(model: nn.Module) -> list[Tensor]:
    """The weights that normalisation usually follows: convolutions where there are any, else every matrix."""
    convolutions = [
        module.weight for module in model.modules() if isinstance(module, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    ]
    return convolutions or [parameter for parameter in model.parameters() if parameter.dim() >= 2]


def _mean_norm(kernels: list[Tensor]) -> float:
    return torch.stack([kernel.detach().norm() for kernel in kernels]).mean().item()


def _effective_step(kernels: list[Tensor], lr: float, family: str) -> float:
    # section 2 of the paper: the step on the unit sphere is lr / |w|^2 for gradient descent; Adam's update does not
    # scale with the gradient, which falls as 1 / |w|, so one power is left
    power = 2 if family == "sgd" else 1
    return torch.stack([lr / kernel.detach().norm() ** power for kernel in kernels]).mean().item()


def _projected(optimizer: torch.optim.Optimizer) -> float:
    if not isinstance(optimizer, SGDP | AdamP):
        return 0.0
    stats = optimizer.projection_stats()
    fired = sum(group.channel + group.layer for group in stats)
    return 100 * fired / max(1, fired + sum(group.none for group in stats))


EXPERIMENT = Experiment(
    slug="adamp",
    title="AdamP and SGDP against AdamW and SGD",
    question=(
        "Weights in front of a normalisation layer do not change the loss when they grow, but their steps get smaller. "
        "Do the projected optimisers stop that growth, and are the networks better for it?"
    ),
    presets={
        "smoke": Config(train_examples=400, epochs=2, sgd_lrs=(0.1,), adam_lrs=(0.001,), without_decay=False),
        "laptop": Config(),
        "paper": Config(
            data="imagenet",
            model="resnet18",
            epochs=100,
            batch_size=256,
            augment=True,
            sgd_weight_decay=1e-4,
            mixed_precision="bf16",
        ),
    },
    arms=arms,
    claims=claims,
    metrics=METRICS,
    charts=CHARTS,
    job=job,
    check=check,
    reading=(
        "The norm is measured at one reference learning rate per family, the accuracy at the rate that each arm's "
        "validation accuracy prefers, seed by seed; the test split is used once, for the chosen rate. A smaller norm "
        "means a larger effective step late in training, so an arm without projection can make up for it with another "
        "rate or with weight decay: a gain in accuracy is not to be expected on every model. The share of projected "
        "tensors tells whether the method does anything on this model at all: without normalisation layers it only "
        "fires by chance."
    ),
)
