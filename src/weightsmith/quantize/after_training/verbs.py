"""The verbs: round a model's weights to nearest, or learn their rounding from calibration data."""

import time
import warnings
from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.core.select import Where
from weightsmith.quantize.after_training.adaquant import AdaQuant
from weightsmith.quantize.after_training.adaround import AdaRound
from weightsmith.quantize.after_training.blocks import Blocks
from weightsmith.quantize.after_training.calibration import Calibration
from weightsmith.quantize.after_training.flexround import FlexRound
from weightsmith.quantize.after_training.lrq import LRQ, saves
from weightsmith.quantize.after_training.options import LearningOptions, Recipe
from weightsmith.quantize.after_training.reconstruct import OnBlock, reconstruct_
from weightsmith.quantize.after_training.rtn import RoundToNearest
from weightsmith.quantize.after_training.survey import Done, choose_grids
from weightsmith.quantize.after_training.targets import choose_targets, left_out
from weightsmith.quantize.grid import Grid, as_grid
from weightsmith.quantize.report import BlockReport, Report, count_bytes, report_layer

_GRID = Grid()
_OPTIONS = LearningOptions()


def flexround_(
    model: nn.Module,
    calibration: Calibration,
    grid: Grid | int = _GRID,
    *,
    iterations: int = 5000,
    lr: float | Literal["auto"] = 1e-3,
    seed: int = 0,
    blocks: Blocks = "auto",
    batch_size: int | None = None,
    where: Where = None,
    overrides: Mapping[str, Grid | int] | None = None,
    device: torch.device | str | None = None,
    on_block: OnBlock | None = None,
    done: Done | None = None,
    options: LearningOptions = _OPTIONS,
    lrq: int | None = None,
    parametrization: Literal["log", "direct"] = "log",
    learn_s1: bool = True,
    use_s3: bool = True,
    use_s4: bool = True,
    safe: bool = False,
    compiled: bool = False,
) -> Report:
    """Quantize a trained model in place, block by block, with FlexRound: learn a divisor for every weight.

    ``w_hat = s1 * clamp(round(w / (s1 * S2 * s3 * s4)), low, high)``. All factors are learned to preserve the output of
    each block. Afterwards the weights are plain parameters on the grid; `quantized_weights` returns their codes.

    Args:
        model: Changed block by block, after all arguments have been checked. Its training modes are restored.
        calibration: A few hundred unlabeled samples: a tensor or array; or an iterable of batches such as a
            ``DataLoader`` (tensors, dicts, tuples or lists whose first item is taken); a one-dimensional integer tensor
            is one token sequence. Unequal lengths are padded, and the padding is left out of the loss.
        grid: The grid of the weights; an integer is a number of bits, ``Grid(bits)``.
        iterations: Steps per block.
        lr: Learning rate of Adam. ``"auto"`` tries 3e-3, 1e-3 and 3e-4 for 100 steps of the first block.
        seed: Seed of the order of batches and everything else that is random.
        blocks: What is quantized together. ``"auto"``: each module of the longest list of equal blocks, such as
            ``model.layers``. ``"layers"``: each layer. ``"whole"``: the model. Or a list of module names.
        batch_size: Samples per step; ``None``: 2 for token sequences, 32 otherwise.
        where: Which modules: glob(s) over module names, or a predicate. ``None``: every linear layer, convolution,
            ``nn.MultiheadAttention`` and module of experts inside the blocks, except the output head, tied weights and
            adapters. A module that is named outside of the blocks is a block of its own.
        overrides: Other grids by glob over layer names, for example ``{"head": Grid(8)}``. Packed projections and
            experts go by the name of the parameter, such as ``"*.experts.down_proj"``.
        device: Device for the current block; ``None``: where the block is.
        on_block: Called after each block with its name, its quantized weights by parameter name, and its report.
        done: Quantized weights by block, as ``on_block`` got them. These blocks are written instead of learned.
        options: Details of learning, see `LearningOptions`.
        lrq: Rank of the factors of matrices, which saves memory; ``None``: a factor per weight. Matrices for which the
            rank would save nothing, and convolutions, keep a factor per weight. Of the options below only ``use_s4``
            and ``compiled`` go with it.
        parametrization: ``"log"`` or ``"direct"``; see `FlexRound`.
        learn_s1: Learn the step.
        use_s3: Learn a factor per output channel.
        use_s4: Learn a factor per input channel of convolutions.
        safe: Keep factors within ``exp(-4)`` and ``exp(4)``.
        compiled: Let torch.compile fuse the passes over the weights: faster steps after some seconds of compilation.

    Returns:
        Errors before and after, by layer and block.

    Raises:
        UsageError: An argument is out of range or does not fit the model, a weight or an activation is not finite, a
            weight is tied, or there are fewer than 2 samples; the model is unchanged.

    Source: arXiv 2306.00317; ``lrq``: arXiv 2407.11534.
    """
    if lrq is not None and lrq < 1:
        raise UsageError(f"lrq must be a rank of at least 1, got {lrq}")
    if lrq is not None and (parametrization != "log" or not learn_s1 or not use_s3 or safe):
        raise UsageError(
            f'lrq={lrq} learns logarithms of every factor: leave parametrization="log", learn_s1=True, use_s3=True and '
            "safe=False, or leave lrq out"
        )

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
            for name, target in choose_targets(model, where).items()
            if not saves(target.view(target.weight, grid), lrq)
        ]
        if full:
            warnings.warn(
                f"lrq={lrq} saves nothing for {', '.join(full)}: a factor per weight is learned there",
                WeightsmithWarning,
                stacklevel=2,
            )
    return reconstruct_(
        model,
        calibration,
        grid,
        Recipe("flexround" if lrq is None else "lrq", make, iterations, lr, seed),
        options,
        blocks=blocks,
        batch_size=batch_size,
        where=where,
        overrides=overrides,
        device=device,
        on_block=on_block,
        done=done,
    )


