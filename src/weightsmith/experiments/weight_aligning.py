"""Does aligning the head keep old classes alive when new ones arrive with few examples of the old?

The classes of any classification task arrive in steps, in a random order per seed. Every arm sees the same data and has
the same number of exemplars, unless its name says otherwise, and is trained for the same number of passes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

from weightsmith.continual import AligningOptions, ClassOrder, ExemplarMemory, WeightAligning
from weightsmith.continual.head import find_head
from weightsmith.core.errors import UsageError
from weightsmith.experiments.class_steps import ClassSteps
from weightsmith.lab.data.views import labels_of
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric, Value
from weightsmith.lab.job import Job
from weightsmith.lab.task import Task
from weightsmith.lab.tasks import TrainConfig, shared_task

_PAPER = "CIFAR-100, 5 steps: 42.9 → 59.2 after the last step"


@dataclass(frozen=True, slots=True)
class Config(TrainConfig):
    """What the Weight Aligning experiment compares, and how."""

    epochs: float = 30
    """Passes over the data of each step."""
    batch_size: int = 32
    """Examples per optimizer step."""
    increments: int = 5
    """Steps in which the classes arrive."""
    memory: int = 40
    """Exemplars of all classes together."""
    selection: Literal["herding", "random"] = "herding"
    """How exemplars are chosen."""
    head: str = ""
    """Dotted name of the classifier at the end of the model; found if empty."""
    lr: float = 0.05
    """Learning rate of SGD at each step."""
    momentum: float = 0.9
    """Momentum of SGD."""
    weight_decay: float = 1e-4
    """Weight decay at the first step; divided by the number of the step at later ones."""
    milestones: tuple[float, ...] = ()
    """With the schedule step: when the learning rate falls to a tenth, as shares of the epochs."""


_OPTIONS = {
    "replay": AligningOptions(distill=False, align=False),
    "replay-bytes": AligningOptions(distill=False, align=False),
    "kd": AligningOptions(align=False),
    "kd-grow": AligningOptions(align=False, head_init="grow"),
    "ce-wa": AligningOptions(distill=False),
    "wa": AligningOptions(),
    "wa-grow": AligningOptions(head_init="grow"),
    "official": AligningOptions(p=1, restrict=True, bias=False),
    "bic": AligningOptions(align=False, head_init="grow"),
}


def arms(_: Config) -> list[Arm]:
    """Weight Aligning with its parts taken away, its rival, and what bounds them."""
    return [
        Arm("wa", "distillation, exemplars, aligned head", "WA"),
        Arm("kd", "distillation and exemplars", "distillation"),
        Arm("replay", "exemplars alone", "replay"),
        Arm("replay-bytes", "exemplars alone, and more of them for the bytes of the old model", "replay, equal bytes"),
        Arm("ce-wa", "exemplars and an aligned head", "replay + WA"),
        Arm("wa-grow", "as WA; the head keeps its old rows", "WA, growing head"),
        Arm("kd-grow", "as distillation; the head keeps its old rows", "distillation, growing head"),
        Arm("official", "the authors' settings: L1 norms, weights of at least 0", "WA, authors' settings"),
        Arm("bic", "as the growing head; two numbers per step learned on held-out exemplars", "BiC"),
        Arm("joint", "all classes at once: an upper bound", "joint training"),
    ]


def claims(config: Config) -> list[Claim]:
    """Better than its own parts; better than spending the old model's bytes on exemplars."""
    return [
        Claim(
            text="Weight Aligning is more accurate on all classes than distillation alone", metric="score",
            winner="wa", loser="kd", primary=True, worth=config.least, paper=_PAPER,
            paper_gain=config.paper_gain(16.3),
        ),
        Claim(
            text="Weight Aligning is more accurate than replay that uses as many bytes", metric="score",
            winner="wa", loser="replay-bytes", primary=True, worth=config.least,
        ),
        Claim(text="Aligning helps without distillation", metric="score", winner="ce-wa", loser="replay"),
        Claim(text="Aligning helps a head that keeps its old rows", metric="score", winner="wa-grow", loser="kd-grow"),
        Claim(text="Weight Aligning is more accurate than BiC", metric="score", winner="wa", loser="bic"),
        Claim(
            text="Aligning brings the share of the newest classes closer to the truth", metric="share_gap",
            winner="wa", loser="kd",
        ),
    ]  # fmt: skip


