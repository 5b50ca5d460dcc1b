"""Does self-taught loss rescaling protect a classifier from wrong labels, and does it tell which they are?

Labels of the training rows are made wrong in several ways, and nobody but the control arms is told where. Every arm
trains the same network for the same number of steps; the test rows stay clean, and the last step counts, since without
clean data there is nothing to stop early by.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, require
from weightsmith.experiments.label_noise import NOISES, Relabeled, auc, corrupt, labels_of, probabilities_of
from weightsmith.experiments.noisy_training import FOLDS, NoisyTraining, Q, Trained, generalized, only_right, small_loss
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric, Value
from weightsmith.lab.job import Job
from weightsmith.lab.schedule import Schedule
from weightsmith.lab.tasks import TrainConfig, shared_task
from weightsmith.reweight import RescalingSettings


@dataclass(frozen=True, slots=True)
class Config(TrainConfig):
    """What the experiment on wrong labels compares, and how."""

    DEFAULT_MODELS: ClassVar[Mapping[str, str]] = {**TrainConfig.DEFAULT_MODELS, "images": "mlp"}

    epochs: float = 15
    """Passes over the training data."""
    schedule: Schedule = "constant"
    """Learning-rate schedule, per step; the paper's is constant."""
    lr: float = 1e-3
    """Learning rate of Adam, for every arm."""
    noises: tuple[str, ...] = ("symmetric", "pair", "instance", "none")
    """How labels become wrong, the first decides: symmetric (any other class), pair (the next class), instance (hard
    examples, to what a briefly trained network takes them for), none."""
    rate: float = 0.4
    """Share of wrong labels with symmetric noise."""
    pattern_rate: float = 0.2
    """Share of wrong labels where they follow a pattern: pair and instance."""
    dropout: float = 0.1
    """Dropout in front of linear layers, for every arm, in models that have none: the passes differ by it."""
    passes: int = 3
    """Passes of every batch for the arms that rescale."""
    virtual_lr: float = 0.1
    """Step size of the virtual step."""
    trusted: int = 200
    """Clean validation rows that the arm in the style of Meta-Weight-Net is given."""
    class_separation: bool = False
    """A rescaler per class."""
    cleanlab: bool = True
    """Include the arm that prunes with cleanlab, which trains four times."""


def arms(config: Config) -> list[Arm]:
    """Plain training, robust ones, ours with a control, and the bound that knows every wrong label."""
    found = [
        Arm("ce", "cross-entropy", "plain"),
        Arm("gce", f"generalized cross-entropy, q = {Q}", "GCE"),
        Arm("small-loss", "drops the largest losses of a batch; is told the share of wrong labels", "small loss"),
        Arm("mwn", f"weights from the loss, taught by {config.trusted} clean rows", "MWN style"),
        Arm("rescaling", "19 features, taught by the noisy data; gradient by finite differences", "rescaling"),
        Arm("outer-only", "the same without the gradient through the virtual step", "no meta gradient"),
        Arm("oracle", "is told every wrong label and leaves it out", "oracle"),
    ]
    if config.cleanlab:
        found.insert(3, Arm("cleanlab", f"confident learning over {FOLDS} folds, pruned and trained again", "cleanlab"))
    return found


