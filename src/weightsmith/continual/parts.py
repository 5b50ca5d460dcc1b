"""Which parameters are averaged, as a model may change them, and how they change places with their average."""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.continual.averaged import Part, check_whole, named_trainable, parts_of
from weightsmith.core.errors import UsageError, near


class Parts:
    """The averages of a model's trainable parameters.

    Args:
        params: A model, parameters, or pairs of name and parameter.
        mode: Of the average; a fixed one needs no gradients.
        dtype: Least precision.
        cpu: Whether the averages are kept in main memory.

    Attributes:
        model: The model, where one was given.

    Raises:
        UsageError: Nothing is trainable, or parameters are sharded.
    """

    def __init__(self, params: nn.Module | Iterable[Any], *, mode: str, dtype: torch.dtype, cpu: bool) -> None:
        self.model = params if isinstance(params, nn.Module) else None
        self._given: list[Any] = [] if isinstance(params, nn.Module) else list(params)
        self._mode, self._dtype, self._cpu = mode, dtype, cpu
        self._parts: list[Part] = []
        self._live: dict[str, Tensor] | None = None
        self._known: list[tuple[str, int, int]] = []
        self._scan()
        if not self._parts:
            raise UsageError("params has no trainable parameter: set requires_grad before the task starts")

    def __iter__(self) -> Iterator[Part]:
        """The parts."""
        return iter(self._parts)

    @property
    def exchanged(self) -> bool:
        """Whether the model holds the average now."""
        return self._live is not None

    @property
    def average(self) -> dict[str, Tensor]:
        """The averages by name, views of the state."""
        return {name: tensor for part in self._parts for name, tensor in part.views(part.average)}

    def follow(self) -> None:
        """Start averaging what has become trainable, from its current value, and take note of replaced parameters.

        Raises:
            UsageError: A parameter has another shape than before, or is sharded.
        """
        # telling tied parameters apart takes longer than this comparison, and hardly ever finds anything new
        now = [(name, id(p), p.data_ptr()) for name, p in self._trainable() if p.requires_grad]
        if now != self._known:
            self._scan()
            self._known = now

    def _trainable(self) -> Iterator[tuple[str, Tensor]]:
        if self.model is not None:
            return self.model.named_parameters()
        return ((str(at), item[1] if isinstance(item, tuple) else item) for at, item in enumerate(self._given))

    def _scan(self) -> None:
        held = {name: (part, at) for part in self._parts for at, name in enumerate(part.names)}
        new = []
        for name, parameter in named_trainable(self.model if self.model is not None else self._given):
            part, at = held.get(name, (None, 0))
            if part is None:
                check_whole(name, parameter)
                new.append((name, parameter))
            elif part.parameters[at] is not parameter:
                if part.parameters[at].shape != parameter.shape:
                    raise UsageError(f"{name} has another shape than before, {tuple(parameter.shape)}: start anew")
                part.parameters[at] = parameter
        self._parts += parts_of(new, mode=self._mode, dtype=self._dtype, cpu=self._cpu)

    def check_finite(self) -> None:
        """Refuse numbers that are not finite.

        Raises:
            RuntimeError: Names the parameter.
        """
        for part in self._parts:
            for name, parameter in part.named():
                values = [parameter] if parameter.grad is None else [parameter, parameter.grad]
                if parameter.requires_grad and not all(bool(value.isfinite().all()) for value in values):
                    raise RuntimeError(f"{name} or its gradient is not finite: lower the learning rate")

    @torch.no_grad()
    def swap(self) -> None:
        """Put the average into the model.

        Raises:
            UsageError: It is there already.
        """
        if self._live is not None:
            raise UsageError("live and averaged weights are exchanged already")
        self.follow()  # PEFT replaces parameters when it loads a checkpoint
        live = {name: p.detach().clone() for part in self._parts for name, p in part.named()}
        self.copy_to_model()
        self._live = live

    @torch.no_grad()
    def restore(self) -> None:
        """Undo `swap`, to the last bit.

        Raises:
            UsageError: There was none.
        """
        if self._live is None:
            raise UsageError("there is nothing to restore: swap was not called")
        for part in self._parts:
            for name, parameter in part.named():
                parameter.copy_(self._live[name])
        self._live = None

    @torch.no_grad()
    def copy_to_model(self) -> None:
        """Make the average the parameters.

        Raises:
            UsageError: Live and averaged weights are exchanged.
        """
        if self._live is not None:
            raise UsageError("live and averaged weights are exchanged: call restore first")
        self.follow()
        for part in self._parts:
            for parameter, star in zip(part.parameters, part.averages, strict=True):
                parameter.copy_(star)

    def load(self, held: Mapping[str, Mapping[str, Tensor]]) -> None:
        """Take back what `Part.state` gave.

        Raises:
            UsageError: It is of other parameters; nothing has been changed.
        """
        shapes = {name: p.shape for part in self._parts for name, p in part.named()}
        for name in (*shapes, *held):
            if name not in held or name not in shapes:
                raise UsageError(f"the state is of other parameters: {name}; {near(name, held)}")
            if held[name]["average"].shape != shapes[name]:
                raise UsageError(
                    f"the state has {name} as {tuple(held[name]['average'].shape)}, the model as {tuple(shapes[name])}"
                )
        for part in self._parts:
            part.load(held)
