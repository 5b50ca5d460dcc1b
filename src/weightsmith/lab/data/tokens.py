"""A tokenizer that needs no files, for models that are trained from nothing: one token per byte of UTF-8."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

PAD = 256
END = 257
VOCABULARY = 258


class Bytes:
    """The bytes of a text are its tokens; called like a Hugging Face tokenizer.

    Attributes:
        eos_token_id: Ends an answer.
        pad_token_id: Fills a row.
    """

    eos_token_id = END
    pad_token_id = PAD
    vocabulary = VOCABULARY

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        """Encode one text."""
        return {"input_ids": list(text.encode())}

    def decode(self, tokens: Sequence[int]) -> str:
        """Decode tokens; what is no byte is left out."""
        return bytes(token for token in tokens if token < PAD).decode(errors="replace")


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of tokens as one tensor ``(N, T)``, filled up on the right."""
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64).view(
        len(rows), width
    )
