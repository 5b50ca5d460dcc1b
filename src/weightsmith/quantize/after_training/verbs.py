"""The verbs: round a model's weights to nearest, or learn their rounding from calibration data."""

import time
import warnings
from collections.abc import Mapping
from typing import Literal, TypedDict, Unpack

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.core.select import Where
from weightsmith.quantize.after_training.activations import Activations
from weightsmith.quantize.after_training.adaquant import AdaQuant
from weightsmith.quantize.after_training.adaround import AdaRound
from weightsmith.quantize.after_training.blocks import Blocks
from weightsmith.quantize.after_training.calibration import Calibration
from weightsmith.quantize.after_training.flexround import FlexRound
from weightsmith.quantize.after_training.lrq import LRQ, saves
from weightsmith.quantize.after_training.reconstruct import Done, OnBlock, Options, Recipe, choose_grids, reconstruct_
from weightsmith.quantize.after_training.rtn import RoundToNearest
from weightsmith.quantize.after_training.targets import choose_targets, left_out
from weightsmith.quantize.grid import Grid, as_grid
from weightsmith.quantize.report import BlockReport, Report, count_bytes, report_layer

_GRID = Grid()


class BlockOptions(TypedDict, total=False):
    """Options of every verb.

    Attributes:
        blocks: What is reconstructed as one: ``"auto"``, the single longest list of alike blocks (``model.layers``);
            ``"layers"``, every chosen layer; ``"whole"``, the model; or module names.
        batch_size: Samples per step; ``None``: 2 for token sequences, 32 otherwise.
        where: Which modules: ``None`` (every linear layer, convolution, ``nn.MultiheadAttention`` and module of experts
            inside the blocks, but neither the output embedding, nor tied weights, nor adapters), glob(s), or a
            predicate; modules named outside of the blocks are reconstructed on their own.
        overrides: Other grids by glob over layer names, for example ``{"head": Grid(8)}``; packed projections and
            experts go by the name of the parameter, such as ``"*.experts.down_proj"``.
        on_block: Called with name, quantized weights by parameter name, and report of each finished block.
        done: Quantized weights of blocks that are finished already, by block; these are written, not optimized.
        device: Where the block at hand is worked on; ``None``: where it is.
        measured_batches: On how many batches of the calibration data, spread evenly, errors of blocks are measured;
            ``None``: all. 8: measuring on everything takes longer than a few hundred steps.
    """

    blocks: Blocks
    batch_size: int | None
    where: Where
    overrides: Mapping[str, Grid | int]
    on_block: OnBlock | None
    done: Done
    device: torch.device | str | None
    measured_batches: int | None


class LearningOptions(BlockOptions, total=False):
    """Options of the verbs that learn.

    Attributes:
        iterations: Steps per block; 5000, for AdaRound 20000.
        lr: Learning rate of Adam; ``"auto"`` tries 3e-3, 1e-3 and 3e-4 for 100 steps of the first block. 1e-3.
        seed: Of the order of batches and everything else that is drawn; 0.
        keep_best: Keep the best of round-to-nearest and the rounding after one half, three quarters and all of the
            steps, judged on ``measured_batches``; ``False``: the last. ``True``.
        loss_reduction: ``"sum_dim1"`` sums squared differences over dimension 1 and takes the mean over the others, as
            the authors' code does; ``"mean"``. AdaRound's penalty is relative to it.
        input_drop: Probability with which an element of a block's input comes from the quantized stream, the rest
            from the trained one; QDrop takes 0.5. 1.
        activations: Also quantize the inputs of the layers, statically, and learn their steps.
        last_block: ``"output"``, or ``"logits"``: judge the last block by the divergence of the model's predictions.
        autocast: Compute blocks in this dtype; weights are always rounded in float32 at least.
    """

    iterations: int
    lr: float | Literal["auto"]
    seed: int
    keep_best: bool
    loss_reduction: Literal["sum_dim1", "mean"]
    input_drop: float
    activations: Activations | None
    last_block: Literal["output", "logits"]
    autocast: torch.dtype | None


