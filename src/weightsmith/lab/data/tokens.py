"""Tokenizers that need no files, for models that are trained from nothing: bytes, and words by number."""

import re
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

_WORD = re.compile(r"\w+|[^\w\s]")


class Bytes:
    """The bytes of a text in UTF-8 are its tokens; called like a Hugging Face tokenizer.

    Attributes:
        pad_token_id: Fills a row.
        eos_token_id: Ends an answer.
        vocabulary: Number of tokens.
    """

    pad_token_id = 256
    eos_token_id = 257
    vocabulary = 258

    def __call__(self, text: str | Sequence[str], **_: Any) -> dict[str, Any]:
        """Encode one text, or several."""
        return {"input_ids": _each(text, lambda one: list(one.encode()))}


class Words:
    """Words and signs, in lower case, are the tokens; a checksum gives each its number, so that none is unknown.

    Attributes:
        pad_token_id: Fills a row.
        eos_token_id: None: no text is written.
        vocabulary: Number of tokens; more words than that share them.
    """

    pad_token_id = 2**13
    eos_token_id = None
    vocabulary = 2**13 + 1

    def __call__(self, text: str | Sequence[str], **_: Any) -> dict[str, Any]:
        """Encode one text, or several."""
        return {"input_ids": _each(text, self._encode)}

    def _encode(self, text: str) -> list[int]:
        return [zlib.crc32(word.encode()) % self.pad_token_id for word in _WORD.findall(text.lower())]


def _each(text: str | Sequence[str], encode: Callable[[str], list[int]]) -> Any:
    return encode(text) if isinstance(text, str) else [encode(one) for one in text]


def pad_of(tokenizer: Any) -> int:
    """The token that fills rows: the tokenizer's own, else the one that ends a text."""
    return next((token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id) if token is not None), 0)


def padded(rows: Sequence[Sequence[int]], value: int) -> Tensor:
    """Rows of tokens as one tensor ``(N, T)``, filled up on the right."""
    width = max((len(row) for row in rows), default=0)
    return torch.tensor([[*row, *[value] * (width - len(row))] for row in rows], dtype=torch.int64).view(
        len(rows), width
    )
