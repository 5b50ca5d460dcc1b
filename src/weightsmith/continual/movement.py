"""What a step of an average measures and moves: tensor by tensor on a CPU, as a whole on other devices.

On a CPU small temporaries stay in its cache, and a sum of absolute values is faster than torch's L1 norm; elsewhere few
large kernels are.
"""

import torch
from torch import Tensor

from weightsmith.continual.averaged import Part


class Apart:
    """The tensors of a part one by one."""

    def __init__(self, part: Part) -> None:
        self._part = part
        to, device = part.average.dtype, part.average.device
        self._averages = _views(part, part.average)
        self._previous = None if part.previous is None else _views(part, part.previous)
        before = self._previous if self._previous is not None else map(torch.zeros_like, self._averages)
        self._gradients = [
            last if p.grad is None else _dense(p.grad).to(device=device, dtype=to)
            for p, last in zip(part.parameters, before, strict=True)
        ]
        self._live = [p.detach().to(device=device, dtype=to) for p in part.parameters]

    def norms(self) -> tuple[Tensor, Tensor, Tensor]:
        """L1 norms ``(p,)`` of the gradients, of their changes and of the distances."""
        size = [gradient.abs().sum() for gradient in self._gradients]
        distance = [(p - star).abs_().sum() for p, star in zip(self._live, self._averages, strict=True)]
        change = [torch.zeros_like(norm) for norm in size]
        if self._previous is not None:
            pairs = zip(self._gradients, self._previous, strict=True)
            change = [(gradient - last).abs_().sum() for gradient, last in pairs]
        return torch.stack(size).double(), torch.stack(change).double(), torch.stack(distance).double()

    def remember(self, finite: Tensor) -> None:
        """Keep the gradients of the parameters that ``finite`` names, ``(p,)``."""
        assert self._previous is not None
        chosen = finite.tolist()
        if any(chosen):
            torch._foreach_copy_(_where(chosen, self._previous), _where(chosen, self._gradients))
        self._part.known |= finite

    def move(self, alpha: Tensor, active: Tensor) -> None:
        """Add ``alpha`` times the distance to the average of every active parameter."""
        for star, p, weight, moves in zip(self._averages, self._live, alpha.tolist(), active.tolist(), strict=True):
            if moves:
                star.lerp_(p, weight)


class Whole:
    """The flat buffers of a part at once; see `Apart`."""

    def __init__(self, part: Part) -> None:
        self._part = part
        before = part.previous if part.previous is not None else torch.zeros_like(part.average)
        parts = zip(part.parameters, torch.split(before, part.sizes), strict=True)
        self._gradient = self._flat([last if p.grad is None else _dense(p.grad) for p, last in parts])
        self._distances = self._flat([p.detach() for p in part.parameters]).sub_(part.average)

    def norms(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `Apart.norms`."""
        size, distance = self._norms(self._gradient), self._norms(self._distances)
        previous = self._part.previous
        change = torch.zeros_like(size) if previous is None else self._norms(self._gradient - previous)
        return size, change, distance

    def remember(self, finite: Tensor) -> None:
        """See `Apart.remember`."""
        assert self._part.previous is not None
        torch.where(self._each(finite), self._gradient, self._part.previous, out=self._part.previous)
        self._part.known |= finite

    def move(self, alpha: Tensor, active: Tensor) -> None:
        """See `Apart.move`; a product with 0 would let a number in that is not finite."""
        scaled = self._distances.mul_(self._each(alpha.to(self._distances.dtype)))
        self._part.average += scaled.masked_fill_(~self._each(active), 0)

    def _flat(self, tensors: list[Tensor]) -> Tensor:
        average = self._part.average
        return torch.cat([tensor.reshape(-1).to(device=average.device, dtype=average.dtype) for tensor in tensors])

    def _norms(self, flat: Tensor) -> Tensor:
        norms = torch.stack(torch._foreach_norm(torch.split(flat, self._part.sizes), 1))
        return norms if flat.device.type == "mps" else norms.double()

    def _each(self, values: Tensor) -> Tensor:
        """A value per parameter as one per element."""
        return values.repeat_interleave(self._part.counts, output_size=len(self._part.average))


def movement(part: Part) -> Apart | Whole:
    """What fits the device of a part."""
    return Apart(part) if part.average.device.type == "cpu" else Whole(part)


def _views(part: Part, flat: Tensor) -> list[Tensor]:
    return [values for _, values in part.views(flat)]


def _where(chosen: list[bool], tensors: list[Tensor]) -> list[Tensor]:
    return [tensor for tensor, wanted in zip(tensors, chosen, strict=True) if wanted]


def _dense(gradient: Tensor) -> Tensor:
    return gradient.detach().to_dense() if gradient.layout != torch.strided else gradient.detach()
