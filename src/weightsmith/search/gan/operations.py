"""The candidate operations of EAGAN's cells; arXiv 2111.15097, section 3.1, details as in the authors' code."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

FIRST_ITERATIONS = 15  # a sigma far too small would let an operation that was never trained blow up

NORMAL = {2: (1, 1), 3: (3, 1), 4: (5, 1), 5: (3, 2), 6: (5, 2)}
"""Kernel size and dilation of the normal convolutions by index; 1 is the identity, 0 is not executed."""
DOWN = {2: (3, 1), 3: (5, 1), 4: (3, 2), 5: (5, 2)}
"""Kernel size and dilation of the strided convolutions by index; 0 and 1 are poolings."""


class Conv(nn.Conv2d):
    """``conv(relu(x))`` with padding that keeps the size at stride 1.

    Args:
        inputs: Channels of ``x``.
        outputs: Channels of the result.
        kernel: Side of the kernel.
        dilation: Spacing of its elements.
        stride: 2 halves an even side.
        relu: Whether the activation is there.
        bias: Whether there is a bias.
    """

    def __init__(
        self,
        inputs: int,
        outputs: int,
        kernel: int,
        *,
        dilation: int = 1,
        stride: int = 1,
        relu: bool = True,
        bias: bool = True,
    ) -> None:
        padding = dilation * (kernel - 1) // 2
        super().__init__(inputs, outputs, kernel, stride=stride, padding=padding, dilation=dilation, bias=bias)
        self.relu = relu

    def forward(self, x: Tensor) -> Tensor:
        """``(B, inputs, H, W)`` to ``(B, outputs, H / stride, W / stride)``."""
        return super().forward(F.relu(x) if self.relu else x)


class Upsample(Conv):
    """Interpolate to twice the side, then ``conv1x1(relu(x))``."""

    def __init__(self, channels: int, mode: str) -> None:
        super().__init__(channels, channels, 1)
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, 2H, 2W)``."""
        return super().forward(F.interpolate(x, scale_factor=2, mode=self.mode))


class UpTransposed(nn.Module):
    """ReLU, a depthwise transposed 3x3 convolution to twice the side, a 1x1 convolution; neither has a bias."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.dw = nn.ConvTranspose2d(
            channels, channels, 3, stride=2, padding=1, output_padding=1, groups=channels, bias=False
        )
        self.pw = Conv(channels, channels, 1, relu=False, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C, 2H, 2W)``."""
        made: Tensor = self.pw(self.dw(F.relu(x)))
        return made


def normal(channels: int, indices: Iterable[int], *, relu: bool = True) -> dict[int, nn.Module]:
    """Make the normal candidates ``indices``; 0 (none) is left out."""
    made: dict[int, nn.Module] = {}
    for index in indices:
        if index == 1:
            made[index] = nn.Identity()
        elif index > 1:
            kernel, dilation = NORMAL[index]
            made[index] = Conv(channels, channels, kernel, dilation=dilation, relu=relu)
    return made


def up(channels: int, indices: Iterable[int]) -> dict[int, nn.Module]:
    """Make the up-sampling candidates ``indices``."""
    return {
        index: UpTransposed(channels) if index == 2 else Upsample(channels, ("nearest", "bilinear")[index])
        for index in indices
    }


def down(channels: int, indices: Iterable[int]) -> dict[int, nn.Module]:
    """Make the down-sampling candidates ``indices``; -1 is left out."""
    made: dict[int, nn.Module] = {}
    for index in indices:
        if index in DOWN:
            kernel, dilation = DOWN[index]
            made[index] = Conv(channels, channels, kernel, dilation=dilation, stride=2)
        elif index >= 0:
            made[index] = (nn.AvgPool2d, nn.MaxPool2d)[index](2, 2)
    return made


class SpectralNorm(nn.Module):
    """Divide a weight by its largest singular value, estimated by power iteration.

    With ``W`` flattened to ``(out, -1)``, a call in training mode first does one iteration,
    ``v = normalize(W^T u)``, ``u = normalize(W v)``; then ``sigma = u^T W v`` and the result is ``weight / sigma``.
    torch's own parametrization updates ``u`` before ``v``, so that results differ by half an iteration.

    Args:
        weight: The weight that it will be registered on; 15 iterations are done at once.

    Source: arXiv 1802.05957, algorithm 1.
    """

    u: Tensor
    v: Tensor

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        flat = weight.detach().flatten(1)
        self.register_buffer("u", F.normalize(torch.randn(flat.shape[0], dtype=flat.dtype, device=flat.device), dim=0))
        self.register_buffer("v", F.normalize(torch.randn(flat.shape[1], dtype=flat.dtype, device=flat.device), dim=0))
        self.iterate_(weight, FIRST_ITERATIONS)

    @torch.no_grad()
    def iterate_(self, weight: Tensor, times: int = 1) -> None:
        """Improve the estimate of the singular vectors."""
        flat = weight.flatten(1)
        for _ in range(times):
            self.v.copy_(F.normalize(flat.t().mv(self.u), dim=0, eps=1e-12))
            self.u.copy_(F.normalize(flat.mv(self.v), dim=0, eps=1e-12))

    def forward(self, weight: Tensor) -> Tensor:
        """``(out, ...)`` to the same shape."""
        if self.training:
            self.iterate_(weight.detach())
        # copies, since the next call changes the buffers before this one's backward pass may have run
        return weight / torch.dot(self.u.clone(), weight.flatten(1).mv(self.v.clone()))


def spectral_norm_(module: nn.Module) -> nn.Module:
    """Normalize the weight of a layer by its largest singular value; returns the layer."""
    parametrize.register_parametrization(module, "weight", SpectralNorm(module.weight))  # type: ignore[arg-type]
    return module


def stored_weight(module: nn.Module) -> tuple[Tensor, SpectralNorm]:
    """The weight of a normalized layer as it is stored, and its normalization."""
    parametrized: Any = module.parametrizations
    return parametrized["weight"].original, parametrized["weight"][0]


def initialize_convolutions_(model: nn.Module) -> None:
    """Xavier-uniform weights for every `torch.nn.Conv2d`; biases and other layers as torch has them.

    Under spectral normalization the stored weight is drawn and the power iteration done anew.
    """
    for module in model.modules():
        if not isinstance(module, nn.Conv2d):
            continue
        if parametrize.is_parametrized(module, "weight"):
            weight, norm = stored_weight(module)
            nn.init.xavier_uniform_(weight)
            norm.iterate_(weight, FIRST_ITERATIONS)
        else:
            nn.init.xavier_uniform_(module.weight)
