"""Block-by-block reconstruction: learn the rounding of one block at a time so that its output stays what it was.

The objective of a block ``f`` is ``||f(W, x) - f(W_hat, x_q)||^2``, with ``x`` its input in the trained model and
``x_q`` that behind the blocks quantized so far (FlexRound, arXiv 2306.00317; BRECQ, arXiv 2102.05426). Both streams
advance together, so every block is run once per stream, and one block at a time is held in float32.
"""

import time
from collections.abc import Callable, Mapping

import torch
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.core.select import Where
from weightsmith.quantize.after_training.blocks import Blocks, Walk, find_blocks, targets_of
from weightsmith.quantize.after_training.calibration import Calibration, make_batches
from weightsmith.quantize.after_training.learn import BlockTask
from weightsmith.quantize.after_training.options import LearningOptions, Recipe
from weightsmith.quantize.after_training.states import at_rest, moved, single_precision
from weightsmith.quantize.after_training.streams import Streams
from weightsmith.quantize.after_training.survey import Done, check_called, check_done, choose_grids, example, survey
from weightsmith.quantize.after_training.targets import choose_targets, left_out, plain_attention
from weightsmith.quantize.grid import Grid, QuantizedWeight, as_grid
from weightsmith.quantize.report import BlockReport, Report, count_bytes, report_layer

OnBlock = Callable[[str, dict[str, QuantizedWeight], BlockReport], None]


def reconstruct_(
    model: nn.Module,
    calibration: Calibration,
    grid: Grid | int,
    recipe: Recipe,
    options: LearningOptions,
    *,
    blocks: Blocks,
    batch_size: int | None,
    where: Where,
    overrides: Mapping[str, Grid | int] | None,
    device: torch.device | str | None,
    on_block: OnBlock | None,
    done: Done | None,
) -> Report:
    """Quantize a model block by block; the caller's arguments are those of `flexround_`.

    Args:
        model: Changed in place, block after block, once everything has been checked.
        calibration: See `make_batches`.
        grid: Grid of every chosen layer that ``overrides`` does not name.
        recipe: The rounding method.
        options: How it is learned.
        blocks: As for `flexround_`.
        batch_size: As for `flexround_`.
        where: As for `flexround_`.
        overrides: As for `flexround_`.
        device: As for `flexround_`.
        on_block: As for `flexround_`.
        done: As for `flexround_`.
    """
    start = time.perf_counter()
    grid = as_grid(grid)
    done = done or {}
    if done and options.activations:
        raise UsageError("done holds weights only: it cannot be combined with activations")
    chosen = choose_targets(model, where)
    found = find_blocks(model, blocks, chosen, keep_others=where is not None)
    targets = {name: target for block in found for name, target in targets_of(block, chosen).items()}
    grids = choose_grids(targets, grid, overrides or {})
    check_done(done, found, targets)
    if options.activations is not None:
        check_called(targets)
    first = next(iter(targets.values())).weight
    batches = make_batches(calibration, batch_size, next(model.parameters()).device, first.dtype)
    with at_rest(model), plain_attention():
        walk = Walk(model, found, example(model, batches[0]))
        unseen = survey(model, walk, targets, batches)
        streams = Streams(walk, batches, {name: targets_of(name, targets) for name in walk.blocks})
        reports: list[BlockReport] = []
        nbytes: dict[str, int] = {}
        for index, name in enumerate(walk.blocks):
            with moved(walk.blocks[name], device):
                report, kept, recipe = _quantize_block(streams, index, name, grids, recipe, options, done.get(name))
            reports.append(report)
            nbytes |= {key: quantized.nbytes for key, quantized in kept.items()}
            if on_block is not None:
                on_block(name, kept, report)
    # a module may read the weight of another without calling it, as Mamba does: what has moved has been seen
    still = {layer.name for block in reports for layer in block.layers if not layer.moved}
    unseen = tuple(name for name in unseen if name not in targets or targets[name].parameter in still)
    seconds, left = time.perf_counter() - start, left_out(model, nbytes)
    return Report(model, recipe.name, grid, tuple(reports), seconds, *count_bytes(model, nbytes), unseen, left)


def _quantize_block(
    streams: Streams,
    index: int,
    name: str,
    grids: Mapping[str, Grid],
    recipe: Recipe,
    options: LearningOptions,
    done: Mapping[str, QuantizedWeight] | None,
) -> tuple[BlockReport, dict[str, QuantizedWeight], Recipe]:
    """Quantize one block; return its report, weights by parameter name, and the recipe with its learning rate."""
    start = time.perf_counter()
    targets = streams.parts[name]
    with single_precision(streams.walk.blocks[name]):
        task = BlockTask(streams, index, name, grids, recipe, options)
        found = task.given(done) if done is not None else task.fit()
        layers = tuple(
            report_layer(target.parameter, target.weight, found.rtn[key], found.kept[key])
            for key, target in targets.items()
        )
    for key, target in targets.items():
        target.write_(found.kept[key])
    if index + 1 < len(streams.walk.blocks):
        streams.advance(index, name, task.inputs)
    seconds = time.perf_counter() - start
    report = BlockReport(name, found.error_rtn, found.error, found.iterations, found.name, seconds, layers)
    return report, {target.parameter: found.kept[key] for key, target in targets.items()}, task.recipe
