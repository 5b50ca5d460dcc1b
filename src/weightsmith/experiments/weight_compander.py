"""Does writing weights through a bounded curve help, or does it only change the learning rate?

Near zero ``w = a arctan(v / b)`` is ``(a / b) v``, so plain gradient descent on ``v`` moves ``w`` with ``(a / b)^2``
times the learning rate. Every comparison therefore has a control that gets the same learning rate and no curve, and
every arm is tried at several rates on the validation split.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from weightsmith.core.errors import UsageError
from weightsmith.core.outputs import logits_of
from weightsmith.experiments.matrices import MatricesAndRest
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric, Value
from weightsmith.lab.job import Job
from weightsmith.lab.schedule import Schedule
from weightsmith.lab.sweep import chosen_rate, tune
from weightsmith.lab.task import Batch, forward
from weightsmith.lab.tasks import TrainConfig, shared_task
from weightsmith.lab.train import Fitted, Hook
from weightsmith.reparam import add_weight_decay_grad_, compand_, param_groups

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
_NEAR_ZERO = 0.01


@dataclass(frozen=True, slots=True)
class Config(TrainConfig):
    """What the Weight Compander experiment compares, and how."""

    epochs: float = 10
    """Passes over the training data."""
    schedule: Schedule = "cosine"
    """Learning-rate schedule, per step."""
    milestones: tuple[float, ...] = ()
    """Epochs at which the step schedule falls."""
    gamma: float = 0.2
    """Factor by which it falls."""
    lr: float = 0.05
    """Base learning rate, that of the plain network."""
    scales: tuple[float, ...] = (1.0, 3.0, 0.3)
    """Multiples of each arm's own rate that are tried on the validation split; the first is 1."""
    more_scales: int = 1
    """Further multiples, around or beyond the best one, for every arm."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 5e-4
    """Decay: on w for fixed pairs, on v for learned ones, on the parameters otherwise."""
    a: float = 1.0
    """Height of the curve of the arm that the claims are about."""
    b: float = 0.6
    """Width of that curve."""
    neutral: float = 0.7
    """a = b of a second fixed arm, whose curve has slope 1 at zero."""
    learned_a: float = 0.5
    """Where the learned height starts."""
    learned_b: float = 1.0
    """Where the learned width starts."""
    adam_lr: float = 3e-3
    """Base learning rate of the Muon arm."""


def arms(config: Config) -> list[Arm]:
    """The plain network and its learning-rate control, three companded networks, and what people would use today."""
    fixed = _multiplier(config.a, config.b)
    return [
        Arm("plain", "plain weights, SGD", "plain"),
        Arm("plain-matched", f"plain weights, learning rate of weights × {fixed:.3g}", "plain, matched rate"),
        Arm("weight-norm", "torch's weight_norm", "weight norm"),
        Arm("muon", "plain weights, Muon on matrices and AdamW on the rest", "Muon"),
        Arm("wc", f"a = {config.a:g}, b = {config.b:g}", "Weight Compander"),
        Arm("wc-neutral", f"a = b = {config.neutral:g}", "Weight Compander, slope 1"),
        Arm(
            "wc-learned", f"learned per layer from a = {config.learned_a:g}, b = {config.learned_b:g}", "learned curve"
        ),
    ]


def claims(config: Config) -> list[Claim]:
    """Better, each at its best rate; better than the matched control; fewer tiny and huge weights."""
    paper = "CIFAR-10 %: ResNet-18 94.04 → 94.44, ResNet-50 93.31 → 94.06"
    return [
        Claim(
            text="Weight Compander beats plain weights, each at its best learning rate",
            metric="score", winner="wc", loser="plain", primary=True, worth=config.least,
            paper=paper, paper_gain=config.paper_gain(0.40),
        ),
        Claim(
            text="Weight Compander beats plain weights at the learning rate that its slope gives",
            metric="own_score", winner="wc", loser="plain-matched", primary=True, worth=config.least,
            paper="control not in the paper",
        ),
        Claim(
            text="Weight Compander beats weight norm, each at its best learning rate",
            metric="score", winner="wc", loser="weight-norm", worth=config.least,
            paper="CIFAR-10 %: ResNet-18 94.26 → 94.44, ResNet-50 93.89 → 94.06", paper_gain=config.paper_gain(0.18),
        ),
        Claim(
            text="Learned curves beat plain weights, each at its best learning rate",
            metric="score", winner="wc-learned", loser="plain", worth=config.least,
            paper="ResNet-50 on CIFAR-10 93.31 → 94.80 %", paper_gain=config.paper_gain(1.49),
        ),
        Claim(
            text="Weight Compander leaves fewer weights near zero than the matched control",
            metric="near_zero", winner="wc", loser="plain-matched", paper="shown as histograms",
        ),
        Claim(
            text="Weight Compander keeps the largest weight smaller than the matched control does",
            metric="max_weight", winner="wc", loser="plain-matched",
            paper="ResNet-34's first layer: 10 → below aπ/2",
        ),
    ]  # fmt: skip


def metrics(config: Config) -> list[Metric]:
    """The score at the chosen and at the arm's own rate, and what became of the weights."""
    score = config.score_metric()
    return [
        score,
        Metric("own_score", f"{score.label}, own rate", score.better, score.format, help="At the arm's own rate."),
        chosen_rate(arms(config), help="Of the weights, with the best validation score."),
        Metric("max_weight", "largest weight", "lower", ".2f", help="Largest absolute weight after training."),
        Metric("sd_weight", "sd of weights", None, ".3f", help="Standard deviation of all weights after training."),
        Metric("near_zero", "near zero %", "lower", ".1f", help=f"Share of weights within {_NEAR_ZERO} of zero."),
    ]