def claims(config: Config) -> list[Claim]:
    """Better at the end, and the wrong labels found; then other noise, clean data, rivals, and the control."""
    first = config.noises[0]
    against = partial(Claim, metric=f"score_{first}", winner="rescaling", worth=config.least)
    found = [
        against(
            text=f"With {_WORDS[first]} meta-rescaling ends more accurate than plain training",
            loser="ce", primary=True, paper="Youtube, 30 % symmetric: 89.5 → 91.0", paper_gain=config.paper_gain(1.5),
        ),
        Claim(
            text="The weights tell wrong labels from right ones better than the losses of plain training",
            metric=f"auc_{first}", winner="rescaling", loser="ce", worth=0.02,
            paper="shown as noise-filter F1",
        ),
        against(text="It ends more accurate than small-loss selection that is told the noise rate", loser="small-loss"),
        against(text="It ends more accurate than training with generalized cross-entropy", loser="gce"),
        against(
            text="The gradient through the virtual step adds accuracy", loser="outer-only",
            paper="average without meta learning 71.2, with 74.7",
        ),
    ]  # fmt: skip
    if config.cleanlab:
        found.append(against(text="It ends more accurate than pruning with cleanlab", loser="cleanlab"))
    for noise in config.noises[1:]:
        text = f"With {_WORDS[noise]} meta-rescaling ends more accurate than plain training"
        changes: dict[str, Any] = {}
        if noise == "none":
            text = "Clean data are not harmed"
            changes = {"margin": -2 * config.least, "paper": "clean, average: 83.9 → 83.2"}
        found.append(against(text=text, metric=f"score_{noise}", loser="ce", **changes))
    return found


_WORDS = {
    "symmetric": "symmetric noise",
    "pair": "labels moved to the next class",
    "instance": "hard examples mislabeled",
    "none": "clean labels",
}


def metrics(config: Config) -> list[Metric]:
    """Per kind of noise the score at the end; for wrong labels how well they are told apart and what is lost late."""
    score = config.score_metric()
    found = [replace(score, name=f"score_{noise}", label=f"{noise}: {score.label}") for noise in config.noises]
    for noise in config.noises:
        if noise != "none":
            found.append(
                Metric(f"auc_{noise}", f"{noise}: AUC", "higher", help="Of weight or loss, right against wrong labels.")
            )
        found.append(
            Metric(f"lost_{noise}", f"{noise}: lost late", "lower", ".2f", help="Best minus last validation score.")
        )
    return found


CHARTS = (
    Chart(title="Validation accuracy, first kind of noise", x="epoch", y="validation_accuracy", phase="first"),
    Chart(
        title="How well wrong labels are told apart", x="epoch", y="auc", phase="first", y_label="AUC",
        arms=("mwn", "rescaling", "outer-only"),
    ),
    Chart(
        title="Mean weight of wrong labels", x="epoch", y="weight_wrong", phase="first", y_label="weight",
        arms=("mwn", "rescaling", "outer-only"),
    ),
)  # fmt: skip


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    config.check()
    unknown = [noise for noise in config.noises if noise not in NOISES]
    if unknown or not config.noises or len(set(config.noises)) < len(config.noises) or config.noises[0] == "none":
        raise UsageError(
            f"noises must be different ones of {', '.join(NOISES)}, the first not none, got {config.noises}"
        )
    for name, low, high in (("rate", 0.0, 1.0), ("pattern_rate", 0.0, 1.0), ("dropout", -1e-9, 1.0)):
        if not low < getattr(config, name) < high:
            raise UsageError(f"{name} must be between 0 and 1, got {getattr(config, name)}")
    if config.lr <= 0 or config.trusted < 2 or config.passes < 1:
        raise UsageError("lr must be above 0, trusted at least 2, passes at least 1")
    if config.task in ("language", "questions") or config.loss:
        raise UsageError("meta-rescaling needs one label per row and the cross-entropy: images or sentences")
    if not config.validation_fraction:
        raise UsageError("validation_fraction must be above 0: one arm learns from clean validation rows")
    if config.cleanlab:
        require("cleanlab", extra="noise", purpose="the arm cleanlab; --no-cleanlab leaves it out")


def start(config: Config, seed: int, folder: Path) -> dict[str, Any]:
    """The labels of every kind of noise, the same for all arms."""
    task = shared_task(config)
    clean = labels_of(task)
    unsure: Tensor | None = None
    if "instance" in config.noises:
        model = config.network(task, seed)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
        epochs = min(config.epochs, 2)
        config.fit(model, optimizer, task, seed, epochs=epochs, validate="never", folder=folder)
        unsure = probabilities_of(model, task.train, int(clean.max()) + 1)
    rates = {noise: config.rate if noise == "symmetric" else config.pattern_rate for noise in config.noises}
    return {
        noise: corrupt(clean, noise, rate, torch.Generator().manual_seed(seed), unsure) for noise, rate in rates.items()
    }