def metrics(config: Config) -> list[Metric]:
    """Accuracy after the last step and on the way, where the errors are, and what is kept."""
    points = partial(Metric, better="higher", format=".2f")
    return [
        replace(config.score_metric(), help="On the test rows of all classes, after the last step."),
        points("avg_inc_acc", "mean over steps %", help="Accuracy on the classes seen, mean over all steps."),
        points("avg_inc_acc_wo_first", "mean without first %", help="The same without the first step."),
        points("old_acc", "old classes %", help="After the last step, on the classes before it."),
        points("new_acc", "newest classes %", help="After the last step, on its own classes."),
        Metric("newest_share", "newest share %", None, ".1f", help="Test predictions that are the newest classes."),
        Metric("share_gap", "share off by", "lower", ".1f", help="Distance of that share from the true one, points."),
        Metric("gamma", "last factor", None, ".3f", help="What the newest rows were multiplied by."),
        Metric("kept", "bytes kept", "lower", ",.0f", help="Exemplars and the earlier model, from step to step."),
    ]


CHARTS = (
    Chart(title="Accuracy on the classes seen", x="classes", y="accuracy", y_label="accuracy %"),
    Chart(
        title="Accuracy after the last step against bytes kept", x="kept", y="last", kind="scatter", phase="end",
        x_label="bytes kept", y_label="accuracy %", log_x=True,
    ),
    Chart(title="Norm of new rows over that of old rows, before aligning", x="classes", y="norm_ratio"),
)  # fmt: skip


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    config.check("lr", "increments", "memory")
    if config.loss or config.metric or not config.in_points:
        raise UsageError("task must be a classification with its own loss and metric: classes arrive in steps")


def task(config: Config) -> Task:
    """The task, if its classes can arrive in steps."""
    found = shared_task(config)
    classes = len(_order(config, labels_of(found.train), 0).order)
    if config.memory < classes:
        raise UsageError(f"memory must be at least the {classes} classes, got {config.memory}")
    _head(config, config.network(found, 0), classes)
    return found


def _order(config: Config, labels: Tensor, seed: int) -> ClassOrder:
    classes = int(labels.max()) + 1
    if config.increments > classes:
        raise UsageError(f"increments must be at most the {classes} classes, got {config.increments}")
    sizes = [classes // config.increments + (i < classes % config.increments) for i in range(config.increments)]
    return ClassOrder.shuffled(classes, sizes, seed=seed)


def _head(config: Config, model: nn.Module, classes: int) -> str:
    """The last layer with one row per class."""
    if config.head:
        find_head(model, config.head)
        return config.head
    fitting: list[str] = [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Conv2d) and module.weight.shape[0] == classes
    ]
    if not fitting:
        raise UsageError(f"the model has no linear layer of {classes} outputs: name its classifier with --head")
    return fitting[-1]


