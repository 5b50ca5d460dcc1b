"""A multilayer perceptron on flattened images."""

from torch import nn


def mlp(*, channels: int, size: int, classes: int, width: int = 128) -> nn.Sequential:
    """Flatten, two hidden layers with ReLU, a linear head.

    Args:
        channels: Of the images.
        size: Height and width of the images.
        classes: Number of logits.
        width: Of the hidden layers.
    """
    return nn.Sequential(
        nn.Flatten(),
        nn.Linear(channels * size * size, width),
        nn.ReLU(),
        nn.Linear(width, width),
        nn.ReLU(),
        nn.Linear(width, classes),
    )
