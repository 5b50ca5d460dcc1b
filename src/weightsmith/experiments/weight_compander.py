"""Does writing weights through a bounded curve help, or does it only change the learning rate?

Near zero ``w = a arctan(v / b)`` is ``(a / b) v``, so plain gradient descent on ``v`` moves ``w`` with ``(a / b)^2``
times the learning rate. Every comparison therefore has a control that gets the same learning rate and no curve, and
every arm is also tried at several rates on the validation split.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from weightsmith.core.errors import UsageError
from weightsmith.experiments._images import ImageTask
from weightsmith.lab.claim import Arm, Chart, Claim, Experiment, Metric
from weightsmith.lab.images import Images
from weightsmith.lab.record import Recorder
from weightsmith.lab.sweep import best_of
from weightsmith.lab.train import evaluate, fit
from weightsmith.reparam import add_weight_decay_grad_, compand_, param_groups

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NEAR_ZERO = 0.01


@dataclass(frozen=True, slots=True)
class Config(ImageTask):
    """What the Weight Compander experiment compares, and how."""

    epochs: int = 15
    """Passes over the training data."""
    milestones: tuple[float, ...] = ()
    """Epochs at which the step schedule falls."""
    gamma: float = 0.2
    """By what it falls."""
    lr: float = 0.05
    """Base learning rate, that of the plain network."""
    scales: tuple[float, ...] = (0.25, 0.5, 1.0, 2.0, 4.0)
    """Multiples of each arm's own rate that are tried on the validation split; must contain 1."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Decay: on w for fixed pairs, on v for learnt ones, on the parameters otherwise."""
    a: float = 1.0
    """Height of the curve of the arm that the claims are about."""
    b: float = 0.6
    """Width of that curve."""
    neutral: float = 0.7
    """a = b of a second fixed arm, whose curve has slope 1 at zero."""
    learnt_a: float = 0.5
    """Where the learnt height starts."""
    learnt_b: float = 1.0
    """Where the learnt width starts."""


def arms(config: Config) -> list[Arm]:
    """The plain network and its learning-rate controls, three companded networks, and weight norm."""
    fixed, learnt = _multiplier(config.a, config.b), _multiplier(config.learnt_a, config.learnt_b)
    return [
        Arm("plain", "plain weights"),
        Arm("plain-matched", f"plain weights, learning rate of weights × {fixed:.3g} (control for wc)"),
        Arm("plain-matched-learnt", f"plain weights, learning rate of weights × {learnt:.3g} (control for wc-learnt)"),
        Arm("weight-norm", "torch's weight_norm"),
        Arm("wc", f"Weight Compander, a = {config.a:g}, b = {config.b:g}"),
        Arm("wc-neutral", f"Weight Compander, a = b = {config.neutral:g}"),
        Arm("wc-learnt", f"Weight Compander, learnt per layer from a = {config.learnt_a:g}, b = {config.learnt_b:g}"),
    ]


def claims(_: Config) -> list[Claim]:
    """Better at the same rate, than the matched control, at the best rate; fewer tiny and huge weights."""
    paper = "CIFAR-10 %: ResNet-18 94.04 → 94.44, ResNet-50 93.31 → 94.06"
    return [
        Claim("Beats the plain network at the same learning rate", "accuracy", "wc", "plain", paper=paper),
        Claim(
            "Beats the plain network whose learning rate matches its own near zero",
            "accuracy", "wc", "plain-matched", paper="control not in the paper",
        ),
        Claim("Beats the plain network, each at its best rate", "tuned_accuracy", "wc", "plain", paper=paper),
        Claim(
            "Beats weight norm, each at its best rate",
            "tuned_accuracy", "wc", "weight-norm", paper="CIFAR-10 %: ResNet-18 94.26 → 94.44, ResNet-50 93.89 → 94.06",
        ),
        Claim(
            "Learnt curves beat the plain network, each at its best rate",
            "tuned_accuracy", "wc-learnt", "plain", paper="ResNet-50 on CIFAR-10 93.31 → 94.80 %",
        ),
        Claim(
            "Leaves fewer weights near zero than the matched control",
            "near_zero", "wc", "plain-matched", "lower", paper="shown as histograms",
        ),
        Claim(
            "Keeps the largest weight smaller than the matched control does",
            "max_weight", "wc", "plain-matched", "lower", paper="ResNet-34's first layer: 10 → below aπ/2",
        ),
    ]  # fmt: skip


