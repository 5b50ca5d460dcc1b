"""What a step of an average measures and moves: tensor by tensor on a CPU, as a whole on other devices.

On a CPU small temporaries stay in its cache, and a sum of absolute values is faster than torch's L1 norm; elsewhere few
large kernels are.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from weightsmith.continual.averaged import Part


class Apart:
    """The tensors of a part one by one."""

    def __init__(self, part: Part) -> None:
        self._part = part
        self._gradients: list[Tensor | None] = [None if p.grad is None else self._here(p.grad) for p in part.parameters]
        self._live = [self._here(p) for p in part.parameters]
        # one scratch for all tensors: a fresh one for each difference would be memory that no cache holds yet
        scratch = part.average.new_empty(max(part.sizes))
        shapes = {p.shape: p.numel() for p in part.parameters}
        self._scratch = {shape: scratch[:size].view(shape) for shape, size in shapes.items()}

    def _here(self, tensor: Tensor) -> Tensor:
        tensor = tensor if tensor.layout == torch.strided else tensor.to_dense()
        return tensor if tensor.device == self._part.average.device else tensor.to(self._part.average.device)

    def norms(self) -> tuple[Tensor, Tensor, Tensor]:
        """L1 norms ``(p,)`` of the gradients, of their changes and of the distances."""
        part, scratch = self._part, self._scratch
        lasts: Sequence[Tensor | None] = part.gradients or [None] * len(part.sizes)
        size, change, distance = [], [], []
        for p, star, gradient, last in zip(self._live, part.averages, self._gradients, lasts, strict=True):
            room = scratch[p.shape]  # differences in its precision, also of parameters in 16 bits
            distance.append(torch.sub(p, star, out=room).abs_().sum())
            seen = last if gradient is None else gradient
            size.append(None if seen is None else room.copy_(seen).abs_().sum())
            change.append(
                None if gradient is None or last is None else torch.sub(gradient, last, out=room).abs_().sum()
            )
        return _stacked(size), _stacked(change), _stacked(distance)

    def remember(self, finite: Tensor) -> None:
        """Keep the gradients of the parameters that ``finite`` names, ``(p,)``; they have one."""
        pairs = zip(self._part.gradients, self._gradients, finite.tolist(), strict=True)
        chosen = [(last, gradient) for last, gradient, wanted in pairs if wanted and gradient is not None]
        if chosen:
            torch._foreach_copy_([last for last, _ in chosen], [gradient for _, gradient in chosen])
        self._part.known |= finite

    def move(self, alpha: Tensor, active: Tensor) -> None:
        """Add ``alpha`` times the distance to the average of every active parameter."""
        stars, weights = self._part.averages, alpha.tolist()
        for star, p, weight, moves in zip(stars, self._live, weights, active.tolist(), strict=True):
            if moves:
                star.lerp_(p if p.dtype == star.dtype else p.to(star.dtype), weight)


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


def _stacked(norms: Sequence[Tensor | None]) -> Tensor:
    return torch.tensor([0.0 if norm is None else norm.item() for norm in norms], dtype=torch.float64)


def _dense(gradient: Tensor) -> Tensor:
    return gradient.detach().to_dense() if gradient.layout != torch.strided else gradient.detach()
