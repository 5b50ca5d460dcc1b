"""Perplexity of a causal language model on a text, and by which convention it was computed."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_PIECE = 256  # tokens


@dataclass(frozen=True, slots=True)
class Perplexity:
    """A perplexity and what it means.

    Attributes:
        value: ``exp`` of the mean negative log-likelihood of a token, every predicted token counted equally.
        tokens: How many were predicted.
        window: Tokens per window; windows do not overlap and the last may be shorter.
        bos: Whether every window began with the tokenizer's BOS token, which is not counted.
        tokenizer: Folder or id that the tokenizer was read from, without its parents.
    """

    value: float
    tokens: int
    window: int
    bos: bool
    tokenizer: str


@torch.no_grad()
def perplexity(
    model: Any, tokenizer: Any, tokens: Tensor, *, window: int, bos: bool = False, after_window: Callable[[], None]
) -> Perplexity:
    """Compute ``exp(sum of -log p(token | those before it in its window) / number of predicted tokens)``.

    Args:
        model: A causal language model in evaluation mode.
        tokenizer: What made ``tokens``.
        tokens: ``(T,)``.
        window: Tokens per window, BOS not counted.
        bos: Begin every window with BOS; else a window's first token is not predicted.
        after_window: Called after every window.
    """
    total, count = 0.0, 0
    for part in tokens.split(window):
        ids = torch.cat([part.new_tensor([tokenizer.bos_token_id]), part]) if bos else part
        if len(ids) > 1:
            logits = model(input_ids=ids[None].to(model.device), use_cache=False).logits[0, :-1]
            # in pieces: the softmax of a whole window would take as much memory again as its logits
            for piece, wanted in zip(logits.split(_PIECE), ids[1:].to(logits.device).split(_PIECE), strict=True):
                total += F.cross_entropy(piece.float(), wanted, reduction="sum").item()
            del logits, piece
            count += len(ids) - 1
        after_window()
    value = torch.tensor(total / count, dtype=torch.float64).exp().item()
    return Perplexity(value, count, window, bos, Path(tokenizer.name_or_path).name)