def job(config: Config, job: Job) -> Mapping[str, Value]:
    """Let the classes arrive, train each step, and count what is right."""
    task = shared_task(config)
    labels = labels_of(task.train)
    order = _order(config, labels, job.seed)
    model = config.network(task, job.seed).to(job.device)
    head = _head(config, model, len(order.order))
    if job.arm == "joint":
        order = ClassOrder(order.order, len(order.order))
    exemplar = _bytes(task)
    kept = sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers()))
    options = _OPTIONS.get(job.arm, AligningOptions(align=False, distill=False))
    teacher = kept if options.distill else 0
    budget = config.memory + (kept // exemplar if job.arm == "replay-bytes" else 0)
    memory = ExemplarMemory(budget, selection=config.selection, seed=job.seed)
    wa = WeightAligning(model, head, options, memory=memory)
    run = ClassSteps(
        config=config, job=job, task=task, order=order, labels=labels, wa=wa, memory=memory,
        optimizer=partial(_optimizer, config, wa), milestones=config.milestones, bic=job.arm == "bic",
    )  # fmt: skip
    accuracies: list[float] = []
    for step in range(order.steps):
        if not run.take(step):
            job.diverged = True
            return dict.fromkeys((metric.name for metric in metrics(config)), float("nan"))
        predicted, true = run.predictions(step)
        accuracies.append(100 * (predicted == true).double().mean().item())
        job.record({"classes": order.n_seen(step), "accuracy": accuracies[-1], **_norms(wa)})
    n_old = order.n_old(order.steps - 1)
    newest = 100 * (predicted >= n_old).double().mean().item()
    truth = 100 * (true >= n_old).double().mean().item()
    bytes_kept = float(len(memory) * exemplar + teacher) if job.arm != "joint" else float(len(labels) * exemplar)
    job.record({"kept": bytes_kept, "last": accuracies[-1]}, phase="end")
    found: dict[str, Value] = dict.fromkeys(metric.name for metric in metrics(config))
    found |= {"score": 100.0 * (predicted == true).float(), "kept": bytes_kept}
    if job.arm == "joint":
        return found
    return found | {
        "avg_inc_acc": sum(accuracies) / len(accuracies),
        "avg_inc_acc_wo_first": sum(accuracies[1:]) / max(1, len(accuracies) - 1),
        "old_acc": 100 * (predicted == true)[true < n_old].double().mean().item(),
        "new_acc": 100 * (predicted == true)[true >= n_old].double().mean().item(),
        "newest_share": newest,
        "share_gap": abs(newest - truth),
        "gamma": wa.gamma if options.align else None,
    }


def _optimizer(config: Config, wa: WeightAligning, step: int) -> torch.optim.Optimizer:
    decay = config.weight_decay / (step + 1)
    return torch.optim.SGD(wa.model.parameters(), lr=config.lr, momentum=config.momentum, weight_decay=decay)


def _norms(wa: WeightAligning) -> dict[str, float]:
    if not wa.history or wa.history[-1]["step"] != wa.step:
        return {}
    last = wa.history[-1]
    return {"norm_ratio": last["mean_norm_new"] / last["mean_norm_old"], "gamma": last["gamma"]}


def _bytes(task: Task) -> int:
    """What one stored example takes: a byte per pixel, four per token."""
    inputs = task.example().inputs
    tensors = list(inputs.values()) if isinstance(inputs, Mapping) else [inputs]
    first = next(tensor for tensor in tensors if isinstance(tensor, Tensor))
    return first[0].numel() * (1 if first.is_floating_point() else 4)


def steps(config: Config, _: str) -> int:
    """Training steps of a job, about: every example is new once, and exemplars come on top."""
    return config.total_steps(shared_task(config))


EXPERIMENT = Experiment(
    slug="weight-aligning",
    title="Weight Aligning for classes that arrive in steps",
    question=(
        "A classifier that learns new classes with a few stored examples of the old ones predicts the old ones too "
        "rarely. Does one factor on the rows of the new classes repair that, and is it worth the bytes it needs?"
    ),
    presets={
        "smoke": Config(train_examples=500, epochs=4, batch_size=16),
        "laptop": Config(),
        "paper": Config(
            data="cifar100", model="resnet32", augment=True, epochs=250, batch_size=32, lr=0.1, memory=2000,
            schedule="step", milestones=(0.4, 0.6, 0.8), validation_fraction=0.0,
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
        "Accuracies are of the test split; no setting was chosen on it. 'Bytes kept' counts exemplars at a byte per "
        "pixel and, with distillation, the model of the step before in full. BiC learns its two numbers on a tenth "
        "of the exemplars, one per class at least, which it does not train on."
    ),
)  # fmt: skip
