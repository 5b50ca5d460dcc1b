"""Residual networks (He et al. 2015, "Deep Residual Learning for Image Recognition", arXiv 1512.03385).

``resnet20`` and ``resnet32`` are the paper's CIFAR networks (section 4.2): three stages of 16, 32 and 64 channels, with
its parameter-free shortcut (option A: every second pixel, missing channels zero). ``resnet18``, ``resnet34`` and
``resnet50`` are the ImageNet networks (table 1, projection shortcuts, the stride of a bottleneck on its 3x3
convolution); for images of at most 64 pixels their stem is one 3x3 convolution.
"""

from collections.abc import Sequence

from torch import Tensor, nn
from torch.nn import functional as F

SMALL = 64  # up to this many pixels the stem of an ImageNet network would throw away too much


class ZeroPadShortcut(nn.Module):
    """Option A: take every ``stride``-th pixel and append channels of zeros.

    Args:
        extra: Channels to append.
        stride: Of the subsampling.
    """

    def __init__(self, extra: int, stride: int) -> None:
        super().__init__()
        self.extra, self.stride = extra, stride

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to ``(B, C + extra, ceil(H / stride), ceil(W / stride))``."""
        return F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.extra))


class Residual(nn.Module):
    """A basic block (two 3x3 convolutions) or a bottleneck (1x1, 3x3, 1x1) beside its shortcut.

    Args:
        before: Channels that come in.
        width: Channels within the block.
        stride: Of the first 3x3 convolution.
        expansion: Channels that go out, per ``width``: 1 makes a basic block, more a bottleneck.
        project: Shortcut where shapes differ: 1x1 convolution (``True``) or zero padding (``False``).
    """

    def __init__(self, before: int, width: int, stride: int, *, expansion: int, project: bool) -> None:
        super().__init__()
        after = expansion * width
        if expansion == 1:
            layers = [*_conv(before, width, 3, stride), nn.ReLU(), *_conv(width, after, 3)]
        else:
            layers = [*_conv(before, width, 1), nn.ReLU(), *_conv(width, width, 3, stride), nn.ReLU()]
            layers += _conv(width, after, 1)
        self.body = nn.Sequential(*layers)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or before != after:
            self.shortcut = (
                nn.Sequential(*_conv(before, after, 1, stride)) if project else ZeroPadShortcut(after - before, stride)
            )

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, before, H, W)`` to ``(B, expansion * width, H / stride, W / stride)``."""
        return F.relu(self.body(x) + self.shortcut(x))


def resnet(
    *,
    channels: int,
    size: int,
    classes: int,
    depths: Sequence[int],
    width: int,
    expansion: int = 1,
    project: bool = True,
) -> nn.Sequential:
    """Stem, stages that double the width and halve the resolution, global average pool, linear head.

    Args:
        channels: Of the images.
        size: Of the images; above 64 pixels the stem is a 7x7 convolution of stride 2 and a max pool.
        classes: Number of logits.
        depths: Blocks per stage.
        width: Of the first stage.
        expansion: 1: basic blocks; 4: the paper's bottlenecks.
        project: Kind of shortcut, see `Residual`.
    """
    stem = [*_conv(channels, width, 3), nn.ReLU()]
    if size > SMALL:
        stem = [*_conv(channels, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    stages, before = [], width
    for stage, depth in enumerate(depths):
        blocks = []
        for block in range(depth):
            stride = 2 if stage > 0 and block == 0 else 1
            blocks.append(Residual(before, width << stage, stride, expansion=expansion, project=project))
            before = expansion * (width << stage)
        stages.append(nn.Sequential(*blocks))
    net = nn.Sequential(
        nn.Sequential(*stem), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(before, classes)
    )
    return kaiming_(net)


def kaiming_(net: nn.Sequential) -> nn.Sequential:
    """Draw convolutions from N(0, 2 / (k^2 out)), in place (arXiv 1502.01852, section 2.2, backward).

    Args:
        net: Other layers keep their initialisation.
    """
    for module in net.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
    return net


def _conv(before: int, after: int, kernel: int, stride: int = 1) -> list[nn.Module]:
    return [nn.Conv2d(before, after, kernel, stride, kernel // 2, bias=False), nn.BatchNorm2d(after)]
