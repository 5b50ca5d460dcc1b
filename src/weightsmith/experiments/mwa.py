"""Does weighting checkpoints by their loss or step beat averaging them uniformly, and does either beat the last one?

One LoRA fine-tuning run per seed and learning-rate schedule is cut into checkpoints; every arm makes one model of them.
All arms of a seed see the same run, so that they differ in nothing but the merge.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from weightsmith.average import ema, greedy_members, metric_weights, swa
from weightsmith.core.errors import UsageError
from weightsmith.experiments.label_noise import Relabeled, redrawn
from weightsmith.experiments.lora_checkpoints import Snapshots, State, adapt_, mean_gap, merged
from weightsmith.lab.data.views import classes_of, has_classes, labels_of
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric, Value
from weightsmith.lab.job import Job
from weightsmith.lab.task import Batch, Task
from weightsmith.lab.tasks import TrainConfig, shared_task
from weightsmith.lab.train import Hook


@dataclass(frozen=True, slots=True)
class Config(TrainConfig):
    """What the experiment on checkpoint merging compares, and how."""

    DEFAULT_MODELS: ClassVar[Mapping[str, str]] = {**TrainConfig.DEFAULT_MODELS, "images": "mlp"}

    pretrain_steps: int = 300
    """Optimizer steps before fine-tuning, of a classifier on the lower half of the classes; unused when pretrained."""
    label_noise: float = 0.3
    """Share of a classifier's fine-tuning labels that are drawn at random."""
    steps: int | None = 1000
    """Optimizer steps of fine-tuning."""
    save_every: int = 50
    """Steps between checkpoints."""
    batch_size: int = 16
    """Examples per step."""
    lr: float = 5e-3
    """Learning rate of AdamW."""
    rank: int = 8
    """Of the LoRA adapters, which are put on every linear layer but a language model's head."""
    alpha: float = 16.0
    """Their scaling is alpha / rank."""
    last: int = 10
    """How many checkpoints the merges take."""
    few: int = 4
    """How many the short uniform merge (LAWA) takes."""
    loss_penalty: float = 4.0
    """Penalty of the loss-weighted power merges."""
    linear_penalty: float = 0.7
    """Penalty of the loss-weighted linear merge."""
    steps_penalty: float = 1.0
    """Penalty of the step-weighted power merge."""
    ema_decay: float = 0.99
    """Per step, of the moving average kept during training."""


def arms(config: Config) -> list[Arm]:
    """Single checkpoints, the usual averages, and the weighted ones in factor and in update space."""
    k = config.last
    return [
        Arm("last", "the last checkpoint", "last"),
        Arm("best", f"the best of the last {k} on validation data", "best"),
        Arm("lawa", f"uniform average of the factors of the last {config.few}", "LAWA"),
        Arm("uniform", f"uniform average of the factors of the last {k}", "uniform"),
        Arm("loss", f"last {k}, factors, loss^-{config.loss_penalty:g}", "loss weights"),
        Arm("loss-linear", f"last {k}, factors, linear, penalty {config.linear_penalty:g}", "linear loss weights"),
        Arm("steps", f"last {k}, factors, step^{config.steps_penalty:g}", "step weights"),
        Arm("uniform-exact", f"last {k}, uniform, exact average of the updates", "uniform, updates"),
        Arm("loss-exact", f"last {k}, loss weights, exact average of the updates", "loss weights, updates"),
        Arm("uniform-svd", f"last {k}, uniform, best rank-{config.rank} approximation", "uniform, rank r"),
        Arm("greedy", f"greedy soup of the last {k}, by validation loss", "greedy soup"),
        Arm("ema", f"moving average kept at every step, decay {config.ema_decay:g}", "EMA"),
        Arm("swa", f"mean of every step since the first of the last {k}", "SWA"),
        Arm("decayed", "the last checkpoint of the run whose learning rate decayed to 0", "real decay"),
    ]


def claims(config: Config) -> list[Claim]:
    """Weighting beats uniform; averaging helps, also after decay; so does averaging updates."""
    gain, ours = "up to 5 % higher task accuracy than the uniform merge", "not in the paper"
    lower = partial(Claim, metric="loss", relative=True, worth=0.01)
    return [
        Claim(
            text="The loss-weighted merge beats the last checkpoint",
            metric="score", winner="loss", loser="last", primary=True, worth=config.least,
            paper="math score +5.05 % relative, best of all merges",
        ),
        lower(
            text="Loss weights have a lower loss than uniform ones",
            winner="loss", loser="uniform", primary=True, paper=gain,
        ),
        lower(
            text="A uniform merge has a lower loss than the last checkpoint",
            winner="uniform", loser="last", paper="baseline",
        ),
        lower(
            text="Step weights have a lower loss than uniform ones",
            winner="steps", loser="uniform", paper="better than uniform",
        ),
        lower(
            text="Averaging updates has a lower loss than averaging factors",
            winner="uniform-exact", loser="uniform", paper=ours,
        ),
        lower(
            text="After decay of the learning rate to 0, a uniform merge has a lower loss than the last checkpoint",
            metric="cosine_loss", winner="uniform", loser="last", paper=ours,
        ),
        Claim(
            text="A uniform merge at constant rate scores no worse than a real decay of the learning rate",
            metric="score", winner="uniform", loser="decayed", margin=-config.least, paper=ours,
        ),
    ]  # fmt: skip


