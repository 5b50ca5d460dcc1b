"""``weightsmith restore``: take noise, haze or rain off an image with a trained network."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from rich.console import Console
from torch import Tensor, nn

from weightsmith.core.checkpoint import Checkpoint
from weightsmith.core.display import markup
from weightsmith.core.errors import UsageError, reason, require
from weightsmith.core.files import file_atomically
from weightsmith.core.modes import evaluating
from weightsmith.lab.models.promptir import PromptIR
from weightsmith.lab.tasks.restoration import network
from weightsmith.prune import load_sparse

_console = Console()


def restore(
    image: tyro.conf.Positional[Path],
    /,
    checkpoint: Path | None = None,
    out: Path | None = None,
    model: str = "promptir",
    tile: int = 512,
    overlap: int = 32,
    side_by_side: Path | None = None,
) -> int:
    """Restore one image of any size with a network of the PromptIR family.

    Args:
        image: The image; gray and transparent ones become RGB.
        checkpoint: Its weights: safetensors, a sparse file of weightsmith's, or a .pt or .ckpt file of tensors, also in
            the layout that is published.
        out: The image to write; its ending is its format.
        model: promptir, promptir-WIDTH, or module:function.
        tile: Larger images are restored in overlapping squares of this side, in pixels.
        overlap: How far these reach into each other.
        side_by_side: Also write this picture of before and after.
    """
    if checkpoint is None or out is None:
        raise UsageError("--checkpoint names the weights, --out the image to write")
    pillow: Any = require("PIL.Image", extra="vision", purpose="reading and writing images")
    try:
        with pillow.open(image) as opened:
            pixels = np.asarray(opened.convert("RGB"))
    except (OSError, ValueError) as error:
        raise UsageError(f"image {str(image)!r} cannot be read: {reason(error)}") from error
    if pillow.registered_extensions().get(out.suffix.lower()) is None:
        raise UsageError(f"out {str(out)!r} must end like an image, for example .png")
    trained = load_network(model, checkpoint)
    before = torch.from_numpy(pixels.copy()).permute(2, 0, 1)[None].float() / 255
    after = restore_tiled(trained, before, tile=tile, overlap=overlap).clamp(0, 1)
    restored = (after[0].permute(1, 2, 0) * 255).round().byte().numpy()
    for path, content in ((out, restored), (side_by_side, np.concatenate([pixels, restored], axis=1))):
        if path is not None:
            with file_atomically(path) as fresh:
                pillow.fromarray(content).save(fresh)
    _console.print(f"Restored: {markup(out.resolve())}", soft_wrap=True, highlight=False)
    return 0


def load_network(name: str, checkpoint: Path) -> nn.Module:
    """Build a network and load its weights.

    Raises:
        UsageError: The file is missing or damaged, or holds the weights of another network.
    """
    if not checkpoint.exists():
        raise UsageError(f"checkpoint {str(checkpoint)!r}: there is no such file")
    if checkpoint.is_file() and checkpoint.suffix in (".pt", ".pth", ".ckpt", ".bin"):
        try:
            held = torch.load(checkpoint, map_location="cpu", weights_only=True)
        except Exception as error:  # what a file that is no pickle of tensors raises is of many kinds
            raise UsageError(f"checkpoint {str(checkpoint)!r} cannot be read: {reason(error)}") from error
        state = held.get("state_dict", held) if isinstance(held, dict) else {}
    else:
        try:
            state = load_sparse(checkpoint)
        except UsageError:
            state = dict(Checkpoint(checkpoint))
    prefixes = Counter(str(key).partition(".")[0] for key in state)
    if set(prefixes) == {"net"}:  # the published files hold the network inside a training module
        state = {key.removeprefix("net."): value for key, value in state.items()}
    unused = any(str(key).startswith("chnl_reduce") for key in state)
    model = PromptIR(include_unused=True) if name == "promptir" and unused else network(name)()
    try:
        model.load_state_dict(state)
    except RuntimeError as error:
        raise UsageError(f"checkpoint {str(checkpoint)!r} does not fit {name}: {reason(error)}") from error
    return model


@torch.no_grad()
def restore_tiled(model: nn.Module, images: Tensor, *, tile: int = 512, overlap: int = 32) -> Tensor:
    """Restore images in overlapping tiles that are blended linearly.

    Args:
        model: ``(B, 3, h, w) -> (B, 3, h, w)``.
        images: ``(B, 3, H, W)``.
        tile: Side of a tile.
        overlap: Pixels by which tiles overlap.

    Returns:
        ``(B, 3, H, W)``.

    Raises:
        UsageError: The overlap is not smaller than half a tile.
    """
    if tile < 8 or not 0 <= overlap < tile / 2:
        raise UsageError(f"tile must be at least 8 and overlap below half of it, got {tile} and {overlap}")
    height, width = images.shape[2:]
    total, weights = torch.zeros_like(images), torch.zeros_like(images[:1, :1])
    with evaluating(model):
        for top in _starts(height, tile, overlap):
            for left in _starts(width, tile, overlap):
                part = images[..., top : top + tile, left : left + tile]
                ramp = _ramp(part.shape[2], overlap)[:, None] * _ramp(part.shape[3], overlap)
                total[..., top : top + tile, left : left + tile] += model(part) * ramp
                weights[..., top : top + tile, left : left + tile] += ramp
    return total / weights


def _starts(length: int, tile: int, overlap: int) -> list[int]:
    if length <= tile:
        return [0]
    return [*range(0, length - tile, tile - overlap), length - tile]


def _ramp(length: int, overlap: int) -> Tensor:
    """1 in the middle, falling towards both ends."""
    distance = torch.minimum(torch.arange(length), torch.arange(length).flip(0)) + 1.0
    return (distance / (overlap + 1)).clamp_max(1.0)
