"""Do block-affine adapters start faster than LoRA and PiSSA, and do they end better?

A trained network is adapted to a task that has changed. Every method trains as many numbers as the others, as nearly as
its form allows. Panel A gives all of them one learning rate, as the paper does; panel B gives each the rate that its
own validation score prefers. A shared block collects the gradients of many blocks, so that one rate for all favors it.
"""

import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import torch
from torch import Tensor, nn

from weightsmith.adapt import BoneConfig, apply_bone_, trainable_parameters
from weightsmith.core.errors import UsageError, require
from weightsmith.experiments.adapters import layers_before_head, with_lora
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric, Value
from weightsmith.lab.job import Job
from weightsmith.lab.machine import saved_activations
from weightsmith.lab.progress import seed_everything
from weightsmith.lab.sweep import chosen_rate, tune
from weightsmith.lab.task import Batch, Task
from weightsmith.lab.tasks import TrainConfig, shared_task
from weightsmith.lab.train import Fitted

_TITLES = {"miss": "MiSS", "col": "Bone (col)", "row": "Bone (row)", "lora": "LoRA", "pissa": "PiSSA"}


@dataclass(frozen=True, slots=True)
class Config(TrainConfig):
    """What the experiment on adapters compares, and how."""

    DEFAULT_MODELS: ClassVar[Mapping[str, str]] = {**TrainConfig.DEFAULT_MODELS, "images": "mlp"}

    pretrain_epochs: float = 10
    """Passes over the data before they change; unused for a pretrained model or a checkpoint."""
    steps: int | None = 200
    """Optimizer steps of adapting."""
    early: int = 50
    """The step at which the start is compared."""
    curve: int = 10
    """Points of a learning curve, each a pass over the validation data."""
    batch_size: int = 32
    """Examples per step."""
    r: int = 16
    """Block size of the block forms; the LoRA forms get the rank that trains as many numbers as miss."""
    lrs: tuple[float, ...] = (1e-3, 3e-3, 1e-2)
    """Learning rates that every arm is tried at; the first is the shared one of panel A."""
    more_lrs: int = 1
    """Further learning rates, around or beyond the best one, for every arm."""
    pissa_iterations: int = 0
    """Iterations of the randomized decomposition that PiSSA starts from; 0 decomposes exactly."""


def arms(config: Config) -> list[Arm]:
    """LoRA and PiSSA as PEFT makes them, three block forms, and all weights of the adapted layers."""
    return [
        Arm("full", "all weights of the adapted layers", "full"),
        Arm("lora", "PEFT, alpha = 2 × rank", "LoRA"),
        Arm("pissa", "PEFT, alpha = rank", "PiSSA"),
        *(Arm(name, f"r = {config.r}", _TITLES[name]) for name in ("miss", "col", "row")),
    ]


def claims(config: Config) -> list[Claim]:
    """Better, each at its best rate; a faster start at one rate; better at the end at one rate."""
    col, miss = "Llama2-7B, GSM8K %: LoRA 38.97, PiSSA 43.52, Bone 49.36", "Llama2-7B, GSM8K %: LoRA 40.75, MiSS 48.16"
    found = [
        Claim(
            text="MiSS beats LoRA, each at its best learning rate",
            metric="score", winner="miss", loser="lora", primary=True, worth=config.least,
            paper="one rate for all methods; rates were not tuned",
        ),
        Claim(
            text="At one shared learning rate MiSS has a lower loss early on than LoRA",
            metric="early_loss", winner="miss", loser="lora", primary=True, relative=True, worth=0.05,
            paper="shown as training loss curves",
        ),
        Claim(
            text="Bone (col) beats LoRA, each at its best learning rate",
            metric="score", winner="col", loser="lora", worth=config.least, paper="rates were not tuned",
        ),
    ]  # fmt: skip
    shared = (("miss", "lora", miss, 7.41), ("col", "lora", col, 10.39), ("col", "pissa", col, 5.84))
    return found + [
        Claim(
            text=f"At one shared learning rate {_TITLES[arm]} ends better than {_TITLES[rival]}",
            metric="shared_score", winner=arm, loser=rival, worth=config.least,
            paper=paper, paper_gain=config.paper_gain(gain),
        )
        for arm, rival, paper, gain in shared
    ]  # fmt: skip


