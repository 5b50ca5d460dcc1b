"""Bone and related adapters: one small tensor, shared by many blocks of a frozen weight, is all that trains.

Cut ``W (out, in)`` into ``r x r`` blocks ``W[a, c]``. The update is linear in the trained tensor, which starts at zero,
so the first step begins at the base model exactly. The *guided* forms multiply by the weight itself and are of full
rank; *MiSS* drops the weight from the update and needs no more than a block-wise sum of the input.

    col   B (out/r, r, r)   dW[a, c] = W[a, c] B[a] + B[a]               Bone of v1 to v3, later called Bat
    row   B (in/r, r, r)    dW[a, c] = W[a, c] B[c] + B[c]               costs what LoRA costs
    free  B (p, q, r, r)    dW[a, c] = W[a, c] B[a % p, c % q] + B[a % p, c % q]
    miss  D (r, out)        dW[i, j] = D[j % r, i]                       any input width
    mini  D (r, m)          dW[i, j] = D[j % r, i % m]                   m divides out

There is no alpha and no scaling.

Source: arXiv 2409.15371, Jiale Kang, Qingyu Yin: "Bone: Block Affine Transformation" (v1 to v3), "Balancing LoRA
Performance and Efficiency with Simple Shard Sharing" (v10).
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, cast, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

from weightsmith.adapt import fused as kernels
from weightsmith.core.errors import UsageError, unknown
from weightsmith.core.select import Where

Variant = Literal["row", "col", "free", "miss", "mini"]
SHARED = ("miss", "mini")


@dataclass(frozen=True, slots=True)
class BoneConfig:
    """What an adapter looks like and where it goes.

    Args:
        r: Side of a block, also called rank; the papers take 64 for models of 7 B parameters.
        variant: ``"miss"`` (any width, a little cheaper than LoRA), ``"row"`` (uses the weight, costs what LoRA does),
            ``"col"`` (the first Bone; costs what full fine-tuning costs), ``"mini"`` (``"miss"`` whose tensor is shared
            by slices of ``mini_r`` outputs too: the fewest parameters) or ``"free"`` (between ``"row"`` and ``"col"``:
            ``tile`` says how many blocks there are).
        where: Which modules: ``None`` (every linear layer but output heads), glob(s) over module names, or a predicate.
            Heads are a language model's output layer, and what the class of a ``transformers`` model, or
            ``get_classifier`` of a ``timm`` model, puts behind the body: a classifier. Train a new one in full, with
            ``modules_to_save``. ``"miss"`` also goes on convolutions and embeddings that are named.
        rank_pattern: Other block sizes by glob over module names; the first that matches counts.
        dropout: Probability of dropping an input of the adapter, in [0, 1); not for ``"col"`` and ``"free"``.
        mini_r: Width ``m`` of the ``"mini"`` tensor ``(r, m)``, a divisor of every output width: outputs ``m`` apart
            get the same update. ``m`` equal to the output width is ``"miss"``.
        tile: ``(p, q)`` of ``"free"``: ``p x q`` different blocks ``(r, r)``, repeated down and across the weight like
            tiles. ``(1, 1)`` is one block for the whole weight, ``(1, in / r)`` is ``"row"``, ``(out / r, 1)`` is
            ``"col"``. With ``p = 1`` it costs what ``"row"`` does and goes on quantized layers; else as ``"col"``.
        modules_to_save: Names (also last parts of names) of modules that are trained in full and saved along.
        fused: Use our own backward pass, which saves memory and can be differentiated once. ``False``: plain
            operations, for ``torch.func``, double backward and Hessians.

    Raises:
        UsageError: A value is out of range, or does not go with the variant.
    """

    r: int = 64
    variant: Variant = "miss"
    where: Where = None
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    dropout: float = 0.0
    mini_r: int | None = None
    tile: tuple[int, int] | None = None
    modules_to_save: tuple[str, ...] = ()
    fused: bool = True

    def __post_init__(self) -> None:
        if self.variant not in get_args(Variant):
            raise unknown("variant", self.variant, get_args(Variant))
        ranks = {"r": self.r, **{f"rank_pattern[{glob!r}]": r for glob, r in self.rank_pattern.items()}}
        for name, value in ranks.items():
            if not _is_positive(value):
                raise UsageError(f"{name} must be a whole number of at least 1, got {value!r}")
        if not 0 <= self.dropout < 1:
            raise UsageError(f"dropout must be at least 0 and below 1, got {self.dropout}")
        if self.dropout and self.variant in ("col", "free"):
            raise UsageError(f"dropout must be 0 for variant {self.variant!r}, which has no input of its own to drop")
        if (self.variant == "mini") != (self.mini_r is not None):
            raise UsageError(f"mini_r goes with variant 'mini' and with no other, got {self.mini_r!r}")
        if self.mini_r is not None and not _is_positive(self.mini_r):
            raise UsageError(f"mini_r must be a whole number of at least 1, got {self.mini_r!r}")
        if (self.variant == "free") != (self.tile is not None):
            raise UsageError(f"tile goes with variant 'free' and with no other, got {self.tile!r}")
        if self.tile is not None and (len(self.tile) != 2 or not all(map(_is_positive, self.tile))):
            raise UsageError(f"tile must be two whole numbers of at least 1, got {self.tile!r}")
        if not isinstance(self.modules_to_save, tuple):
            raise UsageError(f"modules_to_save must be a tuple of names, got {self.modules_to_save!r}")


def bone_delta(weight: Tensor, block: Tensor, variant: Variant) -> Tensor:
    """Write out the update of a weight; differentiable.

    Args:
        weight: ``(out, in)``; for ``"miss"`` also a convolution's ``(out, in, *kernel)`` or an embedding's ``(V, d)``.
        block: The trained tensor; see the module docstring. A convolution's is ``(r, out, *kernel)``.
        variant: Which form.

    Returns:
        ``dW``, of the weight's shape.

    Raises:
        UsageError: The block does not fit the weight.
    """
    check_block(weight.shape, block.shape, variant)
    out, width = weight.shape[:2]
    if variant in SHARED:
        rows = block.repeat(-(-width // block.shape[0]), *([1] * (block.dim() - 1)))[:width].transpose(0, 1)
        return rows.repeat(out // rows.shape[0], *([1] * (rows.dim() - 1)))
    return kernels.guided(weight, as_tiles(block, variant, out, width))


def bone_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    block: Tensor,
    variant: Variant,
    *,
    fused: bool | None = None,
) -> Tensor:
    """Apply an adapted linear layer, ``x (W + dW)^T + b``, without ever keeping ``dW``.

    The fused form has a backward pass of its own. It saves ``(N, r)`` numbers for ``"miss"``, else ``x``; gradients go
    to ``x``, ``block`` and ``bias``. Under autocast it computes in autocast's dtype, otherwise in that of ``x``; what
    concerns the block alone is computed in the wider one of ``x`` and ``block``.

    Args:
        x: ``(..., in)``.
        weight: ``(out, in)``.
        bias: ``(out,)`` or ``None``.
        block: The trained tensor; see the module docstring.
        variant: Which form.
        fused: ``None``: where the weight is frozen. ``False``: plain operations, which can be differentiated any number
            of times and give the weight its gradient.

    Returns:
        ``(..., out)``, in the dtype that ``F.linear`` would give.

    Raises:
        UsageError: The block does not fit the weight, or ``fused=True`` and the weight requires a gradient.
    """
    check_block(weight.shape, block.shape, variant)
    if weight.requires_grad and fused:
        raise UsageError("fused must be False or None for a weight that requires a gradient; or freeze the weight")
    out, width = weight.shape
    x, block = autocast(x, block)
    if not weight.requires_grad if fused is None else fused:
        kernel, trained = _kernel(block, variant, out, width)
        y = kernel.apply(x.reshape(-1, width), weight, bias, trained)
        # as F.linear does: FSDP wants no views for outputs
        return cast(Tensor, torch.ops.aten._unsafe_view(y, [*x.shape[:-1], out]))
    if variant in ("col", "free"):
        return F.linear(x, weight + bone_delta(weight, block.to(weight.dtype), variant), bias)
    change, correction = activations(x, block, variant)
    return add_tiled(F.linear(x if change is None else x + change, weight, bias), correction)


def activations(x: Tensor, block: Tensor, variant: Variant) -> tuple[Tensor | None, Tensor]:
    """Split an update that needs no weight: what is added to the layer's input, and what to its output.

    The layer itself may be anything linear, a quantized one too: ``layer(x + change) + tiled(correction)``.

    Args:
        x: ``(..., in)``, the input.
        block: The trained tensor.
        variant: ``"miss"``, ``"mini"``, ``"row"``, or ``"free"`` with ``p = 1``.

    Returns:
        ``change (..., in)`` in the dtype of ``x``, or ``None``; ``correction (..., m)``, where ``m`` divides ``out``.
    """
    wide = x.to(torch.promote_types(x.dtype, block.dtype))
    if variant in SHARED:
        return None, kernels.block_sum(wide, block.shape[0]) @ block.to(wide.dtype)
    blocks = as_rows(block, variant, x.shape[-1])
    if blocks is None:
        raise UsageError(f"variant {variant!r} needs the weight itself: only 'miss', 'mini' and 'row' go without")
    t = torch.einsum("...cj,cij->...ci", wide.unflatten(-1, (-1, blocks.shape[-1])), blocks.to(wide.dtype))
    return t.flatten(-2).to(x.dtype), t.sum(-2)


def add_tiled(y: Tensor, correction: Tensor) -> Tensor:
    """Add ``(..., m)`` to each of the ``out / m`` slices of ``y (..., out)``, in the dtype of ``y``."""
    m = correction.shape[-1]
    tiles: Tensor = y.unflatten(-1, (-1, m))
    return (tiles + correction.unsqueeze(-2)).flatten(-2).to(y.dtype)


def autocast(x: Tensor, block: Tensor) -> tuple[Tensor, Tensor]:
    """Cast to autocast's dtype where autocast is on, as ``F.linear`` would."""
    device = x.device.type
    if not torch.is_autocast_enabled(device) or x.dtype == torch.float64:
        return x, block
    dtype = torch.get_autocast_dtype(device)
    return x.to(dtype), block.to(dtype)