METRICS = (
    Metric("accuracy", "test accuracy %", "higher", ".2f", "On the test split, at the arm's own rate."),
    Metric(
        "tuned_accuracy", "tuned accuracy %", "higher", ".2f", "On the test split, at the rate chosen on validation."
    ),
    Metric("best_lr", "chosen rate", None, ".3g", "Learning rate of the weights with the best validation accuracy."),
    Metric("train_accuracy", "train accuracy %", None, ".2f", "On the training split, at the arm's own rate."),
    Metric("max_weight", "largest weight", "lower", ".2f", "Largest absolute weight after training, own rate."),
    Metric("sd_weight", "sd of weights", None, ".3f", "Standard deviation of all weights after training, own rate."),
    Metric("near_zero", "near zero %", "lower", ".1f", f"Share of weights within {_NEAR_ZERO} of zero, own rate."),
)

CHARTS = (
    Chart("Validation accuracy at the arm's own rate", "epoch", "validation_accuracy", phase="own rate"),
    Chart("Training loss at the arm's own rate", "epoch", "train_loss", phase="own rate", log_y=True),
    Chart("The largest weight", "epoch", "max_weight", phase="own rate", y_label="largest absolute weight"),
    Chart("Weights near zero", "epoch", "near_zero", phase="own rate", y_label="share of weights, %"),
    Chart(
        "Accuracy against the effective learning rate of small weights, one dot per rate and seed",
        "effective_lr",
        "validation_accuracy",
        "scatter",
        phase="sweep",
        x_label="learning rate × slope²",
        y_label="validation accuracy",
        log_x=True,
    ),
)


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    if 1.0 not in config.scales:
        raise UsageError(f"scales must contain 1, the arm's own rate, got {config.scales}")
    config.check()


def job(config: Config, arm: str, seed: int, record: Recorder) -> Mapping[str, float]:
    """Train one arm with one seed at every multiple of its rate."""
    data = config.images()
    multiplier = {
        "plain-matched": _multiplier(config.a, config.b),
        "plain-matched-learnt": _multiplier(config.learnt_a, config.learnt_b),
    }.get(arm, 1.0)
    slope = {"wc": config.a / config.b, "wc-learnt": config.learnt_a / config.learnt_b}.get(arm, 1.0)
    own: dict[str, float] = {}

    def attempt(scale: float) -> tuple[float, nn.Module]:
        phase = "own rate" if scale == 1.0 else "other rates"
        score, model = _train(config, data, arm, scale, multiplier, seed, record, phase)
        lr = config.lr * scale * multiplier
        record({"rate": lr, "effective_lr": lr * slope**2, "validation_accuracy": score}, phase="sweep")
        if scale == 1.0:
            own.update(_measure(model))
            own["accuracy"] = 100 * evaluate(model, data.test)["accuracy"]
            own["train_accuracy"] = 100 * evaluate(model, data.train)["accuracy"]
        return score, model

    best_scale, model = best_of(config.scales, attempt)
    return {
        **own,
        "tuned_accuracy": 100 * evaluate(model, data.test)["accuracy"],
        "best_lr": config.lr * best_scale * multiplier,
    }