def metrics(config: Config) -> list[Metric]:
    """Scores of both panels, and what the forms cost."""
    score = config.score_metric()
    return [
        Metric("early_loss", "A: early loss", "lower", ".3f", help="Validation loss early on, shared rate."),
        replace(score, name="shared_score", label=f"A: {score.label}", help="At the end, shared rate."),
        replace(score, label=f"B: {score.label}", help="At the end, at the rate chosen on validation data."),
        chosen_rate(arms(config), "B: chosen learning rate"),
        Metric("first_gradient", "first gradient", None, ".3f", help="L2 norm of the first batch's gradient."),
        Metric("parameters", "trainable parameters", None, ".0f", help="How many numbers train."),
        Metric("setup_ms", "setup ms", "lower", ".1f", help="Time to put the adapter on the model.", cost=True),
        Metric(
            "saved_mib", "saved MiB", "lower", ".2f", help="Saved activations of a batch, beside the model.", cost=True
        ),
        Metric("step_ms", "step ms", "lower", ".2f", help="Median time of a forward and backward pass.", cost=True),
    ]


CHARTS = (
    Chart(title="Panel A: validation loss at one shared learning rate", x="step", y="validation_loss", phase="shared"),
    Chart(
        title="Panel B: validation score against the learning rate", x="rate", y="score", kind="scatter",
        phase="sweep", x_label="learning rate", y_label="validation score", log_x=True,
    ),
)  # fmt: skip


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    config.check()
    if config.steps is None or not 1 <= config.early <= config.steps:
        raise UsageError(f"early must be between 1 and steps, {config.steps}, got {config.early}")
    if config.curve < 1 or not config.lrs or min(config.lrs) <= 0:
        raise UsageError(f"curve must be at least 1 and lrs above 0, got {config.curve} and {config.lrs}")
    require("peft", extra="hf", purpose="the arms LoRA and PiSSA")


def start(config: Config, seed: int, folder: Path) -> dict[str, Any]:
    """The network before its data change, trained once per seed."""
    task = shared_task(config)
    model = config.network(task, seed)
    if not (config.pretrained or config.checkpoint):
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        config.fit(model, optimizer, task, seed, epochs=config.pretrain_epochs, validate="never", folder=folder)
    return {"weights": model.state_dict()}


