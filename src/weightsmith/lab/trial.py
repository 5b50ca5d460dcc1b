"""What a training function of the user's is given, so that techniques can be put on it from outside.

    def train(trial):
        model = trial.model(make_network())
        optimizer = trial.optimizer(torch.optim.AdamW, model, lr=trial.lr(1e-3), weight_decay=0.01)
        for epoch in range(10):
            ...
            trial.record(epoch=epoch, val_loss=val_loss)
        model = trial.finish(model)
        return {"val_accuracy": accuracy(model)}

Without techniques every call passes on what it was given, so ``train(Trial())`` is the training as it was.
"""

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn

from weightsmith.core.errors import UsageError, near

Groups = list[dict[str, Any]]


@dataclass(frozen=True, slots=True)
class OptimizerPlan:
    """How an optimizer is about to be built.

    Attributes:
        make: The optimizer's class.
        groups: Parameter groups.
        options: Defaults of all groups.
        after: Applied to the optimizer once it is built, in order.
    """

    make: Callable[..., torch.optim.Optimizer]
    groups: Groups
    options: Mapping[str, Any]
    after: tuple[Callable[[torch.optim.Optimizer], torch.optim.Optimizer], ...] = ()

    def build(self) -> torch.optim.Optimizer:
        """Build the optimizer."""
        optimizer = self.make(self.groups, **self.options)
        for change in self.after:
            optimizer = change(optimizer)
        return optimizer


class Recipe:
    """What one technique does to a training: override what applies; one instance serves one training.

    Attributes:
        name: On the command line.
        title: In tables and plots.
        text: What it is, in a few words.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    text: ClassVar[str]

    def model(self, model: nn.Module, example: Any) -> nn.Module:
        """Change the model before the optimizer is built; ``example`` is what ``trial.model`` was given."""
        return model

    def optimizer(self, plan: OptimizerPlan, model: nn.Module) -> OptimizerPlan:
        """Change how the optimizer is built."""
        return plan

    def record(self, model: nn.Module, numbers: Mapping[str, float]) -> None:
        """See the numbers that the training records."""

    def finish(self, model: nn.Module, calibration: Any) -> nn.Module:
        """Change the model after training; ``calibration`` is what ``trial.finish`` was given, or ``None``."""
        return model


class Trial:
    """One training, with the techniques of its arm.

    Args:
        seed: For the training to seed its generators with; they are seeded with it before.
        recipes: The techniques, applied in this order; at the end of training in the opposite one.
        values: Values of swept hyperparameters by name; a text such as ``"2x"`` multiplies the training's own value.
        folder: For checkpoints of the training itself; ``None``: a temporary one.
        record: Takes the rows that the training records.
    """

    def __init__(
        self,
        seed: int = 0,
        *,
        recipes: Sequence[Recipe] = (),
        values: Mapping[str, str] | None = None,
        folder: Path | None = None,
        record: Callable[[Mapping[str, float]], None] | None = None,
    ) -> None:
        self.seed = seed
        self._recipes, self._values = tuple(recipes), dict(values or {})
        self._folder, self._record = folder, record
        self._model: nn.Module | None = None
        self._called: set[str] = set()
        self.asked: dict[str, float] = {}

    @property
    def folder(self) -> Path:
        """A folder that survives a kill, for checkpoints; empty at the first start."""
        if self._folder is None:
            self._folder = Path(tempfile.mkdtemp(prefix="weightsmith-trial-"))
        self._folder.mkdir(parents=True, exist_ok=True)
        return self._folder

    def model(self, model: nn.Module, *, example: Any = None) -> nn.Module:
        """Apply the techniques to a model; call it before the optimizer is built.

        Args:
            model: Any module; it may be changed in place.
            example: A small batch as the model takes it, for techniques that need one (``ofq``).

        Returns:
            The model to train.
        """
        self._called.add("model")
        for recipe in self._recipes:
            model = recipe.model(model, example)
        self._model = model
        return model

    def optimizer(
        self, make: Callable[..., torch.optim.Optimizer], model: nn.Module | Iterable[Any], **options: Any
    ) -> torch.optim.Optimizer:
        """Build an optimizer, or what the techniques put in its place.

        Args:
            make: A class such as ``torch.optim.AdamW``.
            model: The model from `model`, or parameters or parameter groups of it.
            **options: Of the optimizer.
        """
        self._called.add("optimizer")
        if not self._recipes:
            return make(model.parameters() if isinstance(model, nn.Module) else model, **options)
        if self._model is None:
            raise UsageError("call trial.model(model) before trial.optimizer(...)")
        plan = OptimizerPlan(make, _groups(model), options)
        for recipe in self._recipes:
            plan = recipe.optimizer(plan, self._model)
        return plan.build()

    def lr(self, default: float) -> float:
        """The learning rate of this trial: ``default``, unless it is swept."""
        return self.value("lr", default)

    def value(self, name: str, default: float) -> float:
        """A hyperparameter of this trial: ``default``, unless ``--sweep`` names it."""
        given = self._values.get(name)
        if given is None:
            found = default
        elif given.endswith("x"):
            found = default * float(given[:-1])
        else:
            found = float(given)
        self.asked[name] = found
        return found

    def record(self, **numbers: float) -> None:
        """Record numbers as training goes, for curves; techniques may use them (``mwa`` weighs by a loss)."""
        self._called.add("record")
        if self._record is not None:
            self._record({name: float(value) for name, value in numbers.items()})
        if self._model is not None:
            for recipe in self._recipes:
                recipe.record(self._model, numbers)

    def finish(self, model: nn.Module, *, calibration: Any = None) -> nn.Module:
        """End training: what the techniques do afterwards, before the model is evaluated.

        Args:
            model: The trained model.
            calibration: Batches of inputs, for techniques that need some (``flexround``).

        Returns:
            The model to evaluate and keep: plain weights wherever the technique allows it.
        """
        self._called.add("finish")
        for recipe in reversed(self._recipes):
            model = recipe.finish(model, calibration)
        return model

    def check(self) -> None:
        """Make sure, after training, that every technique has had its say.

        Raises:
            UsageError: The training never called what a technique or a sweep needs.
        """
        for recipe in self._recipes:
            for call in ("model", "optimizer", "record", "finish"):
                if getattr(type(recipe), call) is not getattr(Recipe, call) and call not in self._called:
                    raise UsageError(f"{recipe.name} needs trial.{call}(...), which the training function never called")
        for name in self._values:
            if name not in self.asked:
                call = "trial.lr(...)" if name == "lr" else f"trial.value({name!r}, ...)"
                hint = near(name, self.asked) if self.asked else "it asked for no value"
                raise UsageError(f"--sweep {name}: the training function never called {call}; {hint}")


def _groups(model: nn.Module | Iterable[Any]) -> Groups:
    given = list(model.parameters() if isinstance(model, nn.Module) else model)
    if given and isinstance(given[0], dict):
        return [{**group, "params": list(group["params"])} for group in given]
    return [{"params": given}]