def metrics(config: Config) -> list[Metric]:
    """Score and loss of what each arm makes of both runs."""
    score = config.score_metric()
    return [
        score,
        Metric("loss", "test loss", "lower", ".4f", help="On the test split, constant learning rate."),
        replace(score, name="cosine_score", label=f"{score.label}, cosine", help="Learning rate decayed to 0."),
        Metric("cosine_loss", "test loss, cosine", "lower", ".4f", help="Learning rate decayed to 0 along a cosine."),
        Metric(
            "gap",
            "covariance gap",
            None,
            ".3f",
            help="Share of the mean update that averaging factors loses.",
            chosen_by=("greedy",),
        ),
        Metric("spread", "largest weight × n", None, ".2f", help="1 for uniform weights over all that are merged."),
    ]


CHARTS = (
    Chart(
        title="Validation loss of the checkpoints, constant rate", x="step", y="validation_loss", phase="constant",
        arms=("last",),
    ),
    Chart(
        title="Validation loss of the checkpoints, cosine", x="step", y="validation_loss", phase="cosine",
        arms=("last",),
    ),
    Chart(
        title="Weight of each checkpoint", x="step", y="weight", phase="weights", arms=("loss", "loss-linear", "steps"),
    ),
)  # fmt: skip


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    config.check()
    saved = (config.steps or 0) // config.save_every
    if not 1 <= config.few <= config.last <= saved:
        raise UsageError(
            f"few and last must be at least 1, few at most last and last at most steps / save_every = {saved}, "
            f"got {config.few} and {config.last}"
        )


def start(config: Config, seed: int, folder: Path) -> dict[str, Any]:
    """The pretrained network and both fine-tuning runs: checkpoints of the adapters, their losses, running averages."""
    task = shared_task(config)
    model = config.network(task, seed)
    if not (config.pretrained or config.checkpoint) and config.pretrain_steps:
        config.fit(
            model, torch.optim.AdamW(model.parameters(), lr=1e-3), task, seed,
            loss=partial(_half_the_classes, task, classes_of(task)), steps=config.pretrain_steps, schedule="constant",
            validate="never", folder=folder / "pretraining",
        )  # fmt: skip
    weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
    noisy = _noisy(task, config.label_noise, seed)
    runs = {
        schedule: _fine_tuned(config, noisy, weights, seed, schedule, folder) for schedule in ("constant", "cosine")
    }
    return {"weights": weights, **runs}


def _fine_tuned(config: Config, task: Task, weights: State, seed: int, schedule: Any, folder: Path) -> dict[str, Any]:
    model = config.network(task, seed)
    model.load_state_dict(weights)
    adapters = adapt_(model, config.rank, config.alpha)
    averages = {"ema": ema(adapters, config.ema_decay), "swa": swa(adapters)}
    shots = Snapshots(adapters)
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=config.lr, weight_decay=0.0)
    assert config.steps is not None
    begin = config.steps - config.last * config.save_every
    first = next(adapters.parameters())

    def average() -> None:
        averages["ema"].update_parameters(adapters)
        if int(optimizer.state[first]["step"]) > begin:
            averages["swa"].update_parameters(adapters)

    hooks = [Hook(after_row=shots.take, state=shots), Hook(after_step=average, state=averages["ema"])]
    fitted = config.fit(
        model, optimizer, task, seed, schedule=schedule, rows_at=config.save_every,
        hooks=[*hooks, Hook(state=averages["swa"])], folder=folder / schedule,
    )  # fmt: skip
    return {
        "states": shots.states,
        "losses": [row.get("train_loss", math.nan) for row in fitted.rows],
        "validation": [row.get("validation_loss", math.nan) for row in fitted.rows],
        "diverged": fitted.diverged,
        **{arm: dict(average.module.state_dict()) for arm, average in averages.items()},
    }


