"""Texts and images from files, as inputs of a Hugging Face model."""

import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from weightsmith.core.errors import UsageError, reason, require
from weightsmith.core.json_files import read_jsonl, read_text

_IMAGES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
_TEXTS = {".jsonl", ".txt"}


def read_texts(path: Path) -> list[str]:
    """Read the texts of a JSON-lines file (of each row the field ``text``, else all strings) or of a plain text file.

    Raises:
        UsageError: The file is missing, of another kind, damaged, or empty.
    """
    if path.suffix not in _TEXTS or not path.is_file():
        raise UsageError(f"texts are read from an existing .jsonl or .txt file, got {path}")
    if path.suffix == ".txt":
        texts = [read_text(path)]
    else:
        texts = [
            row["text"] if "text" in row else "\n".join(v for v in row.values() if isinstance(v, str))
            for _, row in read_jsonl(path, {"text?": str})
        ]
    texts = [text for text in texts if text.strip()]
    if not texts:
        raise UsageError(f"{path} holds no text")
    return texts


def tokenize(tokenizer: Any, texts: list[str]) -> Tensor:
    """Join texts by an empty line and tokenize them once, adding nothing: ``(T,)``."""
    return torch.tensor(tokenizer("\n\n".join(texts), add_special_tokens=False, verbose=False)["input_ids"])


def token_windows(tokenizer: Any, texts: list[str], *, samples: int, length: int) -> list[Tensor]:
    """The first ``samples`` whole windows of ``length`` tokens of all texts one after the other.

    Raises:
        UsageError: There are fewer than two.
    """
    tokens = tokenize(tokenizer, texts)
    windows = list(tokens[: len(tokens) // length * length].split(length))[:samples] if len(tokens) >= length else []
    if len(windows) < 2:
        raise UsageError(
            f"the calibration text has {len(tokens)} tokens, which is {len(windows)} times length={length}, and at "
            "least 2 are needed: give more text (hundreds of samples are usual) or a smaller length"
        )
    return windows


def sentences(tokenizer: Any, texts: list[str], *, samples: int, length: int) -> list[Tensor]:
    """The first texts one by one, with the tokens that an encoder expects around them, cut at ``length``.

    Raises:
        UsageError: There are fewer than two.
    """
    if len(texts) < 2:
        raise UsageError(f"the calibration file has {len(texts)} text, and at least 2 are needed: hundreds are usual")
    rows = tokenizer(texts[:samples], truncation=True, max_length=length)["input_ids"]
    return [torch.tensor(row) for row in rows]


def image_processor(folder: Path, load: Callable[[Any], Any]) -> Any:
    """The image processor of a model, read by ``load``.

    Raises:
        UsageError: The folder holds none.
    """
    from transformers import AutoImageProcessor

    try:
        return load(AutoImageProcessor)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{folder} holds no image processor (preprocessor_config.json), which prepares the calibration images: "
            "save that of the trained model there with save_pretrained"
        ) from error


def images(processor: Any, folder: Path, *, samples: int) -> dict[str, Tensor]:
    """The first images under a folder, in the order of their names, as the model's processor prepares them.

    Raises:
        UsageError: There are fewer than two, or one cannot be read.
        MissingExtra: ``pillow`` is not installed.
    """
    pillow = require("PIL.Image", extra="vision", purpose="calibration images")
    files = list(_find_images(folder))[:samples]
    if len(files) < 2:
        raise UsageError(f"{folder} holds {len(files)} images, and at least 2 are needed: hundreds are usual")
    pixels = []
    for file in files:
        try:
            with pillow.open(file) as image:
                pixels.append(processor(images=image.convert("RGB"), return_tensors="pt")["pixel_values"])
        except (OSError, ValueError, SyntaxError, ArithmeticError, LookupError, struct.error) as error:
            raise UsageError(f"{file} cannot be read as an image: {reason(error)}") from error
        except pillow.DecompressionBombError as error:
            raise UsageError(f"{file} is too large an image: {reason(error)}") from error
    return {"pixel_values": torch.cat(pixels)}


def _find_images(folder: Path) -> Iterator[Path]:
    return (path for path in sorted(folder.rglob("*")) if path.suffix.lower() in _IMAGES and path.is_file())
