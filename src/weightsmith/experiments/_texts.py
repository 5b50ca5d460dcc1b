"""Running text for language models: to calibrate with, and to be predicted."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weightsmith.core.errors import UsageError, require
from weightsmith.experiments._source import PURPOSE, find_source


def find_texts(name: str) -> str:
    """Find a data set of texts; see `find_source`."""
    return find_source(name, "a field text")


def load_tokens(tokenizer: Any, name: str, split: str, *, most: int, subset: str = "", file: str = "") -> Tensor:
    """Read texts in order until they give ``most`` tokens, joined by empty lines: ``(T,)`` with ``T <= most``.

    Args:
        tokenizer: Applied without adding special tokens.
        name: See `find_texts`.
        split: ``"train"`` or ``"test"``.
        most: Tokens.
        subset: Configuration of a hub data set.
        file: The only file to fetch of a hub data set.

    Raises:
        UsageError: There is no column ``text``.
    """
    datasets = require("datasets", extra="hf", purpose=PURPOSE)
    source = find_texts(name)
    options: dict[str, Any] = {}
    if not Path(source).is_dir():
        options = {"name": subset or None, "data_files": file or None}
    table = datasets.load_dataset(source, split=split, streaming=bool(options.get("data_files")), **options)
    tokens: list[int] = []
    for row in table:
        text = row["text"] if "text" in row else "\n".join(value for value in row.values() if isinstance(value, str))
        if not text:
            raise UsageError(f"data {name!r} needs a column of texts, has {', '.join(row)}")
        tokens += tokenizer(text + "\n\n", add_special_tokens=False, verbose=False)["input_ids"]
        if len(tokens) >= most:
            break
    return torch.tensor(tokens[:most])


@torch.no_grad()
def predict(model: Any, windows: Tensor) -> dict[str, float]:
    """Predict every token of windows ``(N, T)`` but the first of each.

    Returns:
        ``loss`` in nats per token, whose exponential is the perplexity, and ``accuracy`` in [0, 1].
    """
    sums = torch.zeros(3, dtype=torch.float64)
    for window in windows.to(next(model.parameters()).device):
        logits = model(input_ids=window[None], use_cache=False).logits[0, :-1].float()
        wanted = window[1:]
        loss = F.cross_entropy(logits, wanted, reduction="sum")
        right = (logits.argmax(-1) == wanted).sum()
        sums += torch.tensor([loss.item(), right.item(), len(wanted)], dtype=torch.float64)
    loss_sum, correct, count = sums.tolist()
    return {"loss": loss_sum / count, "accuracy": correct / count}