def job(config: Config, job: Job) -> Mapping[str, Value]:
    """Train one arm with one seed on every kind of noise."""
    task = shared_task(config)
    clean = labels_of(task)
    found: dict[str, Value] = {}
    for noise in config.noises:
        labels = job.start[noise]
        noisy = replace(task, train=Relabeled(task.train, labels), name=f"{task.name} {noise}")
        phase = "first" if noise == config.noises[0] else noise
        training = NoisyTraining(
            config=config, job=job, task=noisy, right=labels == clean, phase=phase, folder=job.folder / noise,
            lr=config.lr, dropout=config.dropout,
        )  # fmt: skip
        trained = _trained(config, training, job.arm)
        found[f"score_{noise}"], found[f"lost_{noise}"] = trained.score, trained.best - trained.last
        if noise != "none":
            found[f"auc_{noise}"] = None if job.arm == "oracle" else auc(trained.trust, training.right)
    return found


def _trained(config: Config, training: NoisyTraining, arm: str) -> Trained:
    if arm == "cleanlab":
        return training.pruned()
    if arm in ("mwn", "rescaling", "outer-only"):
        ours = arm != "mwn"
        settings = RescalingSettings(
            passes=config.passes if ours else 1,
            meta_grad="none" if arm == "outer-only" else "finite_difference",
            virtual_lr=config.virtual_lr,
            outer=ours,
            features="all" if ours else "loss",
        )
        return training.rescaled(
            settings, class_separation=config.class_separation and ours, trusted=None if ours else config.trusted
        )
    told = 1 - float(training.right.float().mean())
    losses: dict[str, Callable[..., Tensor]] = {
        "gce": generalized,
        "small-loss": partial(small_loss, training.task, told),
        "oracle": partial(only_right, training.task, training.right),
    }
    return training.with_loss(losses.get(arm))


def steps(config: Config, arm: str) -> int:
    """Training steps of a job; a step with two more passes and a validation batch counts as four."""
    each = {"cleanlab": 3, "rescaling": 4, "outer-only": 3, "mwn": 4}.get(arm, 1)
    return each * len(config.noises) * config.total_steps(shared_task(config))


EXPERIMENT = Experiment(
    slug="meta-rescaling",
    title="Meta-rescaling against wrong labels",
    question=(
        "When many training labels are wrong and nobody knows which: does a rescaler that teaches itself keep a "
        "classifier from learning them, and do its weights tell which they are?"
    ),
    presets={
        "smoke": Config(train_examples=600, epochs=8, batch_size=32, noises=("symmetric", "none"), cleanlab=False),
        "laptop": Config(data="fashion_mnist", train_examples=2500, test_examples=5000),
        "paper": Config(
            task="sentences", data="nyu-mll/glue", subset="mrpc", model="FacebookAI/roberta-base", pretrained=True,
            epochs=10, batch_size=32, lr=1e-5, rate=0.3, noises=("symmetric", "none"), class_separation=True,
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
        "The score is that of the last step: without clean data nothing says when to stop, and plain training is best "
        "in the middle (column 'lost late'). Two arms are told what nobody knows in practice: 'small loss' the share "
        "of wrong labels, 'oracle' every one of them; 'MWN style' learns from clean rows. All arms share one learning "
        "rate and the same dropout. What the rescaler learns comes nearly all from the weighted validation loss: "
        "compare with 'no meta gradient'. Wrong labels that follow a pattern, or that most examples of a class share, "
        "are what the method cannot see, since it trusts what the model finds easy."
    ),
)  # fmt: skip