CHARTS = (
    Chart(title="Validation loss at the arm's own rate", x="epoch", y="validation_loss", phase="own rate"),
    Chart(title="Training loss at the arm's own rate", x="epoch", y="train_loss", phase="own rate", log_y=True),
    Chart(title="Largest absolute weight", x="epoch", y="max_weight", phase="own rate"),
    Chart(title="Weights near zero, %", x="epoch", y="near_zero", phase="own rate"),
    Chart(
        title="Validation score against the multiple of the learning rate", x="rate", y="score", kind="scatter",
        phase="sweep", x_label="multiple of the arm's own rate", y_label="validation score", log_x=True,
    ),
)  # fmt: skip


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    config.check()
    if not config.scales or config.scales[0] != 1.0 or min(config.scales) <= 0:
        raise UsageError(f"scales must start with 1, the arm's own rate, and be above 0, got {config.scales}")


def job(config: Config, job: Job) -> Mapping[str, Value]:
    """Train one arm with one seed at every multiple of its rate."""
    task, arm = shared_task(config), job.arm
    multiplier = _multiplier(config.a, config.b) if arm == "plain-matched" else 1.0
    base = config.adam_lr if arm == "muon" else config.lr
    own: dict[str, Value] = {}

    def train(scale: float, folder: Path) -> Fitted:
        model = config.network(task, job.seed)
        before = _logits(model, task.example())
        bound = _rewrite_(model, config, arm)
        if not torch.allclose(_logits(model, task.example()), before, atol=1e-4, rtol=1e-4):
            raise RuntimeError(f"{arm} changes the network before training has begun")
        fixed = arm in ("wc", "wc-neutral")

        def decay() -> None:
            add_weight_decay_grad_(model, config.weight_decay)

        fitted = config.fit(
            model, _optimizer(config, arm, model, base * scale, multiplier), task, job.seed,
            milestones=config.milestones, gamma=config.gamma,
            hooks=[Hook(before_step=decay if fixed else None), Hook(after_row=_measure)],
            record=partial(job.record, phase="own rate" if scale == 1.0 else "other rates", rate=scale), folder=folder,
        )  # fmt: skip
        if not fitted.diverged and _measure(model)["max_weight"] > bound:
            raise RuntimeError(f"{arm} has let a weight beyond its bound {bound:.4f}")
        if scale == 1.0:
            own.update(_measure(model), own_score=math.nan if fitted.diverged else config.score(task, model))
        return fitted

    tuned = tune(config, task, job, config.scales, train, more=config.more_scales)
    return {**own, "score": tuned.score, "best_lr": base * tuned.value * multiplier}


def _rewrite_(model: nn.Module, config: Config, arm: str) -> float:
    """Write the weights as the arm says; the largest value that they can then take."""
    if arm == "wc":
        compand_(model, config.a, config.b, overflow="clip")
        return config.a * math.pi / 2
    if arm == "wc-neutral":
        compand_(model, config.neutral, config.neutral, overflow="clip")
        return config.neutral * math.pi / 2
    if arm == "wc-learned":
        compand_(model, config.learned_a, config.learned_b, learnable=True, overflow="clip")
    if arm == "weight-norm":
        for module in [module for module in model.modules() if isinstance(module, _LAYERS)]:
            parametrizations.weight_norm(module)
    return math.inf


def _optimizer(config: Config, arm: str, model: nn.Module, lr: float, multiplier: float) -> torch.optim.Optimizer:
    """Companded weights are never decayed by the optimizer; a control's rate applies to the weights alone."""
    if arm == "muon":
        return MatricesAndRest(model.parameters(), lr, config.weight_decay)
    groups = param_groups(model, config.weight_decay)
    if multiplier != 1.0:
        weights = {id(module.weight): module.weight for module in model.modules() if isinstance(module, _LAYERS)}
        rest = [parameter for parameter in model.parameters() if id(parameter) not in weights]
        groups = [
            {"params": rest, "weight_decay": config.weight_decay},
            {"params": list(weights.values()), "weight_decay": config.weight_decay, "lr": lr * multiplier},
        ]
    return torch.optim.SGD(groups, lr=lr, momentum=config.momentum)


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
def _logits(model: nn.Module, batch: Batch) -> Tensor:
    return logits_of(forward(model.eval(), batch))


def _multiplier(a: float, b: float) -> float:
    return (a / b) ** 2


def steps(config: Config, _: str) -> int:
    """Training steps of a job."""
    return (len(config.scales) + config.more_scales) * config.total_steps(shared_task(config))


EXPERIMENT = Experiment(
    slug="weight-compander",
    title="Weight Compander against plain weights",
    question=(
        "The curve bounds the weights and moves small ones more. Does that help a network, beyond the change of "
        "learning rate that comes with it?"
    ),
    presets={
        "smoke": Config(train_examples=400, epochs=2, scales=(1.0,), more_scales=0),
        "laptop": Config(),
        "paper": Config(
            data="cifar100", model="resnet50", epochs=200, batch_size=128, schedule="step",
            milestones=(60.0, 120.0, 160.0), augment=True, lr=0.1, a=1.0, b=0.8,
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
        "Near zero the curve multiplies the learning rate of a weight by (a/b)². The matched control gives the plain "
        "weights that rate and no curve: where it does as well as the companded network, the gain is the learning rate "
        "and not the curve. Otherwise every arm chooses its rate on the validation split, with the same number of "
        "trials. That the network is unchanged at the start and that no weight leaves the bound is checked in every "
        "job; a job that breaks either fails."
    ),
)  # fmt: skip
