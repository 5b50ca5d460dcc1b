"""A convolutional network that trains in seconds on a laptop."""

from torch import nn


def convnet(*, channels: int, size: int, classes: int) -> nn.Sequential:  # noqa: ARG001 - any size will do
    """Four blocks of 3x3 convolution (no bias), batch norm and ReLU, global average pool, a linear head.

    The widths are 16, 32, 32, 64; the first and the third block halve the resolution.

    Args:
        channels: Of the images.
        size: Of the images; any.
        classes: Number of logits.
    """
    widths, strides = (channels, 16, 32, 32, 64), (2, 1, 2, 1)
    blocks = [
        nn.Sequential(nn.Conv2d(before, after, 3, stride, 1, bias=False), nn.BatchNorm2d(after), nn.ReLU())
        for before, after, stride in zip(widths, widths[1:], strides, strict=False)
    ]
    return nn.Sequential(*blocks, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], classes))