def job(config: Config, job: Job) -> Mapping[str, Value]:
    """Merge the checkpoints of both runs as the arm says, and measure."""
    task = shared_task(config)
    model = config.network(task, job.seed)
    model.load_state_dict(job.start["weights"])
    found: dict[str, Value] = {"gap": None, "spread": None}
    for schedule, prefix in (("constant", ""), ("cosine", "cosine_")):
        run = job.start["cosine" if job.arm == "decayed" else schedule]
        job.diverged = job.diverged or run["diverged"]
        if run["diverged"]:
            return {metric.name: math.nan for metric in metrics(config)}
        members, weights, mode = _recipe(run, config, job.arm, task, model)
        states = [run[job.arm]] if job.arm in run else [run["states"][index] for index in members]
        with merged(model, states, weights, mode, rank=config.rank, alpha=config.alpha):
            outcome = task.evaluate(model, "test")
            found |= {f"{prefix}score": config.score(task, model), f"{prefix}loss": outcome.value("loss")}
        if schedule == "constant":
            found |= {"gap": mean_gap(states, weights), "spread": max(weights) * len(weights)}
            for index, weight in zip(members, weights, strict=True):
                job.record({"step": (index + 1) * config.save_every, "weight": weight}, phase="weights")
        if job.arm == "last":
            for index, loss in enumerate(run["validation"]):
                job.record({"step": (index + 1) * config.save_every, "validation_loss": loss}, phase=schedule)
    return found


def _recipe(
    run: Mapping[str, Any], config: Config, arm: str, task: Task, model: nn.Module
) -> tuple[list[int], list[float], str]:
    """Which checkpoints, with which weights, averaged as what."""
    count = len(run["states"])
    members = list(range(count - config.last, count))
    if arm in ("last", "decayed", "ema", "swa"):
        return [count - 1], [1.0], "factors"
    if arm == "best":
        return [min(members, key=lambda index: run["validation"][index])], [1.0], "factors"
    if arm == "greedy":

        def score(chosen: Sequence[int]) -> float:
            states = [run["states"][members[index]] for index in chosen]
            uniform = [1 / len(states)] * len(states)
            with merged(model, states, uniform, "factors", rank=config.rank, alpha=config.alpha):
                return -task.evaluate(model, "validation").metrics["loss"]

        members = [members[index] for index in greedy_members(len(members), score)]
    if arm == "lawa":
        members = members[-config.few :]
    losses, steps = [run["losses"][index] for index in members], [float(index + 1) for index in members]
    if arm in ("loss", "loss-exact"):
        weights = metric_weights(losses, "loss", "power", config.loss_penalty)
    elif arm == "loss-linear":
        weights = metric_weights(losses, "loss", "linear", config.linear_penalty)
    elif arm == "steps":
        weights = metric_weights(steps, "steps", "power", config.steps_penalty)
    else:
        weights = metric_weights(steps, "steps", "uniform")
    mode = {"uniform-exact": "exact", "loss-exact": "exact", "uniform-svd": "svd"}.get(arm, "factors")
    return members, weights.tolist(), mode


def _half_the_classes(task: Task, classes: int, model: nn.Module, batch: Batch) -> Tensor:
    """The loss of a classifier over the lower half of the classes; that of other models over everything."""
    losses = task.losses(model, batch)
    if not classes:
        return losses
    known = (cast(Tensor, batch.targets) < classes / 2).float()
    return (losses * known).sum() / known.sum().clamp_min(1)


def _noisy(task: Task, share: float, seed: int) -> Task:
    """A classifier's task with some labels drawn at random; other tasks as they are."""
    if not share or not has_classes(task):
        return task
    labels = redrawn(labels_of(task.train), share, torch.Generator().manual_seed(seed))
    return replace(task, train=Relabeled(task.train, labels))


def steps(config: Config, arm: str) -> int:
    """Training steps of a job; the runs that arms share are counted with the first."""
    return 2 * (config.steps or 0) + config.pretrain_steps if arm == "last" else 0


EXPERIMENT = Experiment(
    slug="mwa",
    title="Merging the checkpoints of one run: weighted, uniform, or just the last",
    question=(
        "A run leaves checkpoints and a log. Is a model averaged from them better than the last one, and do weights "
        "from the log beat equal ones?"
    ),
    presets={
        "smoke": Config(train_examples=400, pretrain_steps=50, steps=60, save_every=10, last=4, few=2),
        "laptop": Config(),
        "paper": Config(
            task="questions", data="gsm8k", model="meta-llama/Llama-3.1-8B", pretrained=True, steps=2000,
            save_every=100, lr=2e-4, rank=16, alpha=32.0, length=512, new_tokens=256, label_noise=0.0,
            mixed_precision="bf16",
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
        "The paper publishes no formula for its weights, so the weighted arms are members of a family of our own; its "
        "model, ranks and intervals are not known either, and the paper preset is a setting of that kind. All arms of "
        "a seed merge the same run. Averaging pays while the learning rate is high, because each checkpoint is noisy; "
        "after decay to zero little is left to average out. Compare the gain of weighting over uniform with that of "
        "averaging updates instead of factors before you tune a penalty."
    ),
)  # fmt: skip
