"""PromptIR: a transformer over channels that restores images, told by learned prompts which degradation it sees.

Every layer bears the name that published checkpoints have for it. Source: Potlapalli et al., "PromptIR: Prompting for
All-in-One Blind Image Restoration", NeurIPS 2023.
"""

from collections import OrderedDict
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.core.errors import UsageError, unknown

Norm = Literal["WithBias", "BiasFree"]
_EPS = 1e-5


class _Gains(nn.Module):
    """Gains, and shifts, of one normalization; a module of its own for the sake of the published names."""

    def __init__(self, channels: int, kind: Norm) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels)) if kind == "WithBias" else None


class ChannelNorm(nn.Module):
    """LayerNorm over the channels of each pixel, ``(B, C, H, W)``; ``"BiasFree"`` divides only."""

    def __init__(self, channels: int, kind: Norm) -> None:
        super().__init__()
        self.body = _Gains(channels, kind)

    def forward(self, x: Tensor) -> Tensor:
        """Normalize the channels of every pixel."""
        variance, mean = torch.var_mean(x, dim=1, correction=0, keepdim=True)
        gain = self.body.weight[:, None, None]
        if self.body.bias is None:
            return x * torch.rsqrt(variance + _EPS) * gain
        return (x - mean) * torch.rsqrt(variance + _EPS) * gain + self.body.bias[:, None, None]