def adaround_(
    model: nn.Module,
    calibration: Calibration,
    grid: Grid | int = _GRID,
    *,
    iterations: int = 20_000,
    lr: float | Literal["auto"] = 1e-3,
    seed: int = 0,
    blocks: Blocks = "auto",
    batch_size: int | None = None,
    where: Where = None,
    overrides: Mapping[str, Grid | int] | None = None,
    device: torch.device | str | None = None,
    on_block: OnBlock | None = None,
    done: Done | None = None,
    options: LearningOptions = _OPTIONS,
    penalty: float = 0.01,
) -> Report:
    """Quantize a trained model in place, block by block, with AdaRound: learn to round each weight up or down.

    Args:
        model: As for `flexround_`.
        calibration: As for `flexround_`.
        grid: As for `flexround_`; the paper's search is ``search="shrink"``.
        penalty: Weight of the regularizer that makes choices hard.
        iterations: Steps per block; the default is the paper's, at a constant learning rate.
        lr: As for `flexround_`.
        seed: As for `flexround_`.
        blocks: As for `flexround_`.
        batch_size: As for `flexround_`.
        where: As for `flexround_`.
        overrides: As for `flexround_`.
        device: As for `flexround_`.
        on_block: As for `flexround_`.
        done: As for `flexround_`.
        options: As for `flexround_`.

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

    return reconstruct_(
        model,
        calibration,
        grid,
        Recipe("adaround", make, iterations, lr, seed, cosine=False),
        options,
        blocks=blocks,
        batch_size=batch_size,
        where=where,
        overrides=overrides,
        device=device,
        on_block=on_block,
        done=done,
    )


def adaquant_(
    model: nn.Module,
    calibration: Calibration,
    grid: Grid | int = _GRID,
    *,
    iterations: int = 5000,
    lr: float | Literal["auto"] = 1e-3,
    seed: int = 0,
    blocks: Blocks = "auto",
    batch_size: int | None = None,
    where: Where = None,
    overrides: Mapping[str, Grid | int] | None = None,
    device: torch.device | str | None = None,
    on_block: OnBlock | None = None,
    done: Done | None = None,
    options: LearningOptions = _OPTIONS,
) -> Report:
    """Quantize a trained model in place, block by block, with AdaQuant: learn an offset of each weight, and the step.

    Args:
        model: As for `flexround_`.
        calibration: As for `flexround_`.
        grid: The grid of the weights; an integer is a number of bits, ``Grid(bits)``.
        iterations: Steps per block.
        lr: As for `flexround_`.
        seed: As for `flexround_`.
        blocks: As for `flexround_`.
        batch_size: As for `flexround_`.
        where: As for `flexround_`.
        overrides: As for `flexround_`.
        device: As for `flexround_`.
        on_block: As for `flexround_`.
        done: As for `flexround_`.
        options: As for `flexround_`.

    Returns:
        Errors before and after, by layer and block.

    Raises:
        UsageError: As `flexround_`.

    Source: arXiv 2006.10518.
    """

    def make(weight: Tensor, on: Grid, axis: int, _: torch.Generator) -> RoundToNearest:
        return AdaQuant(weight, on, axis=axis)

    return reconstruct_(
        model,
        calibration,
        grid,
        Recipe("adaquant", make, iterations, lr, seed),
        options,
        blocks=blocks,
        batch_size=batch_size,
        where=where,
        overrides=overrides,
        device=device,
        on_block=on_block,
        done=done,
    )


def round_to_nearest_(
    model: nn.Module,
    calibration: Calibration | None = None,
    grid: Grid | int = _GRID,
    *,
    blocks: Blocks = "auto",
    batch_size: int | None = None,
    where: Where = None,
    overrides: Mapping[str, Grid | int] | None = None,
    device: torch.device | str | None = None,
    on_block: OnBlock | None = None,
    done: Done | None = None,
    measured_batches: int | None = 8,
) -> Report:
    """Round every weight of a trained model to the nearest value of its grid, in place.

    Args:
        model: Changed once everything has been checked.
        calibration: Only to measure the error of block outputs, as for `flexround_`; ``None``: neither data nor blocks
            are needed, and every layer is reported on its own.
        grid: The grid of the weights; an integer is a number of bits, ``Grid(bits)``.
        blocks: What is quantized together. ``"auto"``: each module of the longest list of equal blocks, such as
            ``model.layers``. ``"layers"``: each layer. ``"whole"``: the model. Or a list of module names.
        batch_size: Samples per step; ``None``: 2 for token sequences, 32 otherwise.
        where: Which modules: glob(s) over module names, or a predicate. ``None``: every linear layer, convolution,
            ``nn.MultiheadAttention`` and module of experts inside the blocks, except the output head, tied weights and
            adapters. A module that is named outside of the blocks is a block of its own.
        overrides: Other grids by glob over layer names, for example ``{"head": Grid(8)}``. Packed projections and
            experts go by the name of the parameter, such as ``"*.experts.down_proj"``.
        device: Device for the current block; ``None``: where the block is.
        on_block: Called after each block with its name, its quantized weights by parameter name, and its report.
        done: Quantized weights by block, as ``on_block`` got them. These blocks are written instead of learned.
        measured_batches: As for `LearningOptions`.

    Returns:
        Errors by layer and, with calibration data, by block.

    Raises:
        UsageError: A weight is not finite or tied, or an argument does not fit the model; the model is unchanged.
    """
    if calibration is not None:
        return reconstruct_(
            model,
            calibration,
            grid,
            Recipe("rtn", _nearest),
            LearningOptions(measured_batches=measured_batches),
            blocks=blocks,
            batch_size=batch_size,
            where=where,
            overrides=overrides,
            device=device,
            on_block=on_block,
            done=done,
        )
    start, grid = time.perf_counter(), as_grid(grid)
    targets = choose_targets(model, where)
    grids = choose_grids(targets, grid, overrides or {})
    nbytes: dict[str, int] = {}
    reports: list[BlockReport] = []
    for name, target in targets.items():
        begun, key = time.perf_counter(), target.parameter
        found = target.quantized(target.rounding(_nearest, grids[name], torch.Generator()), grids[name])
        part = report_layer(key, target.weight.detach().to(found.scale.dtype), found, found)
        target.write_(found)
        nbytes[key] = found.nbytes
        reports.append(BlockReport(name, None, None, 0, "rtn", time.perf_counter() - begun, (part,)))
        if on_block is not None:
            on_block(name, {key: found}, reports[-1])
    seconds = time.perf_counter() - start
    return Report(
        model, "rtn", grid, tuple(reports), seconds, *count_bytes(model, nbytes), left=left_out(model, nbytes)
    )


def _nearest(weight: Tensor, grid: Grid, axis: int, _: torch.Generator) -> RoundToNearest:
    return RoundToNearest(weight, grid, axis=axis)
