"""What happens to a photograph: noise, haze, rain.

Images are uint8 ``(H, W, 3)``; everything random follows from the generator that is given.
"""

import numpy as np
from numpy.typing import NDArray

Image = NDArray[np.uint8]
DEGRADATIONS = ("noise", "haze", "rain")

_RAIN_SHARE, _RAIN_LENGTH, _RAIN_STRENGTH = 0.01, 9, 0.6


def add_noise(image: Image, sigma: float, normal: NDArray[np.float64]) -> Image:
    """``clip(x + sigma * N(0, 1), 0, 255)``, cut off to whole numbers as in the authors' code.

    Args:
        image: ``(H, W, 3)``.
        sigma: In gray levels: 15, 25 or 50.
        normal: Standard normal numbers of the image's shape.
    """
    return np.clip(image + normal * sigma, 0, 255).astype(np.uint8)


def add_haze(image: Image, generator: np.random.Generator) -> Image:
    """``I = J t + A (1 - t)`` with ``t = exp(-beta d)``: depth falls from 1 at the top to 0.4."""
    height = len(image)
    beta, light = generator.uniform(0.6, 1.2), generator.uniform(0.7, 1.0)
    depth = np.linspace(1.0, 0.4, height)[:, None, None] + generator.uniform(0.0, 0.3)
    through = np.exp(-beta * depth)
    return np.clip(image * through + 255 * light * (1 - through), 0, 255).astype(np.uint8)


def add_rain(image: Image, generator: np.random.Generator) -> Image:
    """Streaks: 1 % of the pixels, smeared over 9 pixels along a slanted line, added with strength 0.6."""
    height, width = image.shape[:2]
    drops = generator.random((height, width)) < _RAIN_SHARE
    slope = generator.uniform(-0.4, 0.4)
    streaks = np.zeros((height, width))
    for step in range(_RAIN_LENGTH):
        shifted = np.roll(drops, (step, round(step * slope)), axis=(0, 1))
        streaks = np.maximum(streaks, shifted)
    return np.clip(image + 255 * _RAIN_STRENGTH * streaks[..., None], 0, 255).astype(np.uint8)


def degrade(image: Image, kind: str, generator: np.random.Generator, sigma: float = 25) -> Image:
    """One of the three."""
    if kind == "noise":
        return add_noise(image, sigma, generator.standard_normal(image.shape))
    return add_haze(image, generator) if kind == "haze" else add_rain(image, generator)
