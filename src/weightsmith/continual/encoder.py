"""Sentence vectors from a folder of sentence-transformers, with transformers alone."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, require
from weightsmith.core.json_files import read_json
from weightsmith.core.pretrained import load_pretrained

_BATCH = 32


class SentenceEncoder:
    """Mean of the last hidden states of a text's tokens, at length 1.

    Args:
        source: Folder or hub id of a sentence encoder with mean pooling, for example
            ``"sentence-transformers/all-MiniLM-L6-v2"``.
        device: Where it runs.

    Raises:
        UsageError: The folder is damaged, needs code of its own, or says that it pools in another way.
        MissingExtra: transformers is not installed.
    """

    def __init__(self, source: Path | str, device: torch.device | str = "cpu") -> None:
        transformers: Any = require("transformers", extra="hf", purpose="a sentence encoder")
        pooling = Path(source, "1_Pooling", "config.json")
        if pooling.is_file() and not read_json(pooling).get("pooling_mode_mean_tokens", True):
            raise UsageError(f"{source} does not pool by the mean: give its encode function as backend instead")
        limits = Path(source, "sentence_bert_config.json")
        limit = read_json(limits, {"max_seq_length?": (int, None)}).get("max_seq_length") if limits.is_file() else None
        self.tokenizer = load_pretrained(transformers.AutoTokenizer, source)
        self.model = load_pretrained(transformers.AutoModel, source).to(device).eval().requires_grad_(False)
        places = getattr(self.model.config, "max_position_embeddings", None)
        self.length = min(n for n in (limit, places, 512) if isinstance(n, int) and n > 0)

    @torch.no_grad()
    def __call__(self, texts: list[str]) -> Tensor:
        """Encode texts: ``(n, d)``, float32."""
        found = []
        for first in range(0, len(texts), _BATCH):
            inputs = self.tokenizer(
                texts[first : first + _BATCH],
                padding=True,
                truncation=True,
                max_length=self.length,
                return_tensors="pt",
            ).to(self.model.device)
            hidden = self.model(**inputs).last_hidden_state.float()
            mask = inputs["attention_mask"].unsqueeze(-1)
            found.append((hidden * mask).sum(1) / mask.sum(1).clamp_min(1))
        return torch.nn.functional.normalize(torch.cat(found), dim=1).cpu()
