"""Scores of generators, each with the fingerprint without which it means nothing.

With Inception's features scores are called IS, FID and KID; with any other network's CS, FCD and KCD. Scores are
compared only where network, resize filter, number of samples and precision agree.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.search.gan.judges import FeatureNetwork, check_bytes
from weightsmith.search.gan.metrics import Moments, frechet_distance, inception_score, kernel_distance, moments

_BATCH, _RECALIBRATION_BATCHES = 100, 4
_FAILED_DISTANCE, _FAILED_SCORE = 1e9, 1.0


class NotFinite(ArithmeticError):
    """A generator is broken: its images cannot be scored."""


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """What a score depends on beside the generator."""

    network: str
    weights: str
    resize: str
    samples: int
    real_samples: int
    dtype: str

    def check(self, other: "Fingerprint") -> None:
        """Refuse a comparison of scores that are not of one measure.

        Raises:
            UsageError: Names what differs.
        """
        for entry in fields(self):
            mine, its = getattr(self, entry.name), getattr(other, entry.name)
            if mine != its:
                raise UsageError(f"scores with different {entry.name} cannot be compared: {mine} and {its}")


@dataclass(frozen=True, slots=True)
class Scores:
    """Scores of one generator.

    Attributes:
        inception: IS or CS: higher is better.
        inception_std: Its standard deviation over splits.
        distance: FID or FCD: lower is better.
        kernel: KID or KCD where it was asked for.
        failed: An image or a score was not finite; the scores are then the worst ones.
        names: What the first, third and fourth are called.
        fingerprint: What they depend on.
    """

    inception: float
    inception_std: float
    distance: float
    kernel: float | None
    failed: bool
    names: tuple[str, str, str]
    fingerprint: Fingerprint

    def better_than(self, other: "Scores") -> bool:
        """Whether the distance is smaller.

        Raises:
            UsageError: The fingerprints differ.
        """
        self.fingerprint.check(other.fingerprint)
        return self.distance < other.distance


@dataclass(frozen=True, slots=True)
class Reference:
    """Features of real images: computed once, then compared with."""

    network: FeatureNetwork
    moments: Moments
    features: Tensor

    @classmethod
    def of(cls, images: Tensor, network: FeatureNetwork) -> "Reference":
        """Take the features of real images, uint8 ``(N, C, H, W)``: the training split."""
        check_bytes(images)
        features, _ = _judged(images, network)
        return cls(network, moments(features), features)


def score(images: Tensor, reference: Reference, *, splits: int = 10, kernel: bool = False) -> Scores:
    """Score generated images.

    Args:
        images: uint8 ``(N, C, H, W)``.
        reference: The real ones.
        splits: Of the Inception Score.
        kernel: Also compute the kernel distance.

    Raises:
        UsageError: There are fewer than two images, or they are no bytes.
    """
    check_bytes(images)
    network = reference.network
    features, probabilities = _judged(images, network)
    mean, std = inception_score(probabilities, splits=min(splits, len(images)))
    distance = frechet_distance(moments(features), reference.moments)
    size = min(1000, len(features), len(reference.features))
    found = kernel_distance(features, reference.features, subset_size=size)[0] if kernel else None
    failed = not (math.isfinite(mean) and math.isfinite(distance))
    return Scores(
        mean if not failed else _FAILED_SCORE, std, distance if not failed else _FAILED_DISTANCE, found, failed,
        ("IS", "FID", "KID") if network.inception else ("CS", "FCD", "KCD"),
        Fingerprint(
            network.name, network.digest, network.resize, len(images), reference.moments.samples, network.dtype
        ),
    )  # fmt: skip


@torch.no_grad()
def generate(
    generator: Callable[[Tensor], Tensor], number: int, latent: int, *, seed: int, device: str = "cpu"
) -> Tensor:
    """Make exactly ``number`` images as bytes: ``clamp(127.5 x + 127.5, 0, 255)``, cut off behind the point.

    Args:
        generator: ``(B, latent) -> (B, C, H, W)`` in [-1, 1], in evaluation mode.
        number: How many, at least 2.
        latent: Length of ``z``.
        seed: Of the latents: the same seed gives every generator the same ones.
        device: Where the generator is.

    Returns:
        uint8 ``(number, C, H, W)`` on the CPU.

    Raises:
        NotFinite: The generator made a value that is not finite.
    """
    if number < 2:
        raise UsageError(f"number must be at least 2, since a covariance needs two images, got {number}")
    source = torch.Generator().manual_seed(seed % 2**63)
    made = []
    for begin in range(0, number, _BATCH):
        z = torch.randn(min(_BATCH, number - begin), latent, generator=source).to(device)
        images = generator(z)
        if not torch.isfinite(images).all():
            raise NotFinite("the generator made values that are not finite")
        made.append(to_bytes(images).cpu())
    return torch.cat(made)


def to_bytes(images: Tensor) -> Tensor:
    """Images in [-1, 1] as uint8, by truncation."""
    return images.float().mul(127.5).add(127.5).clamp(0, 255).to(torch.uint8)


@torch.no_grad()
def recalibrate_(generator: nn.Module, latent: int, *, seed: int) -> nn.Module:
    """Give the BatchNorm layers of a stand-alone generator the statistics of its own activations.

    Running statistics of a super-network mix all sub-networks; scores with them can be several times too high. The
    statistics are reset and averaged over 4 batches of 100 latents.

    Returns:
        The generator, in evaluation mode.
    """
    norms = [module for module in generator.modules() if isinstance(module, nn.BatchNorm2d)]
    before = [module.momentum for module in norms]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # a cumulative average
    source = torch.Generator().manual_seed(seed % 2**63)
    parameter = next(generator.parameters())
    generator.train()
    for _ in range(_RECALIBRATION_BATCHES):
        generator(torch.randn(_BATCH, latent, generator=source).to(parameter))
    for module, momentum in zip(norms, before, strict=True):
        module.momentum = momentum
    return generator.eval()


@torch.no_grad()
def _judged(images: Tensor, network: FeatureNetwork) -> tuple[Tensor, Tensor]:
    found = [network(part) for part in images.split(_BATCH)]
    features, probabilities = zip(*found, strict=True)
    return torch.cat(features), torch.cat(probabilities)