def flexround_(
    model: nn.Module,
    calibration: Calibration,
    grid: Grid | int = _GRID,
    *,
    lrq: int | None = None,
    parametrization: Literal["log", "direct"] = "log",
    learn_s1: bool = True,
    use_s3: bool = True,
    use_s4: bool = True,
    safe: bool = False,
    compiled: bool = False,
    **options: Unpack[LearningOptions],
) -> Report:
    """Quantize a trained model, learning by division to which integer each weight goes; in place, block by block.

    ``w_hat = s1 * clamp(round(w / (s1 * S2 * s3 * s4)), low, high)``, every factor learned so that block outputs stay
    what they were. Afterwards weights are plain parameters on their grid; `quantized_weights` gives their codes.

    Args:
        model: Changed block after block, once everything has been checked. Its modes and flags are restored.
        calibration: A few hundred unlabelled samples: a tensor or array; or an iterable of batches such as a
            ``DataLoader`` (tensors, dicts, tuples or lists whose first item is taken); a one-dimensional integer tensor
            is one token sequence. Unequal lengths are padded, and the padding is left out of the loss.
        grid: Where weights are put; a number of bits stands for ``Grid(bits)``.
        lrq: Rank of the factors of matrices, which saves memory; ``None``: a factor per weight. Matrices for which the
            rank would save nothing, and convolutions, keep a factor per weight.
        parametrization: ``"log"`` or ``"direct"``; see `FlexRound`.
        learn_s1: Learn the step.
        use_s3: Learn a factor per output channel.
        use_s4: Learn a factor per input channel of convolutions.
        safe: Keep factors within ``exp(-4)`` and ``exp(4)``.
        compiled: Let torch.compile fuse the passes over the weights: faster steps after some seconds of compilation.
        **options: See `LearningOptions`.

    Returns:
        Errors before and after, by layer and block.

    Raises:
        UsageError: An argument is out of range or does not fit the model, a weight or an activation is not finite, a
            weight is tied, or there are fewer than 2 samples; the model is unchanged.

    Source: arXiv 2306.00317; ``lrq``: arXiv 2407.11534.
    """
    if lrq is not None and lrq < 1:
        raise UsageError(f"lrq must be a rank of at least 1, got {lrq}")

    def make(weight: Tensor, on: Grid, axis: int, generator: torch.Generator) -> RoundToNearest:
        if lrq is not None and saves(weight, lrq):
            return LRQ(weight, on, axis=axis, rank=lrq, generator=generator, compiled=compiled)
        return FlexRound(
            weight,
            on,
            axis=axis,
            parametrization=parametrization,
            learn_s1=learn_s1,
            use_s3=use_s3,
            use_s4=use_s4,
            safe=safe,
            compiled=compiled,
        )

    grid = as_grid(grid)
    if lrq is not None:
        full = [
            name
            for name, target in choose_targets(model, options.get("where")).items()
            if not saves(target.view(target.weight, grid), lrq)
        ]
        if full:
            warnings.warn(
                f"lrq={lrq} saves nothing for {', '.join(full)}: a factor per weight is learned there",
                WeightsmithWarning,
                stacklevel=2,
            )
    return reconstruct_(
        model, calibration, grid, Recipe("flexround" if lrq is None else "lrq", make), Options(**options)
    )


def adaround_(
    model: nn.Module,
    calibration: Calibration,
    grid: Grid | int = _GRID,
    *,
    penalty: float = 0.01,
    **options: Unpack[LearningOptions],
) -> Report:
    """Quantize a trained model, learning for each weight whether it is rounded up or down; in place, block by block.

    Args:
        model: As for `flexround_`.
        calibration: As for `flexround_`.
        grid: As for `flexround_`; the paper's search is ``search="shrink"``.
        penalty: Weight of the regularizer that makes choices hard.
        **options: See `LearningOptions`; the default is the paper's 20 000 steps, at a constant rate.

    Returns:
        Errors before and after, by layer and block.

    Raises:
        UsageError: As `flexround_`.

    Source: arXiv 2004.10568.
    """
    if penalty < 0:
        raise UsageError(f"penalty must not be negative, got {penalty}")

    def make(weight: Tensor, on: Grid, axis: int, _: torch.Generator) -> RoundToNearest:
        return AdaRound(weight, on, axis=axis, penalty=penalty)

    options.setdefault("iterations", 20_000)
    return reconstruct_(model, calibration, grid, Recipe("adaround", make, cosine=False), Options(**options))


def adaquant_(
    model: nn.Module, calibration: Calibration, grid: Grid | int = _GRID, **options: Unpack[LearningOptions]
) -> Report:
    """Quantize a trained model, learning an additive correction of each weight and the step; in place, block by block.

    Args:
        model: As for `flexround_`.
        calibration: As for `flexround_`.
        grid: Where weights are put; a number of bits stands for ``Grid(bits)``.
        **options: See `LearningOptions`.

    Returns:
        Errors before and after, by layer and block.

    Raises:
        UsageError: As `flexround_`.

    Source: arXiv 2006.10518.
    """

    def make(weight: Tensor, on: Grid, axis: int, _: torch.Generator) -> RoundToNearest:
        return AdaQuant(weight, on, axis=axis)

    return reconstruct_(model, calibration, grid, Recipe("adaquant", make), Options(**options))


def round_to_nearest_(
    model: nn.Module,
    calibration: Calibration | None = None,
    grid: Grid | int = _GRID,
    **options: Unpack[BlockOptions],
) -> Report:
    """Quantize a trained model by rounding every weight to the nearest value of its grid; in place.

    Args:
        model: Changed once everything has been checked.
        calibration: Only to measure the error of block outputs, as for `flexround_`; ``None``: neither data nor blocks
            are needed, and every layer is reported on its own.
        grid: Where weights are put; a number of bits stands for ``Grid(bits)``.
        **options: See `BlockOptions`.

    Returns:
        Errors by layer and, with calibration data, by block.

    Raises:
        UsageError: A weight is not finite or tied, or an argument does not fit the model; the model is unchanged.
    """
    if calibration is not None:
        return reconstruct_(model, calibration, grid, Recipe("rtn", _nearest), Options(**options))
    start, grid = time.perf_counter(), as_grid(grid)
    targets = choose_targets(model, options.get("where"))
    grids = choose_grids(targets, grid, options.get("overrides", {}))
    nbytes, blocks = {}, []
    for name, target in targets.items():
        begun, key = time.perf_counter(), target.parameter
        found = target.quantized(target.rounding(_nearest, grids[name], torch.Generator()), grids[name])
        part = report_layer(key, target.weight.detach().to(found.scale.dtype), found, found)
        target.write_(found)
        nbytes[key] = found.nbytes
        blocks.append(BlockReport(name, None, None, 0, "rtn", time.perf_counter() - begun, (part,)))
        if (on_block := options.get("on_block")) is not None:
            on_block(name, {key: found}, blocks[-1])
    seconds = time.perf_counter() - start
    return Report("rtn", grid, tuple(blocks), seconds, *count_bytes(model, nbytes), left=left_out(model, nbytes))


def _nearest(weight: Tensor, grid: Grid, axis: int, _: torch.Generator) -> RoundToNearest:
    return RoundToNearest(weight, grid, axis=axis)
