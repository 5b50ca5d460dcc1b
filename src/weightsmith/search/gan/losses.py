"""The hinge loss of GANs and one training step of each side; arXiv 1705.02894, and EAGAN's code."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.core.errors import UsageError
from weightsmith.search.supernet import zero_unsampled_grads_

Network = Callable[[Tensor], Tensor]


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """``mean(relu(1 - real)) + mean(relu(1 + fake))`` in float32 at least.

    Args:
        real: Scores of real images, any shape.
        fake: Scores of generated images.
    """
    return F.relu(1 - _wide(real)).mean() + F.relu(1 + _wide(fake)).mean()


def generator_loss(fake: Tensor) -> Tensor:
    """``-mean(fake)`` in float32 at least."""
    return -_wide(fake).mean()


def discriminator_step(
    discriminator: Network,
    generator: Network,
    optimizer: torch.optim.Optimizer,
    real: Tensor,
    z: Tensor,
    *,
    clip_norm: float | None = None,
    zero_unsampled: bool = False,
) -> float:
    """One step of the discriminator.

    The discriminator is called twice, on real images and on generated ones; the generator runs without gradients, in
    the mode it is in, so that running statistics advance here too. Where the loss is not finite no step is taken.

    Args:
        discriminator: ``(B, C, H, W) -> (B, 1)``.
        generator: ``(B, L) -> (B, C, H, W)``.
        optimizer: Of the discriminator.
        real: ``(B, C, H, W)`` in [-1, 1].
        z: ``(B, L)``.
        clip_norm: Largest norm of the gradient.
        zero_unsampled: See `weightsmith.search.supernet.zero_unsampled_grads_`.

    Returns:
        The loss.

    Raises:
        UsageError: The batch is empty.
    """
    _check(real)
    with torch.no_grad():
        fake = generator(z)
    return _step(discriminator_loss(discriminator(real), discriminator(fake)), optimizer, clip_norm, zero_unsampled)


def generator_step(
    discriminator: Network,
    generator: Network,
    optimizer: torch.optim.Optimizer,
    z: Tensor,
    *,
    clip_norm: float | None = None,
    zero_unsampled: bool = False,
) -> float:
    """One step of the generator; arguments as for `discriminator_step`.

    The discriminator gets gradients too, which its next step drops.
    """
    _check(z)
    return _step(generator_loss(discriminator(generator(z))), optimizer, clip_norm, zero_unsampled)


def norms_of(*models: nn.Module) -> list[nn.Module]:
    """The BatchNorm layers of networks."""
    return [module for model in models for module in model.modules() if isinstance(module, nn.BatchNorm2d)]


def statistics_of(norms: Sequence[nn.Module]) -> list[Tensor]:
    """Copies of running statistics: a step whose loss is not finite may spoil them, although it is not taken."""
    return [buffer.clone() for module in norms for buffer in module.buffers()]


def restore_statistics_(norms: Sequence[nn.Module], before: Sequence[Tensor]) -> None:
    """Put back what `statistics_of` kept."""
    for value, kept in zip((buffer for module in norms for buffer in module.buffers()), before, strict=True):
        value.copy_(kept)


def _step(loss: Tensor, optimizer: torch.optim.Optimizer, clip_norm: float | None, zero_unsampled: bool) -> float:
    value = loss.item()
    if not torch.isfinite(loss):
        return value  # one bad sub-network must not reach weights that others share
    optimizer.zero_grad()
    loss.backward()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not _finite(parameter.grad for parameter in parameters):
        optimizer.zero_grad()
        return float("nan")
    if clip_norm is not None:
        torch.nn.utils.clip_grad_norm_(parameters, clip_norm)
    if zero_unsampled:
        zero_unsampled_grads_(optimizer)
    optimizer.step()
    return value


def _finite(gradients: Iterable[Tensor | None]) -> bool:
    there = [gradient for gradient in gradients if gradient is not None]
    return not there or bool(torch.isfinite(torch.stack(torch._foreach_norm(there)).sum()))


def _check(batch: Tensor) -> None:
    if not len(batch):
        raise UsageError("a training step needs at least one example, got an empty batch")


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
