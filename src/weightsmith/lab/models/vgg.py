"""VGG with batch norm (Simonyan and Zisserman 2014, arXiv 1409.1556, table 1, configurations D and E)."""

from collections.abc import Sequence

from torch import nn

from weightsmith.lab.models.resnet import SMALL, kaiming_


def vgg(*, channels: int, size: int, classes: int, depths: Sequence[int]) -> nn.Sequential:
    """Five stages of 3x3 convolutions with batch norm and ReLU, each ended by a max pool, then the classifier.

    Images of at most 64 pixels get one linear layer on the average pool as classifier, and stages do without their pool
    once a single pixel is left; larger ones get the paper's two hidden layers of 4096 units with dropout.

    Args:
        channels: Of the images.
        size: Of the images.
        classes: Number of logits.
        depths: Convolutions per stage.
    """
    layers: list[nn.Module] = []
    before, side = channels, size
    for depth, width in zip(depths, (64, 128, 256, 512, 512), strict=True):
        for _ in range(depth):
            layers += [nn.Conv2d(before, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
            before = width
        if side > 1:
            layers.append(nn.MaxPool2d(2))
            side //= 2
    if size <= SMALL:
        return kaiming_(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes)))
    hidden = [nn.Linear(before * 49, 4096), nn.ReLU(), nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(), nn.Dropout()]
    return kaiming_(nn.Sequential(*layers, nn.AdaptiveAvgPool2d(7), nn.Flatten(), *hidden, nn.Linear(4096, classes)))
