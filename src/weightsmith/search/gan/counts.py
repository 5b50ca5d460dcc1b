"""Trainable scalars of stand-alone networks in closed form: microseconds instead of building a network to count it.

Operations that a genotype names count also where nothing uses their result, as in the authors' code.
"""

from typing import Any

from weightsmith.search.gan.genotypes import CELLS, DISCRIMINATOR_SPACE, GENERATOR_SPACE
from weightsmith.search.gan.operations import DOWN, NORMAL

_UPS, _FIRST_DOWN = 2, 5


def generator_parameters(
    genotype: Any, *, channels: int = 256, bottom: int = 4, latent: int = 120, image_channels: int = 3
) -> int:
    """Number of parameters of ``Generator(genotype, ...)``.

    Args:
        genotype: A valid genotype.
        channels: As there.
        bottom: As there.
        latent: As there.
        image_channels: As there.

    Raises:
        UsageError: The genotype is invalid.
    """
    c, total = channels, 0
    for cell in GENERATOR_SPACE.check(genotype):
        total += sum(9 * c + c * c if index == 2 else c * c + c for index in cell[:_UPS])
        total += sum(_convolution(c, NORMAL, index) for index in cell[_UPS:])
    skips = CELLS * (c * c + c)
    entries = (latent // CELLS + 1) * 21 * bottom**2 * c
    return total + skips + entries + 2 * c + 9 * c * image_channels + image_channels


def discriminator_parameters(genotype: Any, *, channels: int = 128, image_channels: int = 3) -> int:
    """Number of parameters of ``Discriminator(genotype, ...)``.

    Args:
        genotype: A valid genotype.
        channels: As there.
        image_channels: As there.

    Raises:
        UsageError: The genotype is invalid.
    """
    d, total = channels, 0
    for cell in DISCRIMINATOR_SPACE.check(genotype):
        total += sum(_convolution(d, NORMAL, index) for index in cell[:_FIRST_DOWN])
        total += sum(_convolution(d, DOWN, index) for index in cell[_FIRST_DOWN:])
    stem = (9 * image_channels * d + d) + (9 * d * d + d) + (image_channels * d + d)
    return total + stem + d


def _convolution(channels: int, kernels: dict[int, tuple[int, int]], index: int) -> int:
    kernel = kernels[index][0] if index in kernels else 0
    return kernel**2 * channels**2 + channels if kernel else 0
