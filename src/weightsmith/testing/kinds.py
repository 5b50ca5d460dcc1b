"""What kinds of techniques there are, and how the checks call each."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightsmith.core.fold import fold_
from weightsmith.core.select import Where, select
from weightsmith.testing.models import MODELS, NO_MODEL, available

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)


@dataclass(frozen=True, slots=True)
class Rewrite:
    """A verb that changes how weights are written, and the verb that makes them plain again.

    Attributes:
        begin: ``(model, x, where=...)``; returns the model, or a report with the model as ``.model``.
        end: ``model -> model``.
        change_at_begin: How far outputs may move when it begins; ``None``: it is meant to change them.
        change_at_end: How far outputs may move when it ends.
        ends_plain: Whether the model then has the modules and the keys that it came with.
        refuses: Models that it does not take, with a pattern of the `ValueError`'s text.
        models: Names of the models that it is tried on.
    """

    begin: Callable[..., Any]
    end: Callable[[nn.Module], nn.Module] = fold_
    change_at_begin: float | None = None
    change_at_end: float = 0.0
    ends_plain: bool = True
    refuses: Mapping[str, str] = field(default_factory=dict)
    models: tuple[str, ...] = field(default=tuple(MODELS), kw_only=True)


@dataclass(frozen=True, slots=True)
class Change:
    """A verb that changes the values of weights once and leaves the model otherwise as it was.

    Attributes:
        apply: ``(model, x, where=...)``; returns the model, or a report with the model as ``.model``.
        refuses: Models that it does not take, with a pattern of the `ValueError`'s text.
        models: Names of the models that it is tried on.
    """

    apply: Callable[..., Any]
    refuses: Mapping[str, str] = field(default_factory=dict)
    models: tuple[str, ...] = field(default=tuple(MODELS), kw_only=True)

    @property
    def begin(self) -> Callable[..., Any]:
        """The verb, under the name that a `Rewrite` has for it."""
        return self.apply


@dataclass(frozen=True, slots=True)
class Parametrization:
    """A module for `torch.nn.utils.parametrize`: what trains goes in, the weight comes out.

    The checks register it on the weight of every linear and convolution layer.

    Attributes:
        make: Returns a new one.
        change_at_begin: How far outputs may move when it is registered; ``None``: it is meant to change them. Anything
            else needs its ``right_inverse``.
        models: Names of the models that it is tried on.
    """

    make: Callable[[], nn.Module]
    change_at_begin: float | None = None
    models: tuple[str, ...] = ("linear", "conv-bn", "conv-transpose", "depthwise", "frozen", "vit")

    def rewrite(self) -> Rewrite:
        """What the checks of a `Rewrite` call."""

        def begin(model: nn.Module, _x: Tensor, where: Where = None) -> nn.Module:
            for module in select(model, where, default=lambda _, module: isinstance(module, _LAYERS)).values():
                weight = module.weight
                assert isinstance(weight, Tensor)
                made = self.make().to(weight.device, weight.dtype)
                if not weight.requires_grad:
                    made.requires_grad_(False)
                parametrize.register_parametrization(module, "weight", made)
            return model

        return Rewrite(begin, change_at_begin=self.change_at_begin, models=self.models)


@dataclass(frozen=True, slots=True)
class Optimizer:
    """An optimizer.

    Attributes:
        make: ``model -> optimizer``; the learning rate must lower the loss of small models within 8 steps.
        models: Names of the models that it is tried on.
    """

    make: Callable[[nn.Module], torch.optim.Optimizer]
    models: tuple[str, ...] = field(default=tuple(MODELS), kw_only=True)


@dataclass(frozen=True, slots=True)
class State:
    """Objects with ``state_dict`` and ``load_state_dict``, such as a schedule or a memory.

    Attributes:
        make: Returns a new object, or a tuple of objects that depend on each other.
        use: Called with them again and again; what it returns is compared.
    """

    make: Callable[[], Any]
    use: Callable[..., Any]


@dataclass(frozen=True, slots=True)
class Function:
    """A function from tensors to tensors.

    Attributes:
        call: The function.
        inputs: Returns its arguments, with floating point tensors in float32.
        keeps_dtype: Whether the outputs have the dtype of the first floating point argument.
        compiles: Whether it compiles without graph breaks.
    """

    call: Callable[..., Any]
    inputs: Callable[[], tuple[Any, ...]]
    keeps_dtype: bool = True
    compiles: bool = True


Kind = Rewrite | Change | Parametrization | Optimizer | State | Function


def kind_of(technique: object) -> Kind:
    """Wrap an instance of a parametrization or the class of an optimizer; a kind stays as it is.

    Raises:
        TypeError: It is something else.
    """
    if isinstance(technique, Kind):
        return technique
    if isinstance(technique, type) and issubclass(technique, torch.optim.Optimizer):
        make: Any = technique
        return Optimizer(lambda model: make([p for p in model.parameters() if p.requires_grad], lr=0.01))
    if isinstance(technique, nn.Module):
        module = technique
        exact = 1e-5 if hasattr(module, "right_inverse") else None
        return Parametrization(lambda: copy.deepcopy(module), change_at_begin=exact)
    raise TypeError(
        "technique must be an optimizer class, a parametrization, or one of weightsmith.testing's Rewrite, Change, "
        f"Parametrization, Optimizer, State and Function, got {technique!r}"
    )


@dataclass(frozen=True, slots=True)
class Check:
    """One promise, and what it is checked on.

    Attributes:
        run: ``(technique, name of the model)``; raises if the promise does not hold.
        models: Names of models; ``None``: all that the technique takes; empty: the check brings its own.
        refused: Whether it is about the models that the technique refuses.
        when: Whether it applies to a technique.
        compiles: Whether it compiles, which takes seconds.
    """

    run: Callable[[Any, str], None]
    models: tuple[str, ...] | None = None
    refused: bool = False
    when: Callable[[Any], bool] = lambda _: True
    compiles: bool = False

    def on(self, technique: Any) -> tuple[str, ...]:
        """The models to check a technique on."""
        if not self.when(technique):
            return ()
        if self.models == ():
            return (NO_MODEL,)
        refuses = getattr(technique, "refuses", {})
        named = technique.models if self.models is None else self.models
        return tuple(
            name
            for name in available()
            if name in named and name in technique.models and (name in refuses) == self.refused
        )
