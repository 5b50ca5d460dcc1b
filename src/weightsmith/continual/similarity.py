"""How near two instructions are: by their words, or by the vectors of a sentence encoder."""

import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, brief

Encoder = Callable[[list[str]], Any]
Similarity = Callable[[str, str], float]
_WORD = re.compile(r"\b\w\w+\b")


def tfidf_similarity(one: str, other: str, *, stop_words: bool = True) -> float:
    r"""Cosine of the TF-IDF vectors of two texts, where these two are all documents there are.

    A word counts ``n (ln(3 / (1 + df)) + 1)``, ``n`` times in the text and in ``df`` of both.

    Args:
        one: A text.
        other: A text.
        stop_words: Leave English function words out.

    Returns:
        In [0, 1]. Texts without a word left are as near as they are equal: 1 or 0.

    Source: the authors' ``LoRASelect``, which fits scikit-learn's ``TfidfVectorizer`` on the pair; arXiv 2410.10868,
    appendix H states another form of the logarithm.
    """
    left_out = _stop_words() if stop_words else frozenset()
    counts = [Counter(word for word in _WORD.findall(text.lower()) if word not in left_out) for text in (one, other)]
    if counts[0] == counts[1]:
        return 1.0 if counts[0] or one == other else 0.0
    rarity = {word: math.log(3 / (1 + sum(word in count for count in counts))) + 1 for word in counts[0] | counts[1]}
    first, second = ({word: n * rarity[word] for word, n in count.items()} for count in counts)
    norms = math.hypot(*first.values()) * math.hypot(*second.values())
    return min(1.0, sum(value * second.get(word, 0.0) for word, value in first.items()) / norms) if norms else 0.0


@lru_cache(maxsize=1)
def _stop_words() -> frozenset[str]:
    from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS  # takes a while, and an encoder needs it not

    return frozenset(ENGLISH_STOP_WORDS)


class EncodedSimilarity:
    """Cosine of the vectors that an encoder gives; every text is encoded once.

    Args:
        encoder: ``(list of n texts) -> (n, d)``: a tensor, an array or a list of lists.
    """

    def __init__(self, encoder: Encoder) -> None:
        self.encoder = encoder
        self._vectors: dict[str, Tensor] = {}

    def prepare(self, texts: Sequence[str]) -> None:
        """Encode the texts that are new, in one call.

        Raises:
            UsageError: The encoder gives something else than a finite vector per text, or vectors of another size.
        """
        new = [text for text in dict.fromkeys(texts) if text not in self._vectors]
        if not new:
            return
        found = self.encoder(new)
        try:
            vectors = torch.as_tensor(found).detach().cpu().double()
        except (TypeError, ValueError, RuntimeError) as error:
            raise UsageError(f"backend must return a vector per text, got {brief(found)}") from error
        sizes = {vector.numel() for vector in self._vectors.values()}
        if vectors.dim() != 2 or len(vectors) != len(new) or (sizes and vectors.shape[1] not in sizes):
            size = next(iter(sizes), "d")
            raise UsageError(f"backend must return ({len(new)}, {size}) numbers, got {tuple(vectors.shape)}")
        if not bool(vectors.isfinite().all()):
            raise UsageError("backend returned vectors that are not finite")
        self._vectors |= dict(zip(new, torch.nn.functional.normalize(vectors, dim=1), strict=True))

    def __call__(self, one: str, other: str) -> float:
        """The cosine, in [-1, 1]."""
        self.prepare([one, other])
        return 1.0 if one == other else max(-1.0, min(1.0, float(self._vectors[one] @ self._vectors[other])))
