"""A vision transformer (Dosovitskiy et al. 2020, arXiv 2010.11929) small enough for a laptop.

Pre-norm blocks, a class token, learned positions, and query, key and value from one fused linear layer ``attn.qkv``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Multi-head self-attention with one projection for query, key and value.

    Args:
        width: Of the tokens.
        heads: Divides ``width``.
        causal: A token sees those before it and itself only.
    """

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.causal = causal
        self.num_heads, self.head_dim = heads, width // heads
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, width)`` to the same shape."""
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        out: Tensor = self.proj(
            F.scaled_dot_product_attention(q, k, v, is_causal=self.causal).transpose(1, 2).flatten(2)
        )
        return out


class Mlp(nn.Module):
    """Two linear layers with GELU between.

    Args:
        width: Of the tokens.
        hidden: Units between.
    """

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, width)`` to the same shape."""
        out: Tensor = self.fc2(F.gelu(self.fc1(x)))
        return out


class Block(nn.Module):
    """Attention and perceptron, each behind a layer norm and beside a shortcut.

    Args:
        width: Of the tokens.
        heads: Of the attention.
        causal: See `Attention`.
    """

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, causal)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, 4 * width)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, T, width)`` to the same shape."""
        x = x + self.attn(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class ViT(nn.Module):
    """Patches to tokens, blocks, and a linear head on the class token.

    By default the patch is the smallest divisor ``p`` of ``size`` with ``p^2 >= size / 2``: 2 for 8 pixels, 4 for 28
    and 32, 8 for 64, 14 for 224, so that tokens stay few.

    Args:
        channels: Of the images.
        size: Of the images.
        classes: Number of logits.
        width: Of the tokens.
        depth: Number of blocks.
        heads: Of each attention.
        patch: Side of a patch in pixels, which divides ``size``.
    """

    def __init__(
        self,
        *,
        channels: int,
        size: int,
        classes: int,
        width: int = 64,
        depth: int = 4,
        heads: int = 4,
        patch: int | None = None,
    ) -> None:
        super().__init__()
        if patch is None:
            patch = next(p for p in range(1, size + 1) if size % p == 0 and (2 * p * p >= size or p == size))
        self.patch_embed = nn.Conv2d(channels, width, patch, patch)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (size // patch) ** 2, width))
        self.blocks = nn.Sequential(*(Block(width, heads) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, classes)
        # arXiv 2012.12877, section 6
        for parameter in (self.cls_token, self.pos_embed):
            nn.init.trunc_normal_(parameter, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, channels, size, size)`` to logits ``(B, classes)``."""
        tokens = self.patch_embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.cls_token.expand(len(x), -1, -1), tokens], 1) + self.pos_embed
        logits: Tensor = self.head(self.norm(self.blocks(tokens))[:, 0])
        return logits