class ChannelAttention(nn.Module):
    """Attention between channels: ``softmax(q k^T * temperature) v`` with q and k of unit length over pixels."""

    def __init__(self, channels: int, heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads = heads
        self.temperature = nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv = nn.Conv2d(channels, 3 * channels, 1, bias=bias)
        self.qkv_dwconv = nn.Conv2d(3 * channels, 3 * channels, 3, padding=1, groups=3 * channels, bias=bias)
        self.project_out = nn.Conv2d(channels, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Attend, ``(B, C, H, W)``."""
        size = x.shape
        q, k, v = (part.flatten(2).unflatten(1, (self.heads, -1)) for part in self.qkv_dwconv(self.qkv(x)).chunk(3, 1))
        with torch.autocast(x.device.type, enabled=False):  # a large temperature overflows in half precision
            q, k = (F.normalize(part if part.dtype == torch.float64 else part.float(), dim=-1) for part in (q, k))
            weights = (q @ k.transpose(-2, -1) * self.temperature).softmax(-1)
        found: Tensor = self.project_out((weights.to(v.dtype) @ v).reshape(size))
        return found


class GatedFeedForward(nn.Module):
    """``conv(gelu(a) * b)`` with a and b from one depthwise convolution."""

    def __init__(self, channels: int, expansion: float, *, bias: bool) -> None:
        super().__init__()
        hidden = int(channels * expansion)
        self.project_in = nn.Conv2d(channels, 2 * hidden, 1, bias=bias)
        self.dwconv = nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1, groups=2 * hidden, bias=bias)
        self.project_out = nn.Conv2d(hidden, channels, 1, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Transform every pixel and its neighbors."""
        a, b = self.dwconv(self.project_in(x)).chunk(2, 1)
        found: Tensor = self.project_out(F.gelu(a) * b)
        return found


class RestorationBlock(nn.Module):
    """Channel attention and a gated feed-forward layer, each behind a normalization and beside a shortcut."""

    def __init__(self, channels: int, heads: int, expansion: float, *, bias: bool, norm: Norm) -> None:
        super().__init__()
        self.norm1, self.attn = ChannelNorm(channels, norm), ChannelAttention(channels, heads, bias=bias)
        self.norm2, self.ffn = ChannelNorm(channels, norm), GatedFeedForward(channels, expansion, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """Apply both layers."""
        x = x + self.attn(self.norm1(x))
        found: Tensor = x + self.ffn(self.norm2(x))
        return found


class Downsample(nn.Module):
    """Half the size, twice the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, channels // 2, 3, padding=1, bias=False), nn.PixelUnshuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, 2C, H/2, W/2)``."""
        found: Tensor = self.body(x)
        return found


class Upsample(nn.Module):
    """Twice the size, half the channels."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(channels, 2 * channels, 3, padding=1, bias=False), nn.PixelShuffle(2))

    def forward(self, x: Tensor) -> Tensor:
        """``(B, C, H, W)`` to ``(B, C/2, 2H, 2W)``."""
        found: Tensor = self.body(x)
        return found


class PromptGenerator(nn.Module):
    """A mixture of learned prompts, resized to the features, weighted by their mean.

    Args:
        channels: Of the prompt.
        length: How many prompts there are.
        size: Side of each prompt, in pixels.
        features: Channels of what decides.
    """

    def __init__(self, channels: int, length: int, size: int, features: int) -> None:
        super().__init__()
        self.prompt_param = nn.Parameter(torch.rand(1, length, channels, size, size))
        self.linear_layer = nn.Linear(features, length)
        self.conv3x3 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Mix the prompts for features ``(B, F, H, W)``."""
        weights = self.linear_layer(x.mean((2, 3))).softmax(1)
        prompt = torch.einsum("bl,lchw->bchw", weights, self.prompt_param[0])
        found: Tensor = self.conv3x3(F.interpolate(prompt, x.shape[2:], mode="bilinear"))
        return found


class PromptIR(nn.Module):
    """Restores RGB images ``(B, 3, H, W)`` in [0, 1] of any size; the output is not clamped.

    Args:
        dim: Width of the first level; 48 as published (35,592,263 parameters with ``include_unused``).
        num_blocks: Blocks per level, from the first to the bottom; their number is the number of levels, 2 to 4.
        num_refinement: Blocks at the end.
        heads: Attention heads per level.
        expansion: Of the feed-forward layers.
        bias: Whether convolutions have one.
        norm: ``"WithBias"``, or ``"BiasFree"``.
        prompt_dims: Channels of the prompts, from the first level; by default in the published proportion to ``dim``.
        prompt_sizes: Their sides in pixels.
        prompt_length: How many there are at each level.
        prompts: Whether there are any.
        include_unused: Also make the six convolutions that published checkpoints hold and nothing uses.

    Raises:
        UsageError: The lists have different lengths, or channels cannot be divided among heads.
    """

    def __init__(
        self,
        dim: int = 48,
        num_blocks: Sequence[int] = (4, 6, 6, 8),
        num_refinement: int = 4,
        heads: Sequence[int] = (1, 2, 4, 8),
        expansion: float = 2.66,
        *,
        bias: bool = False,
        norm: Norm = "WithBias",
        prompt_dims: Sequence[int] | None = None,
        prompt_sizes: Sequence[int] = (64, 32, 16),
        prompt_length: int = 5,
        prompts: bool = True,
        include_unused: bool = False,
    ) -> None:
        super().__init__()
        levels = len(num_blocks)
        if not 2 <= levels <= 4 or len(heads) != levels:
            raise UsageError(
                f"num_blocks and heads must name 2 to 4 levels, got {tuple(num_blocks)} and {tuple(heads)}"
            )
        if norm not in ("WithBias", "BiasFree"):
            raise unknown("norm", norm, ["WithBias", "BiasFree"])
        if include_unused and (levels != 4 or not prompts):
            raise UsageError("include_unused must be False for other networks than the published one")
        widths = [dim * 2**level for level in range(levels)]
        shared = heads[min(2, levels - 1)]  # of the blocks that read prompts, at every level
        if prompt_dims is None:
            prompt_dims = [-(-size * dim // (48 * shared)) * shared for size in (64, 128, 320)]
        dims, sizes = list(prompt_dims)[: levels - 1], list(prompt_sizes)[: levels - 1]
        for width, count in zip(widths, heads, strict=True):
            if width % count:
                raise UsageError(f"heads must divide the channels of their level, got {count} for {width}")

        def block(width: int, count: int) -> RestorationBlock:
            return RestorationBlock(width, count, expansion, bias=bias, norm=norm)

        def stack(number: int, width: int, count: int) -> nn.Sequential:
            return nn.Sequential(*(block(width, count) for _ in range(number)))

        def pointwise(inputs: int, outputs: int) -> nn.Conv2d:
            return nn.Conv2d(inputs, outputs, 1, bias=bias)

        self.levels, self.prompts = levels, prompts
        self.patch_embed = nn.Sequential(OrderedDict(proj=nn.Conv2d(3, dim, 3, padding=1, bias=bias)))
        for level in range(1, levels):
            if prompts:
                found = PromptGenerator(dims[level - 1], prompt_length, sizes[level - 1], widths[level])
                self.add_module(f"prompt{level}", found)
        unused = ((64, 64), (128, 128), (320, 256), (112, 48), (224, 96), (448, 192)) if include_unused else ()
        for number, (inputs, outputs) in enumerate(unused[:3], 1):
            self.add_module(f"chnl_reduce{number}", pointwise(inputs, outputs))
        for level in range(1, levels):
            if include_unused:
                self.add_module(f"reduce_noise_channel_{level}", pointwise(*unused[2 + level]))
            self.add_module(f"encoder_level{level}", stack(num_blocks[level - 1], widths[level - 1], heads[level - 1]))
            self.add_module(f"down{level}_{level + 1}", Downsample(widths[level - 1]))
        self.latent = stack(num_blocks[-1], widths[-1], heads[-1])
        for level in range(levels - 1, 0, -1):
            below = widths[level]
            # as published, the bottom of a deep network is reduced to the width of the level that it goes to
            reduced = widths[level - 1] if prompts and level == levels - 1 and levels > 2 else below
            self.add_module(f"up{level + 1}_{level}", Upsample(reduced))
            if level > 1:
                self.add_module(
                    f"reduce_chan_level{level}", pointwise(reduced // 2 + widths[level - 1], widths[level - 1])
                )
            if prompts:
                mixed = below + dims[level - 1]
                if mixed % shared:
                    raise UsageError(f"prompt_dims must be multiples of {shared} beside {below} channels, got {dims}")
                self.add_module(f"noise_level{level}", block(mixed, shared))
                self.add_module(f"reduce_noise_level{level}", pointwise(mixed, reduced))
            width = widths[level - 1] if level > 1 else 2 * dim
            self.add_module(f"decoder_level{level}", stack(num_blocks[level - 1], width, heads[level - 1]))
        self.refinement = stack(num_refinement, 2 * dim, heads[0])
        self.output = nn.Conv2d(2 * dim, 3, 3, padding=1, bias=bias)

    def forward(self, images: Tensor) -> Tensor:
        """Restore images ``(B, 3, H, W)``; sides that do not fit are padded by reflection and cut off again."""
        if images.dim() != 4 or images.shape[1] != 3:
            raise UsageError(f"images must be RGB, (B, 3, H, W), got {tuple(images.shape)}")
        height, width = images.shape[2:]
        unit = 2 ** (self.levels - 1)
        padding = (0, -width % unit, 0, -height % unit)
        if any(padding):
            kind = "reflect" if height > padding[3] and width > padding[1] else "replicate"
            images = F.pad(images, padding, mode=kind)
        return (self._restored(images) + images)[..., :height, :width]

    def _restored(self, images: Tensor) -> Tensor:
        parts = dict(self.named_children())
        x = self.patch_embed(images)
        skips = []
        for level in range(1, self.levels):
            skips.append(parts[f"encoder_level{level}"](x))
            x = parts[f"down{level}_{level + 1}"](skips[-1])
        x = self.latent(x)
        for level in range(self.levels - 1, 0, -1):
            if self.prompts:
                x = torch.cat([x, parts[f"prompt{level}"](x)], 1)
                x = parts[f"reduce_noise_level{level}"](parts[f"noise_level{level}"](x))
            x = torch.cat([parts[f"up{level + 1}_{level}"](x), skips[level - 1]], 1)
            if level > 1:
                x = parts[f"reduce_chan_level{level}"](x)
            x = parts[f"decoder_level{level}"](x)
        found: Tensor = self.output(self.refinement(x))
        return found