def as_rows(block: Tensor, variant: Variant, width: int) -> Tensor | None:
    """The blocks of a guided form that acts on the input alone, one for each input slice; ``None`` for other forms."""
    if variant == "row":
        return block
    return _periodic(block[0], width // block.shape[-1]) if variant == "free" and block.shape[0] == 1 else None


def as_tiles(block: Tensor, variant: Variant, out: int, width: int) -> Tensor:
    """A guided form's blocks as ``(p, q, r, r)``, where ``p r`` divides ``out`` and ``q r`` divides ``width``."""
    if variant == "col":
        return block.unsqueeze(1)
    if variant == "row":
        return block.unsqueeze(0)
    p, q, r, _ = block.shape
    down, across = out // r, width // r
    block = block if down % p == 0 else _periodic(block, down)
    return block if across % q == 0 else _periodic(block.transpose(0, 1), across).transpose(0, 1)


def _kernel(block: Tensor, variant: Variant, out: int, width: int) -> tuple[type[torch.autograd.Function], Tensor]:
    if variant in SHARED:
        return kernels.Shared, block
    if variant == "col":
        return kernels.Col, block
    rows = as_rows(block, variant, width)
    return (kernels.Free, as_tiles(block, variant, out, width)) if rows is None else (kernels.Row, rows)


def _periodic(block: Tensor, count: int) -> Tensor:
    return block[torch.arange(count, device=block.device) % block.shape[0]]


def block_shape(config: BoneConfig, shape: tuple[int, ...], name: str, r: int | None = None) -> tuple[int, ...]:
    """Derive the shape of the trained tensor.

    Args:
        config: The adapter.
        shape: Of the weight, ``(out, in, *kernel)``.
        name: Of the layer, for errors.
        r: Block size; ``None``: that of the configuration.

    Raises:
        UsageError: This form, with this block size, does not fit the weight.
    """
    r = r or config.r
    out, width, *kernel = shape
    if r > width:
        raise UsageError(
            f"r must be at most {width}, the input width of {name}, got {r}: lower it there with rank_pattern"
        )
    if config.variant == "miss":
        return r, out, *kernel
    if config.mini_r is not None:
        if out % config.mini_r:
            raise UsageError(f"mini_r must divide {out}, the output width of {name}, got {config.mini_r}")
        return r, config.mini_r
    if width % r or out % r:
        common = math.gcd(out, width)
        nearest = min((n for n in range(1, common + 1) if common % n == 0), key=lambda n: abs(n - r))
        raise UsageError(
            f"r must divide both sides of {name}, a weight of {out} x {width}, got {r}: the nearest that does is "
            f"{nearest}, and rank_pattern sets it for this layer alone; variant 'miss' takes any width"
        )
    if config.tile is not None:
        return *config.tile, r, r
    return (out if config.variant == "col" else width) // r, r, r


def check_block(weight: tuple[int, ...], block: tuple[int, ...], variant: Variant) -> None:
    """Refuse a block that does not fit a weight.

    Raises:
        UsageError: Their shapes do not go together.
    """
    if variant not in get_args(Variant):
        raise unknown("variant", variant, get_args(Variant))
    out, width, *kernel = weight
    r = block[0] if variant in SHARED else block[-1]
    fits = {
        "miss": block == (r, out, *kernel) and r <= width,
        "mini": len(block) == len(weight) == 2 and r <= width and out % block[-1] == 0,
        "col": block == (out // r, r, r) and out % r == width % r == 0,
        "row": block == (width // r, r, r) and out % r == width % r == 0,
        "free": len(block) == 4 and block[2] == r and out % r == width % r == 0,
    }
    if not fits[variant]:
        raise UsageError(f"block of shape {tuple(block)} does not fit a weight of {tuple(weight)} as {variant!r}")


def _is_positive(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
