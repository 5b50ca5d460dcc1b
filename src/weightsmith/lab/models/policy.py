"""A small causal transformer that can be sampled from token by token: keys and values of past tokens are kept."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Cache = list[tuple[Tensor, Tensor]]


class PolicyTransformer(nn.Module):
    """Pre-norm causal transformer with learned positions.

    Args:
        vocabulary: Number of tokens.
        length: Most tokens of prompt and answer together.
        width: Of the tokens.
        depth: Number of blocks.
        heads: Of each attention.
    """

    def __init__(self, *, vocabulary: int, length: int, width: int = 64, depth: int = 2, heads: int = 4) -> None:
        super().__init__()
        self.length = length
        self.embed = nn.Embedding(vocabulary, width)
        self.pos_embed = nn.Parameter(torch.zeros(length, width))
        self.blocks = nn.ModuleList(_Block(width, heads) for _ in range(depth))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        nn.init.normal_(self.pos_embed, std=0.02)
        nn.init.normal_(self.embed.weight, std=0.02)

    def hidden(self, tokens: Tensor, cache: Cache | None = None) -> tuple[Tensor, Cache]:
        """Compute the last hidden states of new tokens.

        Args:
            tokens: ``(B, T)``, new tokens.
            cache: Keys and values of the tokens before them, as the last call gave them.

        Returns:
            ``(B, T, width)``, and the keys and values of all tokens so far.
        """
        past = 0 if cache is None else cache[0][0].shape[2]
        x = self.embed(tokens) + self.pos_embed[past : past + tokens.shape[1]]
        kept: Cache = []
        for index, block in enumerate(self.blocks):
            x, both = block(x, None if cache is None else cache[index])
            kept.append(both)
        return self.norm(x), kept

    def forward(self, tokens: Tensor) -> Tensor:
        """Map ``(B, T)`` to logits ``(B, T, vocabulary)``."""
        logits: Tensor = self.head(self.hidden(tokens)[0])
        return logits


class _Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.fc1, self.fc2 = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor, past: tuple[Tensor, Tensor] | None) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        b, t, width = x.shape
        q, k, v = self.qkv(self.norm1(x)).view(b, t, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        if past is not None:
            k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
        # with a cache there is one new token, which may look at all
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=past is None)
        x = x + self.proj(mixed.transpose(1, 2).reshape(b, t, width))
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x)))), (k, v)
