"""Two small text models that are trained from nothing: a bag of embeddings, and a transformer."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.lab.models.vit import Block


class Bag(nn.Module):
    """The mean of a text's token embeddings, and a perceptron on it.

    Args:
        vocabulary: Number of tokens; the last but one pads.
        classes: Number of logits.
        pad: The token that counts for nothing.
        width: Of the embeddings.
    """

    def __init__(self, *, vocabulary: int, classes: int, pad: int, width: int = 64) -> None:
        super().__init__()
        self.pad = pad
        self.embed = nn.Embedding(vocabulary, width)
        self.fc1 = nn.Linear(width, 2 * width)
        self.head = nn.Linear(2 * width, classes)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map ``(B, T)`` to logits ``(B, classes)``."""
        there = (input_ids != self.pad).unsqueeze(-1)
        mean = (self.embed(input_ids) * there).sum(1) / there.sum(1).clamp_min(1)
        logits: Tensor = self.head(F.relu(self.fc1(mean)))
        return logits


class TextTransformer(nn.Module):
    """Pre-norm transformer blocks over tokens: causal with logits at every position, or a classifier.

    Args:
        vocabulary: Number of tokens.
        length: Most tokens of a row.
        classes: Number of logits of a classifier on the mean token; ``None``: predict the next token everywhere.
        pad: The token that a classifier leaves out.
        width: Of the tokens.
        depth: Number of blocks.
        heads: Of each attention.
    """

    def __init__(
        self,
        *,
        vocabulary: int,
        length: int,
        classes: int | None = None,
        pad: int = -1,
        width: int = 64,
        depth: int = 2,
        heads: int = 4,
    ) -> None:
        super().__init__()
        self.pad, self.classifies = pad, classes is not None
        self.embed = nn.Embedding(vocabulary, width)
        self.pos_embed = nn.Parameter(torch.zeros(1, length, width))
        self.blocks = nn.Sequential(*(Block(width, heads, causal=classes is None) for _ in range(depth)))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary if classes is None else classes)
        nn.init.normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, input_ids: Tensor) -> Tensor:
        """Map ``(B, T)`` to logits ``(B, T, vocabulary)``, or ``(B, classes)``."""
        tokens = self.embed(input_ids) + self.pos_embed[:, : input_ids.shape[1]]
        tokens = self.norm(self.blocks(tokens))
        if self.classifies:
            there = (input_ids != self.pad).unsqueeze(-1)
            tokens = (tokens * there).sum(1) / there.sum(1).clamp_min(1)
        logits: Tensor = self.head(tokens)
        return logits