def _train(
    config: Config, data: Images, arm: str, scale: float, multiplier: float, seed: int, record: Recorder, phase: str
) -> tuple[float, nn.Module]:
    model = config.network(data, seed)
    probe, _ = data.validation.__getitems__(list(range(min(8, len(data.validation)))))
    before = _logits(model, probe)
    bound = _rewrite_(model, config, arm)
    if not torch.allclose(_logits(model, probe), before, atol=1e-4, rtol=1e-4):
        raise RuntimeError(f"{arm} changes the network before training has begun")

    lr = config.lr * scale
    optimizer = torch.optim.SGD(_groups(model, config, lr, multiplier), lr=lr, momentum=config.momentum)
    fixed = arm in ("wc", "wc-neutral")

    def decay() -> None:
        add_weight_decay_grad_(model, config.weight_decay)

    fitted = fit(
        model,
        optimizer,
        data,
        epochs=config.epochs,
        batch_size=config.batch_size,
        seed=seed,
        schedule=config.schedule,
        milestones=config.milestones,
        gamma=config.gamma,
        mixed_precision=config.mixed_precision,
        before_step=decay if fixed else None,
        after_epoch=_measure,
        record=lambda row: record(row, phase=phase, rate=lr * multiplier),
    )
    if fitted.diverged:
        return math.nan, model
    if _measure(model)["max_weight"] > bound:
        raise RuntimeError(f"{arm} has let a weight beyond its bound {bound:.4f}")
    return evaluate(model, data.validation)["accuracy"], model


def _rewrite_(model: nn.Module, config: Config, arm: str) -> float:
    """Write the weights as the arm says; the largest value they can then take."""
    if arm == "wc":
        compand_(model, config.a, config.b)
        return config.a * math.pi / 2
    if arm == "wc-neutral":
        compand_(model, config.neutral, config.neutral)
        return config.neutral * math.pi / 2
    if arm == "wc-learnt":
        compand_(model, config.learnt_a, config.learnt_b, learnable=True)
    if arm == "weight-norm":
        for module in [module for module in model.modules() if isinstance(module, _LAYERS)]:
            parametrizations.weight_norm(module)
    return math.inf


def _groups(model: nn.Module, config: Config, lr: float, multiplier: float) -> list[dict[str, object]]:
    """Companded weights are never decayed by the optimiser; a control's rate applies to the weights alone."""
    if multiplier == 1.0:
        return param_groups(model, config.weight_decay)
    weights = {id(module.weight): module.weight for module in model.modules() if isinstance(module, _LAYERS)}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in weights]
    return [
        {"params": rest, "weight_decay": config.weight_decay},
        {"params": list(weights.values()), "weight_decay": config.weight_decay, "lr": lr * multiplier},
    ]


@torch.no_grad()
def _measure(model: nn.Module) -> dict[str, float]:
    weights = torch.cat([m.weight.detach().flatten() for m in model.modules() if isinstance(m, _LAYERS)])
    size = weights.abs()
    return {
        "max_weight": size.max().item(),
        "sd_weight": weights.std().item(),
        "near_zero": 100 * (size < _NEAR_ZERO).float().mean().item(),
    }


@torch.no_grad()
def _logits(model: nn.Module, x: Tensor) -> Tensor:
    model.eval()
    return model(x)


def _multiplier(a: float, b: float) -> float:
    return (a / b) ** 2


EXPERIMENT = Experiment(
    slug="weight-compander",
    title="Weight Compander against plain weights",
    question=(
        "The curve bounds the weights and moves small ones more. Does that help a convnet, beyond the change of "
        "learning rate that comes with it?"
    ),
    presets={
        "smoke": Config(train_examples=400, epochs=2, scales=(1.0,)),
        "laptop": Config(),
        "paper": Config(
            data="cifar100",
            model="resnet50",
            epochs=200,
            batch_size=128,
            schedule="step",
            milestones=(60.0, 120.0, 160.0),
            augment=True,
            lr=0.1,
            a=1.0,
            b=0.8,
        ),
    },
    arms=arms,
    claims=claims,
    metrics=METRICS,
    charts=CHARTS,
    job=job,
    check=check,
    reading=(
        "Near zero the curve multiplies the learning rate of a weight by (a/b)². The matched control gives the plain "
        "weights that rate and no curve: where it does as well as the companded network, the gain is the learning rate "
        "and not the curve. The tuned accuracy lets every arm choose its rate on the validation split. That the "
        "network is unchanged at the start and that no weight leaves the bound is checked in every job; a job that "
        "breaks either fails."
    ),
)