def job(config: Config, job: Job) -> Mapping[str, Value]:
    """Adapt one arm with one seed, at every learning rate of the sweep."""
    task = changed(shared_task(config))
    require("peft", extra="hf", purpose="the arms LoRA and PiSSA")  # imported before anything is timed
    measured: dict[str, Value] = {}
    assert config.steps is not None
    rows_at = sorted({config.early, *range(0, config.steps, max(1, config.steps // config.curve))} - {0})

    def train(lr: float, folder: Path) -> Fitted:
        model = config.network(task, job.seed)
        model.load_state_dict(job.start["weights"])
        seed_everything(job.seed)
        begin = time.perf_counter()
        model = _adapted(config, job.arm, model.to(job.device))
        setup = 1e3 * (time.perf_counter() - begin)
        shared = lr == config.lrs[0]
        if shared:
            measured.update(_cost(task, model), setup_ms=setup, parameters=trainable_parameters(model).trainable)
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        fitted = config.fit(
            model, torch.optim.AdamW(trained, lr=lr, weight_decay=0.0), task, job.seed, rows_at=rows_at, folder=folder,
            record=partial(job.record, phase="shared" if shared else "other rates", rate=lr),
        )  # fmt: skip
        if shared:
            losses = {row["step"]: row.get("validation_loss", math.nan) for row in fitted.rows}
            measured["early_loss"] = losses.get(config.early, math.nan)
            measured["shared_score"] = math.nan if fitted.diverged else config.score(task, fitted.model)
        return fitted

    tuned = tune(config, task, job, config.lrs, train, more=config.more_lrs)
    return {**measured, "score": tuned.score, "best_lr": tuned.value}


def changed(task: Task) -> Task:
    """The task after its data have changed: images negated and transposed; other data stay as they are."""
    x = task.example().inputs
    if not (isinstance(x, Tensor) and x.dim() == 4 and x.is_floating_point()):
        return task

    def losses(model: nn.Module, batch: Batch) -> Tensor:
        return task.losses(model, replace(batch, inputs=-batch.inputs.mT))

    return replace(task, losses=losses, evaluate=lambda model, split: task.evaluate(_Turned(model), split))


class _Turned(nn.Module):
    """A classifier of images that are negated and transposed first."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(-x.mT)


def _adapted(config: Config, arm: str, model: nn.Module) -> nn.Module:
    layers = layers_before_head(model)
    if arm in ("miss", "col", "row"):
        variant = cast(Literal["miss", "col", "row"], arm)
        return apply_bone_(model, BoneConfig(r=config.r, variant=variant, where=list(layers)))
    model.requires_grad_(False)
    if arm == "full":
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        return model
    out, into = (sum(getattr(layer, side) for layer in layers.values()) for side in ("out_features", "in_features"))
    rank = max(1, round(config.r * out / (into + out)))  # trains as many numbers as miss
    if arm == "lora":
        return with_lora(model, rank)
    begin = f"pissa_niter_{config.pissa_iterations}" if config.pissa_iterations else "pissa"
    return with_lora(model, rank, alpha=rank, start=begin)


def _cost(task: Task, model: nn.Module) -> dict[str, float]:
    """How large the first gradient is, what autograd keeps for it beside the model itself, and how long it takes."""
    batch = task.example().to(next(model.parameters()).device)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    with saved_activations(model) as kept:
        gradients = torch.autograd.grad(task.losses(model, batch).mean(), trained)
    norm = torch.stack([gradient.float().norm() for gradient in gradients]).norm().item()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        torch.autograd.grad(task.losses(model, batch).mean(), trained)
        times.append(time.perf_counter() - begin)
    return {"first_gradient": norm, "saved_mib": sum(kept.values()) / 2**20, "step_ms": 1e3 * sorted(times)[2]}


def steps(config: Config, _: str) -> int:
    """Training steps of a job."""
    return (len(config.lrs) + config.more_lrs) * (config.steps or 0)


EXPERIMENT = Experiment(
    slug="bone",
    title="Bone and MiSS against LoRA and PiSSA",
    question=(
        "At equal numbers of trainable parameters: do block-affine adapters learn faster than LoRA and PiSSA at the "
        "same learning rate, and is anything left of that when each method has its own?"
    ),
    presets={
        "smoke": Config(train_examples=400, pretrain_epochs=3, steps=40, early=20, lrs=(1e-3,), more_lrs=0),
        "laptop": Config(),
        "paper": Config(
            task="questions", data="meta-math/MetaMathQA", model="meta-llama/Llama-2-7b-hf", pretrained=True,
            steps=6170, early=500, batch_size=64, r=64, lrs=(2e-5, 1e-4, 5e-4), pissa_iterations=4, length=512,
            new_tokens=256, mixed_precision="bf16",
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
    check=check,
    reading=(
        "Look at both panels. The gradient of a block that many parts of a weight share is several times that of "
        "LoRA's factors at the start (column 'first gradient'), so that one learning rate for all is a larger step for "
        "the block forms: panel A favors them, and so does the paper, which tunes no rate. Panel B tries every arm at "
        "the same number of rates and keeps the one that held-out data prefer. Times and memory are of this machine."
    ),
)  # fmt: skip
