"""``weightsmith restore``: take noise, haze or rain off an image with a trained network."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import tyro
from numpy.typing import NDArray
from rich.console import Console
from torch import Tensor, nn

from weightsmith.core.checkpoint import Checkpoint
from weightsmith.core.display import markup
from weightsmith.core.errors import UsageError, reason, require
from weightsmith.core.files import file_atomically
from weightsmith.core.modes import evaluating
from weightsmith.lab.models.promptir import PromptIR
from weightsmith.lab.tasks.restoration import network, psnr
from weightsmith.prune import load_sparse

Pixels = NDArray[np.uint8]
_LABEL, _SSIM_SIDE = 16, 7  # pixels: of a name above an image; the window of SSIM
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
    ticket: Path | None = None,
    clean: Path | None = None,
) -> int:
    """Restore one image of any size with a network of the PromptIR family, and draw it beside the original.

    Args:
        image: The image; gray and transparent ones become RGB.
        checkpoint: Its weights: safetensors, a sparse file of weightsmith's, or a .pt or .ckpt file of tensors, also in
            the layout that is published.
        out: The image to write; its ending is its format.
        model: promptir, promptir-WIDTH, or module:function.
        tile: Larger images are restored in overlapping squares of this side, in pixels.
        overlap: How far these reach into each other.
        side_by_side: Where the picture of before and after goes; by default beside --out, as NAME.compared.png.
        ticket: Weights of another network of this kind, for example a pruned one: its result is drawn beside the first.
        clean: The image as it should be: it is drawn as well, and PSNR and SSIM against it are told.
    """
    if checkpoint is None or out is None:
        raise UsageError("--checkpoint names the weights, --out the image to write")
    pillow: Any = require("PIL.Image", extra="vision", purpose="reading and writing images")
    side_by_side = side_by_side or out.with_name(f"{out.stem}.compared.png")
    for option, path in (("out", out), ("side-by-side", side_by_side)):
        if pillow.registered_extensions().get(path.suffix.lower()) is None:
            raise UsageError(f"{option} {str(path)!r} must end like an image, for example .png")
        if any(path.resolve() == other.resolve() for other in (image, clean, checkpoint, ticket) if other is not None):
            raise UsageError(f"{option} {str(path)!r} is a file that is read: choose another name")
    if side_by_side.resolve() == out.resolve():
        raise UsageError(f"side-by-side must be another file than out, got {str(out)!r} for both")
    before = _read(pillow, image, "image")
    wanted = None if clean is None else _read(pillow, clean, "clean")
    if wanted is not None and wanted.shape != before.shape:
        sizes = " and ".join(f"{pixels.shape[1]} x {pixels.shape[0]}" for pixels in (before, wanted))
        raise UsageError(f"clean {str(clean)!r} must have the size of the image, got {sizes}")
    panels = {"before": before}
    networks = {"restored": load_network(model, checkpoint)}
    if ticket is not None:
        networks["ticket"] = load_network(model, ticket)
    images = torch.from_numpy(before.copy()).permute(2, 0, 1)[None].float() / 255
    for name, network_ in networks.items():
        after = restore_tiled(network_, images, tile=tile, overlap=overlap).clamp(0, 1)
        panels[name] = (after[0].permute(1, 2, 0) * 255).round().byte().numpy()
    if wanted is not None:
        for name, pixels in panels.items():
            _console.print(f"{name}: {_quality(wanted, pixels)}", highlight=False)
        panels["clean"] = wanted
    for path, content in ((out, panels["restored"]), (side_by_side, _beside(panels))):
        with file_atomically(path) as fresh:
            pillow.fromarray(content).save(fresh)
    _console.print(f"Restored: {markup(out.resolve())}", soft_wrap=True, highlight=False)
    _console.print(f"Before and after: {markup(side_by_side.resolve())}", soft_wrap=True, highlight=False)
    return 0


def _read(pillow: Any, path: Path, name: str) -> Pixels:
    try:
        with pillow.open(path) as opened:
            return np.asarray(opened.convert("RGB"))
    except (OSError, ValueError) as error:
        raise UsageError(f"{name} {str(path)!r} cannot be read: {reason(error)}") from error


def _quality(clean: Pixels, pixels: Pixels) -> str:
    wanted, found = (torch.from_numpy(side.copy()).permute(2, 0, 1)[None].double() / 255 for side in (clean, pixels))
    text = f"PSNR {psnr(found, wanted).item():.2f} dB"
    return text if min(clean.shape[:2]) < _SSIM_SIDE else f"{text}, SSIM {similarity(clean / 255, pixels / 255):.4f}"


def similarity(clean: NDArray[Any], restored: NDArray[Any]) -> float:
    """Structural similarity on RGB, as scikit-image has it by default: ``(H, W, 3)`` each, in [0, 1]."""
    metrics: Any = require("skimage.metrics", extra="vision", purpose="structural similarity")
    return float(metrics.structural_similarity(clean, restored, data_range=1, channel_axis=-1))


def _beside(panels: Mapping[str, Pixels]) -> Pixels:
    """Draw images of one size side by side, each below its name."""
    from PIL import Image, ImageDraw

    height, width = next(iter(panels.values())).shape[:2]
    canvas = Image.new("RGB", (width * len(panels), height + _LABEL), "white")
    draw = ImageDraw.Draw(canvas)
    for place, (name, pixels) in enumerate(panels.items()):
        draw.text((place * width + 2, 2), name, fill="black")
        canvas.paste(Image.fromarray(pixels), (place * width, _LABEL))
    return np.asarray(canvas)


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
