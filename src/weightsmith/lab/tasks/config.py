"""The settings of a task and of its training; the configuration of an experiment adds its own."""

import importlib
import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, unknown
from weightsmith.lab.data.degradations import DEGRADATIONS
from weightsmith.lab.data.labels import check_counts
from weightsmith.lab.experiment import Metric
from weightsmith.lab.progress import seed_everything
from weightsmith.lab.schedule import Schedule, check_schedule, length
from weightsmith.lab.task import Split, Task
from weightsmith.lab.train import Fitted, check_precision, fit

TASKS = ("images", "sentences", "language", "questions", "restoration")


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """What is trained, on what."""

    DEFAULT_DATA: ClassVar[Mapping[str, str]] = {
        "images": "digits",
        "questions": "arithmetic",
        "restoration": "photographs",
    }
    DEFAULT_MODELS: ClassVar[Mapping[str, str]] = {
        "images": "convnet",
        "sentences": "bag",
        "language": "transformer",
        "questions": "transformer",
        "restoration": "promptir-12",
    }

    task: str = "images"
    """What to train on: images, sentences, language, questions, restoration, or your own as module:function or
    file.py:function that returns a task, or a function that makes the model and datasets to train and test on."""
    data: str = ""
    """Data: a name (digits, mnist, cifar10 ...), a file, a folder or a hub id. Empty: the task's bundled data."""
    model: str = ""
    """Model: a name (mlp, convnet, resnet18, vit_tiny ...), module:function, file.py:function, or a Hugging Face id or
    folder. Empty: a small one that fits the task."""
    pretrained: bool = False
    """Start from the trained weights of the Hugging Face model."""
    checkpoint: str = ""
    """Start from this state dict: .safetensors, .pt, or a folder of safetensors files."""
    train_examples: int | None = None
    """Use this many training rows, those held out included, in the share of each class; all by default."""
    test_examples: int | None = None
    """Use this many test rows, and as many of a validation split; all by default."""
    validation_fraction: float = 0.2
    """Share of the training rows that is held out, to choose by; data with train, validation and test use their own
    validation split and hold nothing out."""
    columns: tuple[str, ...] = ()
    """Names of the input columns and, last, of the column of labels or answers; usual names are found."""
    subset: str = ""
    """Configuration of a hub data set."""
    size: int | None = None
    """Images: side in pixels to resize to."""
    augment: bool = False
    """Images: random crops and flips."""
    length: int = 128
    """Texts: most tokens of a row."""
    new_tokens: int = 0
    """Questions: tokens to generate per answer, to count exact matches; 0 counts predicted answer tokens instead."""
    loss: str = ""
    """Your own loss, module:function: (outputs, targets) -> one number per example."""
    metric: str = ""
    """Your own metric, module:function: (outputs, targets) -> one number per example, higher is better."""
    worth: float | None = None
    """Smallest gain worth having, in the unit of the score; by default half a point of accuracy, 0.01 of loss, or 0.1
    dB."""

    @property
    def data_name(self) -> str:
        """The data, or those of the task by default."""
        name = self.data or self.DEFAULT_DATA.get(self.task, "")
        if not name:
            raise UsageError(f"task {self.task} needs data: give --data a file, a folder or a hub id")
        return name

    @property
    def model_name(self) -> str:
        """The model, or that of the task by default."""
        return self.model or self.DEFAULT_MODELS.get(self.task, "")

    @property
    def degradations(self) -> tuple[str, ...]:
        """What was done to the images, where they are to be restored; their quality is measured for each."""
        return DEGRADATIONS if self.task == "restoration" else ()

    @property
    def in_points(self) -> bool:
        """Whether the score is a share that is shown in percent."""
        return ":" not in self.task and self.task not in ("language", "restoration") and not self.metric

    def score_metric(self) -> Metric:
        """The metric named ``score`` by which arms are compared on this task."""
        if ":" in self.task:
            found = shared_task(self).metric
        elif self.task == "restoration":
            found = Metric("psnr", "test PSNR dB", "higher", ".2f")
        elif self.task == "language":
            found = Metric("loss", "test loss per token", "lower", ".4f")
        elif self.metric:
            found = Metric("metric", self.metric.rpartition(":")[2], "higher")
        else:
            label = "test accuracy %" if self.task != "questions" else "answer tokens predicted %"
            label = "exact answers %" if self.new_tokens else label
            found = Metric("accuracy", label, "higher", ".2f")
        return replace(found, name="score", resolution=None, help="On the test split.")

    @property
    def least(self) -> float:
        """The smallest gain worth having."""
        by_task = {"restoration": 0.1}.get(self.task, 0.01)
        return self.worth if self.worth is not None else (0.5 if self.in_points else by_task)

    def paper_gain(self, points: float) -> float | None:
        """The paper's gain in points of accuracy, where the score is one."""
        return points if self.in_points else None

    def score(self, task: Task, model: nn.Module, split: Split = "test") -> float | Tensor:
        """The score of a model: per example where there is one for each, else a number."""
        return task.evaluate(model, split).value(task.metric.name, 100.0 if self.in_points else 1.0)


