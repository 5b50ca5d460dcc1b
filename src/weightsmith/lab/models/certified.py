"""The networks of certified training (arXiv 2103.17268): batch norm everywhere, no pooling, one hidden linear layer."""

from collections.abc import Sequence

from torch import Tensor, nn


def _conv(before: int, after: int, kernel: int, stride: int = 1, groups: int = 1) -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(before, after, kernel, stride, kernel // 2, groups=groups), nn.BatchNorm2d(after))


def _classifier(features: int, hidden: int, classes: int) -> list[nn.Module]:
    return [nn.Flatten(), nn.Linear(features, hidden), nn.BatchNorm1d(hidden), nn.ReLU(), nn.Linear(hidden, classes)]


def cnn7(*, channels: int, size: int, classes: int, width: int = 64, hidden: int = 512) -> nn.Sequential:
    """Five 3x3 convolutions, of which the third (of images of 64 pixels the fifth too) has stride 2, and two linear
    layers.

    Args:
        channels: Of the images.
        size: Of the images.
        classes: Number of logits.
        width: Of the first two convolutions; the others have twice as many channels.
        hidden: Units between the linear layers.
    """
    strides = (1, 1, 2, 1, 2 if size >= 64 else 1)
    layers: list[nn.Module] = []
    before, side = channels, size
    for after, stride in zip((width, width, *[2 * width] * 3), strides, strict=True):
        layers += [*_conv(before, after, 3, stride), nn.ReLU()]
        before, side = after, -(-side // stride)
    return nn.Sequential(*layers, *_classifier(before * side**2, hidden, classes))


def small_cnn(*, channels: int, size: int, classes: int) -> nn.Sequential:
    """Two 4x4 convolutions with stride 2, of 16 and 32 channels, and two linear layers: trains in minutes."""
    kernel, stride = (4, 2) if size >= 4 else (3, 1)  # smaller images cannot be halved twice
    side = size // stride // stride
    layers: list[nn.Module] = []
    for before, after in ((channels, 16), (16, 32)):
        layers += [nn.Conv2d(before, after, kernel, stride, 1), nn.BatchNorm2d(after), nn.ReLU()]
    return nn.Sequential(*layers, *_classifier(32 * side**2, 100, classes))


class _Block(nn.Module):
    """``relu(body(x) + shortcut(x))``; the shortcut is a 1x1 convolution with batch norm where shapes differ."""

    def __init__(self, body: nn.Sequential, before: int, after: int, stride: int) -> None:
        super().__init__()
        self.body = body
        self.shortcut = nn.Sequential() if before == after and stride == 1 else _conv(before, after, 1, stride)
        self.act = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.act(self.body(x) + self.shortcut(x))
        return out


def wide_resnet8(*, channels: int, size: int, classes: int, stem: int = 16, widen: int = 8) -> nn.Sequential:
    """Three basic blocks of widths 16, 32 and 64 times ``widen``, and two linear layers.

    Args:
        channels: Of the images.
        size: Of the images.
        classes: Number of logits.
        stem: Channels of the first convolution.
        widen: Factor of the widths.
    """
    layers: list[nn.Module] = [*_conv(channels, stem, 3), nn.ReLU()]
    before, side = stem, size
    for base, stride in ((16, 1), (32, 2), (64, 2)):
        after = base * widen
        body = nn.Sequential(*_conv(before, after, 3, stride), nn.ReLU(), *_conv(after, after, 3))
        layers.append(_Block(body, before, after, stride))
        before, side = after, -(-side // stride)
    return nn.Sequential(*layers, *_classifier(before * side**2, 512, classes))


def resnext_certified(
    *, channels: int, size: int, classes: int, blocks: Sequence[int] = (1, 1, 1), cardinality: int = 2, width: int = 32,
    stem: int = 64,
) -> nn.Sequential:  # fmt: skip
    """Three stages of ResNeXt bottlenecks with expansion 2, and two linear layers.

    Args:
        channels: Of the images.
        size: Of the images.
        classes: Number of logits.
        blocks: Per stage.
        cardinality: Groups of the 3x3 convolutions.
        width: Channels per group in the first stage; it doubles with each.
        stem: Channels of the first convolution.
    """
    layers: list[nn.Module] = [*_conv(channels, stem, 3), nn.ReLU()]
    before, side = stem, size
    for stage, count in enumerate(blocks):
        inner = cardinality * width * 2**stage
        for index in range(count):
            stride = 2 if stage and not index else 1
            body = nn.Sequential(
                *_conv(before, inner, 1), nn.ReLU(), *_conv(inner, inner, 3, stride, cardinality), nn.ReLU(),
                *_conv(inner, 2 * inner, 1),
            )  # fmt: skip
            layers.append(_Block(body, before, 2 * inner, stride))
            before, side = 2 * inner, -(-side // stride)
    return nn.Sequential(*layers, *_classifier(before * side**2, 512, classes))
