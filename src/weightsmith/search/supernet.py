"""A super-network: every candidate of every choice, each with its own weights; a genotype says which ones run.

A sub-network inherits by indexing: its weight for a choice is the super-network's weight of the chosen candidate, and
everything outside the choices is shared by all. Only the chosen candidate of a choice is executed (single path).
"""

import copy
from collections.abc import Iterator, Mapping
from typing import Any, Self, cast

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.search.space import Genotype, SearchSpace

_MOST_KNOWN = 100_000


class Choice(nn.Module):
    """The candidates of one gene.

    Candidates are called ``op0``, ``op1`` ...: their names in a state dict are those of the genotype's indices.

    Args:
        candidates: Modules by index. An index without weights (an identity, a pooling) is a module too; one that is
            missing, such as ``none``, cannot be executed.

    Shape:
        As the chosen candidate's.
    """

    def __init__(self, candidates: Mapping[int, nn.Module]) -> None:
        super().__init__()
        for index, module in candidates.items():
            self.add_module(f"op{index}", module)

    def forward(self, x: Tensor, index: int) -> Tensor:
        """Run the candidate ``index`` on ``x``."""
        chosen: Any = self._modules.get(f"op{index}")
        if chosen is None:
            held = ", ".join(name.removeprefix("op") for name, module in self._modules.items() if module is not None)
            raise UsageError(f"candidate {index} is not in this network; it holds {held or 'none'}")
        made: Tensor = chosen(x)
        return made

    def candidates(self) -> Iterator[tuple[int, nn.Module]]:
        """Indices and modules of the candidates that are there."""
        for name, module in self._modules.items():
            if module is not None:
                yield int(name.removeprefix("op")), module


class SuperNet(nn.Module):
    """Base class of networks whose architecture is an argument: ``forward(x, genotype)``.

    A subclass sets ``space`` and, in `choices`, says which `Choice` belongs to which gene. A network that holds the
    candidates of one genotype only (`subnet`) runs without the argument.

    Attributes:
        space: The genotypes.
        genotype: The one that this network is limited to; ``None``: a super-network.
    """

    space: SearchSpace

    def __init__(self) -> None:
        super().__init__()
        self.genotype: Genotype | None = None
        self._known: set[Genotype] = set()

    def choices(self) -> Iterator[tuple[int, int, Choice]]:
        """Yield ``(cell, gene, choice)``."""
        raise NotImplementedError

    def chosen(self, genotype: Any = None) -> Genotype:
        """The genotype to run: the argument, checked, or the one that this network is limited to."""
        if genotype is None:
            if self.genotype is None:
                raise UsageError("a super-network runs one genotype at a time: pass forward a genotype")
            return self.genotype
        # each is checked once: doing it in every step would cost as much as a small layer
        plain = isinstance(genotype, tuple) and all(isinstance(cell, tuple) for cell in genotype)
        if plain and genotype in self._known:
            return cast(Genotype, genotype)
        checked = self.space.check(genotype)
        if len(self._known) < _MOST_KNOWN:
            self._known.add(checked)
        return checked

    def subnet(self, genotype: Any, *, inherit: bool = True) -> Self:
        """Copy out the stand-alone network of a genotype.

        Args:
            genotype: Which candidates it holds.
            inherit: Take the weights over; otherwise the copy calls `initialize_`.

        Returns:
            A network of the same class with an ordinary state dict that holds the chosen candidates and what is shared.

        Raises:
            UsageError: The genotype is invalid, or a candidate is not in this network.
        """
        chosen = self.space.check(genotype)
        memo: dict[int, Any] = {}
        for cell, gene, choice in self.choices():
            for index, module in choice.candidates():
                if index != chosen[cell][gene]:
                    memo[id(module)] = None  # deepcopy leaves out what it believes to have copied as None
        made = copy.deepcopy(self, memo)
        made.genotype = chosen
        return made if inherit else made.initialize_()

    def initialize_(self) -> Self:
        """Draw new weights from torch's global generator; by default with the ``reset_parameters`` of every module."""
        for module in self.modules():
            reset: Any = getattr(module, "reset_parameters", None)
            if module is not self and reset is not None:
                reset()
        return self

    def subnet_state_dict(self, genotype: Any) -> dict[str, Tensor]:
        """The entries of this network's state dict that `subnet` holds; tensors are not copied."""
        chosen = self.space.check(genotype)
        names = {id(module): name for name, module in self.named_modules()}
        left_out = tuple(
            f"{names[id(module)]}."
            for cell, gene, choice in self.choices()
            for index, module in choice.candidates()
            if index != chosen[cell][gene]
        )
        return {name: value for name, value in self.state_dict().items() if not name.startswith(left_out)}


def count_parameters(model: nn.Module) -> int:
    """Number of trainable scalars."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def zero_unsampled_grads_(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Give zero gradients to the parameters that an optimizer has moved before and that have none now.

    Adam then lets their second moment decay, as frameworks did whose ``zero_grad`` wrote zeros: with ``beta1 = 0`` an
    operation that is used every k-th step takes steps ``sqrt((1 - beta2**k) / (1 - beta2))`` times as large. Call it
    between ``backward`` and ``step``.
    """
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.grad is None and optimizer.state.get(parameter):
                parameter.grad = torch.zeros_like(parameter)
    return optimizer