@lru_cache(maxsize=2)
def shared_task(config: TaskConfig) -> Task:
    """`make_task`, done once per process and configuration: the jobs of a worker share their data."""
    return make_task(config)


def make_task(config: TaskConfig) -> Task:
    """Load the data and make the task that a configuration names.

    Raises:
        UsageError: The task, the data or the model is not known or does not fit.
    """
    check_counts(
        train_examples=config.train_examples, test_examples=config.test_examples, size=config.size, length=config.length
    )
    if ":" not in config.task and config.task not in TASKS:
        raise unknown("task", config.task, [*TASKS, "module:function"])
    kind = "own" if ":" in config.task else config.task
    task: Task = importlib.import_module(f"weightsmith.lab.tasks.{kind}").make(config)
    return task


@dataclass(frozen=True, slots=True)
class TrainConfig(TaskConfig):
    """What is trained, on what, and for how long."""

    epochs: float = 10
    """Passes over the training data."""
    steps: int | None = None
    """Optimizer steps, instead of epochs."""
    batch_size: int = 64
    """Examples per step."""
    schedule: Schedule = "cosine"
    """Learning-rate schedule, per step."""
    mixed_precision: str | None = None
    """no, fp16 or bf16."""

    def check(self, *positive: str) -> None:
        """Refuse values out of range.

        Args:
            *positive: Further fields that must be above 0.

        Raises:
            UsageError: Names the field.
        """
        for name in ("epochs", "steps", "batch_size", *positive):
            value = getattr(self, name)
            if value is not None and not (value > 0 and math.isfinite(value)):
                raise UsageError(f"{name} must be above 0, got {value}")
        check_schedule(self.schedule)
        check_precision(self.mixed_precision)

    def total_steps(self, task: Task) -> int:
        """Optimizer steps of one training."""
        epochs = self.epochs if self.steps is None else None
        return length(len(task.train), epochs, self.steps, self.batch_size)[0]

    def fit(self, model: nn.Module, optimizer: torch.optim.Optimizer, task: Task, seed: int, **more: Any) -> Fitted:
        """Train with these settings; ``more`` goes to `weightsmith.lab.train.fit` and takes precedence."""
        options: dict[str, Any] = {
            "batch_size": self.batch_size,
            "schedule": self.schedule,
            "mixed_precision": self.mixed_precision,
        }
        if not {"epochs", "steps"} & more.keys():
            options |= {"steps": self.steps} if self.steps is not None else {"epochs": self.epochs}
        return fit(model, optimizer, task, seed=seed, **(options | more))

    def network(self, task: Task, seed: int) -> nn.Module:
        """Build the model; its first weights follow from the seed alone."""
        seed_everything(seed)
        return task.build()
