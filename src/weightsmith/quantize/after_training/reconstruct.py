"""Block-by-block reconstruction: learn the rounding of one block at a time so that its output stays what it was.

The objective of a block ``f`` is ``||f(W, x) - f(W_hat, x_q)||^2``, with ``x`` its input in the trained model and
``x_q`` that behind the blocks quantized so far (FlexRound, arXiv 2306.00317; BRECQ, arXiv 2102.05426). Both streams
advance together, so every block is run once per stream, and one block at a time is held in float32.
"""

import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from weightsmith.core.errors import UsageError, WeightsmithWarning, unknown
from weightsmith.core.select import Where
from weightsmith.quantize.after_training.activations import Activations, StaticActivation, mask_like
from weightsmith.quantize.after_training.blocks import (
    Arguments,
    Blocks,
    Walk,
    find_blocks,
    first_tensor,
    hollow,
    targets_of,
)
from weightsmith.quantize.after_training.calibration import Batch, Calibration, make_batches
from weightsmith.quantize.after_training.rtn import RoundToNearest
from weightsmith.quantize.after_training.states import at_rest, moved, single_precision
from weightsmith.quantize.after_training.targets import Make, Target, choose_targets, left_out, plain_attention, written
from weightsmith.quantize.grid import Grid, QuantizedWeight, as_grid
from weightsmith.quantize.inputs import quantize_input_
from weightsmith.quantize.report import BlockReport, Report, count_bytes, report_layer

OnBlock = Callable[[str, dict[str, QuantizedWeight], BlockReport], None]
Done = Mapping[str, Mapping[str, QuantizedWeight]]
_AUTO_LRS = (3e-3, 1e-3, 3e-4)
_AUTO_ITERATIONS = 100
_TRACED_TOKENS = 8


@dataclass(frozen=True, slots=True)
class LearningOptions:
    """Details of learning a rounding; the defaults suit most models.

    Attributes:
        keep_best: Keep the best of round-to-nearest and the rounding after one half, three quarters and all of the
            steps, measured on ``measured_batches``. ``False``: keep the last one.
        loss_reduction: ``"sum_dim1"`` sums squared differences over dimension 1 and averages over the others, as the
            authors' code does. ``"mean"`` averages over all. AdaRound's penalty is relative to it.
        input_drop: Probability in (0, 1] with which an element of a block's input is taken from the quantized model
            rather than the trained one. QDrop takes 0.5.
        activations: Also quantize the inputs of the layers, statically, and learn their steps. ``None``: weights only.
        last_block: ``"output"``, or ``"logits"``: compare the last block by the divergence of the model's predictions.
        autocast: Compute blocks in this dtype. Weights are always rounded in float32 or float64. ``None``: no autocast.
        measured_batches: Number of calibration batches, evenly spaced, on which block errors are measured. ``None``:
            all of them, which takes longer than a few hundred steps.

    Raises:
        UsageError: A value is out of range.
    """

    keep_best: bool = True
    loss_reduction: Literal["sum_dim1", "mean"] = "sum_dim1"
    input_drop: float = 1.0
    activations: Activations | None = None
    last_block: Literal["output", "logits"] = "output"
    autocast: torch.dtype | None = None
    measured_batches: int | None = 8

    def __post_init__(self) -> None:
        if self.loss_reduction not in ("sum_dim1", "mean"):
            raise unknown("loss_reduction", self.loss_reduction, ["sum_dim1", "mean"])
        if self.last_block not in ("output", "logits"):
            raise unknown("last_block", self.last_block, ["output", "logits"])
        if not 0 < self.input_drop <= 1:
            raise UsageError(f"input_drop must be above 0 and at most 1, got {self.input_drop}")
        if self.measured_batches is not None and self.measured_batches < 1:
            raise UsageError(f"measured_batches must be at least 1, or None for all, got {self.measured_batches}")


@dataclass(frozen=True, slots=True)
class Recipe:
    """A rounding method as the reconstruction sees it.

    Attributes:
        name: For the report.
        make: ``(weight, grid, axis, generator) -> rounding`` of one weight.
        iterations: Steps per block.
        lr: Learning rate, or ``"auto"``.
        seed: Seed of everything random.
        cosine: Decay the learning rate to 0 along a cosine; else it is constant.
    """

    name: str
    make: Make
    iterations: int = 0
    lr: float | Literal["auto"] = 1e-3
    seed: int = 0
    cosine: bool = True

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise UsageError(f"iterations must not be negative, got {self.iterations}")
        if self.lr != "auto" and not (isinstance(self.lr, int | float) and self.lr > 0):
            raise UsageError(f"lr must be positive or 'auto', got {self.lr!r}")


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
    _check_done(done, found, targets)
    if options.activations is not None:
        _check_called(targets)
    first = next(iter(targets.values())).weight
    batches = make_batches(calibration, batch_size, next(model.parameters()).device, first.dtype)
    with at_rest(model), plain_attention():
        walk = Walk(model, found, _example(model, batches[0]))
        unseen = _survey(model, walk, targets, batches)
        run = _Run(targets, grids, batches, walk, recipe, options, device)
        reports = []
        for index, name in enumerate(walk.blocks):
            report, kept = run.block(index, name, done.get(name))
            reports.append(report)
            if on_block is not None:
                on_block(name, kept, report)
    # a module may read the weight of another without calling it, as Mamba does: what has moved has been seen
    still = {layer.name for block in reports for layer in block.layers if not layer.moved}
    unseen = tuple(name for name in unseen if name not in targets or targets[name].parameter in still)
    seconds, left = time.perf_counter() - start, left_out(model, run.nbytes)
    return Report(model, recipe.name, grid, tuple(reports), seconds, *count_bytes(model, run.nbytes), unseen, left)


def choose_grids(targets: Mapping[str, Target], grid: Grid, overrides: Mapping[str, Grid | int]) -> dict[str, Grid]:
    """The grid of each weight, checked to fit it.

    Args:
        targets: By name.
        grid: Of weights that no override names.
        overrides: Grids by glob; the first match counts.

    Raises:
        UsageError: A grid does not fit, or a glob matches no weight.
    """
    for glob in overrides:
        if not any(fnmatchcase(name, glob) for name in targets):
            raise unknown("glob in overrides", glob, targets)
    grids = {}
    for name, target in targets.items():
        grids[name] = as_grid(next((other for glob, other in overrides.items() if fnmatchcase(name, glob)), grid))
        try:
            grids[name].split(target.view(target.weight, grids[name]), 0 if target.stacked else target.axis)
        except UsageError as error:
            raise UsageError(f"{name}: {error}") from error
    return grids


def _check_done(done: Done, blocks: Mapping[str, nn.Module], targets: Mapping[str, Target]) -> None:
    for block, weights in done.items():
        if block not in blocks:
            raise unknown("block in done", block, blocks)
        for target in targets_of(block, targets).values():
            found = weights.get(target.parameter)
            if found is None or found.shape != target.weight.shape:
                raise UsageError(f"done holds no {target.parameter} of this shape for block {block!r}")


def _check_called(targets: Mapping[str, Target]) -> None:
    """Inputs are quantized where a layer is called with them; packed or stacked weights have no layer of their own."""
    if inside := [name for name, target in targets.items() if name != target.owner]:
        raise UsageError(
            f"activations cannot be quantized for {', '.join(inside)}, which have no layer of their own: leave these "
            "out with where=, or leave out activations"
        )


class _Run:
    """One pass over a model: both streams, and what each quantized weight takes."""

    def __init__(
        self,
        targets: Mapping[str, Target],
        grids: Mapping[str, Grid],
        batches: list[Batch],
        walk: Walk,
        recipe: Recipe,
        options: LearningOptions,
        device: torch.device | str | None,
    ) -> None:
        self.grids, self.walk, self.device = grids, walk, device
        self.parts = {name: targets_of(name, targets) for name in walk.blocks}
        self.batches, self.recipe, self.options = batches, recipe, options
        self.full: list[dict[str, Any]] = [{} for _ in batches]  # outputs of the trained blocks, by batch and block
        self.rounded: list[dict[str, Any]] = [{} for _ in batches]
        self.lr = recipe.lr
        self.nbytes: dict[str, int] = {}

    def block(
        self, index: int, name: str, done: Mapping[str, QuantizedWeight] | None
    ) -> tuple[BlockReport, dict[str, QuantizedWeight]]:
        """Quantize one block, and return its report and its weights by parameter name."""
        start = time.perf_counter()
        module = self.walk.blocks[name]
        targets = self.parts[name]
        with moved(module, self.device):
            with single_precision(module):
                task = self._task(index, name, targets)
                found = task.given(done) if done is not None else task.fit()
                parts = tuple(
                    report_layer(target.parameter, target.weight, found.rtn[key], found.kept[key])
                    for key, target in targets.items()
                )
            for key, target in targets.items():
                target.write_(found.kept[key])
            if index + 1 < len(self.walk.blocks):
                self._advance(index, name, task.inputs)
        kept = {target.parameter: found.kept[key] for key, target in targets.items()}
        self.nbytes |= {key: quantized.nbytes for key, quantized in kept.items()}
        seconds = time.perf_counter() - start
        return BlockReport(name, found.error_rtn, found.error, found.iterations, found.name, seconds, parts), kept

    def call(self, name: str, arguments: Arguments) -> Any:
        """Run a block in its own precision and on its own device, and give the result in those of its input."""
        weight = next(iter(self.parts[name].values())).weight
        floats = [
            leaf for leaf in pytree.tree_leaves(arguments) if isinstance(leaf, Tensor) and leaf.is_floating_point()
        ]
        if not floats or (floats[0].dtype, floats[0].device) == (weight.dtype, weight.device):
            return self.walk.call(name, arguments)
        output = self.walk.call(name, _convert(arguments, weight.dtype, weight.device))
        return _convert(output, floats[0].dtype, floats[0].device)

    @torch.no_grad()
    def _task(self, index: int, name: str, targets: dict[str, Target]) -> "_Task":
        inputs: list[Arguments] = []
        trained_inputs: list[Arguments] = []
        for batch, full, rounded in zip(self.batches, self.full, self.rounded, strict=True):
            at_full = self.walk.inputs(name, batch, full)
            at_rounded = self.walk.inputs(name, batch, rounded) if index else at_full
            inputs.append(_shared(at_rounded, inputs[0]) if inputs else at_rounded)
            if self.options.input_drop < 1:
                trained_inputs.append(at_full)
            full[name] = self.call(name, at_full)
            self._forget(index, full)
        return _Task(self, index, name, targets, inputs, trained_inputs)

    @torch.no_grad()
    def _advance(self, index: int, name: str, inputs: list[Arguments]) -> None:
        for position, rounded in enumerate(self.rounded):
            rounded[name] = self.call(name, inputs[position])
            inputs[position] = (), {}  # else both streams would be held twice for a while
            self._forget(index, rounded)

    def _forget(self, index: int, outputs: dict[str, Any]) -> None:
        for name in outputs:
            if self.walk.last_use[name] <= index:
                outputs[name] = hollow(outputs[name])


@dataclass(frozen=True, slots=True)
class _Found:
    """The rounding of one block: as `BlockReport`, with the weights by layer."""

    rtn: dict[str, QuantizedWeight]
    kept: dict[str, QuantizedWeight]
    error_rtn: float
    error: float
    iterations: int
    name: str


class _Task:
    """Finding the rounding of one block."""

    def __init__(
        self,
        run: _Run,
        index: int,
        name: str,
        targets: dict[str, Target],
        inputs: list[Arguments],
        trained_inputs: list[Arguments],
    ) -> None:
        self.run, self.name, self.targets, self.options = run, name, targets, run.options
        self.inputs, self.trained_inputs = inputs, trained_inputs
        self.seed = run.recipe.seed + 1_000_003 * index  # of its own, so that a resumed run repeats an unbroken one
        self.by_logits = self.options.last_block == "logits" and index == len(run.walk.blocks) - 1
        self.grids = {key: run.grids[key] for key in targets}
        self.weights = {key: target.view(target.weight, self.grids[key]) for key, target in targets.items()}
        count = min(self.options.measured_batches or len(inputs), len(inputs))
        self.measured = [position * len(inputs) // count for position in range(count)]
        self.device = next(iter(self.weights.values())).device
        self.generator = torch.Generator()
        self.steps = 0
        self.quantizers = self._quantize_inputs()

    def given(self, done: Mapping[str, QuantizedWeight]) -> "_Found":
        """Take over weights that are finished already."""
        kept = {key: done[target.parameter] for key, target in self.targets.items()}
        rtn = self._quantized(self._roundings(), learned=False)
        return _Found(rtn, kept, self._error(rtn), self._error(kept), 0, "done")

    def fit(self) -> "_Found":
        """Learn, and keep what is best."""
        recipe, roundings = self.run.recipe, self._roundings()
        rtn = self._quantized(roundings, learned=False)
        error_rtn = self._error(rtn)
        found = _Found(rtn, rtn, error_rtn, error_rtn, 0, "rtn")
        if not recipe.iterations or not any(True for rounding in roundings.values() for _ in rounding.parameters()):
            return found
        if self.run.lr == "auto":
            self.run.lr = self._choose_lr()
        marks = {recipe.iterations // 2, 3 * recipe.iterations // 4} if self.options.keep_best else set()
        scales = self._scales()
        for step in self._optimize(roundings, float(self.run.lr), recipe.iterations):
            if step not in marks and step < recipe.iterations:
                continue
            candidate = self._quantized(roundings)
            error = self._error(candidate)
            if error < found.error or not self.options.keep_best:
                found = replace(found, kept=candidate, error=error, iterations=step, name=f"iteration {step}")
                scales = self._scales()
        self._restore(scales)
        _warn(self.name, roundings)
        return replace(found, iterations=self.steps)

    def _choose_lr(self) -> float:
        tried, scales = {}, self._scales()
        for lr in _AUTO_LRS:
            roundings = self._roundings()
            for _ in self._optimize(roundings, lr, min(_AUTO_ITERATIONS, self.run.recipe.iterations)):
                pass
            error = self._error(self._quantized(roundings))
            tried[lr] = error if math.isfinite(error) else math.inf
            self._restore(scales)
        return min(tried, key=tried.__getitem__)

    def _optimize(self, roundings: dict[str, RoundToNearest], lr: float, iterations: int) -> Iterator[int]:
        """Make steps, and stop after each; the end comes early when the loss is not finite."""
        units = {key: rounding.units(self.weights[key]) for key, rounding in roundings.items()}
        learned = [parameter for rounding in roundings.values() for parameter in rounding.parameters()]
        groups: list[dict[str, Any]] = [{"params": learned, "lr": lr, "cosine": self.run.recipe.cosine}]
        if self.options.activations is not None:
            scales = [quantizer.scale for quantizer in self.quantizers]
            groups.append({"params": scales, "lr": self.options.activations.lr, "cosine": True})
        optimizer = torch.optim.Adam(groups, fused=True)
        base = [group["lr"] for group in groups]
        scaler = torch.amp.GradScaler(self.device.type, enabled=self.options.autocast == torch.float16)
        order: list[int] = []
        for self.steps in range(1, iterations + 1):
            for quantizer in self.quantizers:
                quantizer.train()
            order = order or torch.randperm(len(self.inputs), generator=self.generator).tolist()
            values = {
                key: self.targets[key].restore(rounding.join(rounding.soft(units[key]), self.weights[key]))
                for key, rounding in roundings.items()
            }
            loss = self._loss(order.pop(), values)
            extras = [rounding.regularizer(self.steps / iterations) for rounding in roundings.values()]
            loss = sum((extra for extra in extras if extra is not None), loss)
            if not math.isfinite(loss.item()):
                _warn_of_divergence(self.name, self.steps)
                return
            falling = 0.5 * (1 + math.cos(math.pi * (self.steps - 1) / iterations))
            for group, rate in zip(optimizer.param_groups, base, strict=True):
                group["lr"] = rate * falling if group["cosine"] else rate
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            for rounding in roundings.values():
                rounding.project_()
            yield self.steps

    def _loss(self, index: int, values: dict[str, Tensor]) -> Tensor:
        arguments = self.inputs[index]
        if self.trained_inputs:
            arguments = self._mixed(arguments, self.trained_inputs[index])
        autocast = self.options.autocast
        with (
            written(self.targets, values),
            torch.autocast(self.device.type, dtype=autocast, enabled=autocast is not None),
        ):
            output = self.run.call(self.name, arguments)
        if self.by_logits:
            return self._divergence(index, output)
        got, wanted, mask = self._compared(index, output)
        scale = got.shape[1] if self.options.loss_reduction == "sum_dim1" and got.ndim > 1 else 1
        if mask is None:
            return F.mse_loss(got, wanted) * scale
        return ((got - wanted).square() * mask).mean() * scale

    @torch.no_grad()
    def _error(self, quantized: Mapping[str, QuantizedWeight]) -> float:
        """Error with hard-rounded weights, over batches that are spread evenly over the calibration set."""
        for quantizer in self.quantizers:
            quantizer.eval()
        values = {key: found.dequantize(self.weights[key].dtype) for key, found in quantized.items()}
        total, size = 0.0, 0.0
        with written(self.targets, values):
            for index in self.measured:
                output = self.run.call(self.name, self.inputs[index])
                if self.by_logits:
                    total, size = total + self._divergence(index, output).item(), size + 1
                    continue
                got, wanted, mask = self._compared(index, output)
                difference = (got - wanted).square()
                total += (difference if mask is None else difference * mask).sum().item()
                size += (wanted.square() if mask is None else wanted.square() * mask).sum().item()
        return total / max(size, torch.finfo(torch.float32).tiny)

    def _compared(self, index: int, output: Any) -> tuple[Tensor, Tensor, Tensor | None]:
        got = first_tensor(output)
        got = got.to(torch.promote_types(got.dtype, torch.float32))
        wanted = first_tensor(self.run.full[index][self.name]).to(got)
        mask = self.run.batches[index].mask
        if mask is None or mask.shape != got.shape[:2]:
            return got, wanted, None
        return got, wanted, mask.to(got).view(*mask.shape, *(1,) * (got.ndim - 2))

    def _divergence(self, index: int, output: Any) -> Tensor:
        """Mean Kullback-Leibler divergence of the model's predictions: cross-entropy up to a constant."""
        batch, walk = self.run.batches[index], self.run.walk
        with torch.no_grad():
            wanted = first_tensor(walk.finish(batch, self.run.full[index])).float().log_softmax(-1)
        got = first_tensor(walk.finish(batch, {**self.run.rounded[index], self.name: output})).float().log_softmax(-1)
        each = (wanted.exp() * (wanted - got)).sum(-1)
        mask = batch.mask
        if mask is None or mask.shape != each.shape:
            return each.mean()
        return (each * mask).sum() / mask.sum()

    def _mixed(self, rounded: Arguments, trained: Arguments) -> Arguments:
        """QDrop: element by element, the input from the quantized or from the trained stream (arXiv 2203.05740)."""
        leaves, structure = pytree.tree_flatten(rounded)
        others = pytree.tree_leaves(trained)
        first = next(i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.is_floating_point())
        mask = mask_like(leaves[first], self.options.input_drop, self.generator)
        leaves[first] = torch.where(mask, leaves[first], others[first])
        mixed: Arguments = pytree.tree_unflatten(leaves, structure)
        return mixed

    def _roundings(self) -> dict[str, RoundToNearest]:
        """Start the roundings again, with the same random numbers."""
        self.generator.manual_seed(self.seed)
        return {
            key: target.rounding(self.run.recipe.make, self.grids[key], self.generator)
            for key, target in self.targets.items()
        }

    def _quantized(
        self, roundings: Mapping[str, RoundToNearest], *, learned: bool = True
    ) -> dict[str, QuantizedWeight]:
        return {
            key: self.targets[key].quantized(rounding, self.grids[key], learned=learned)
            for key, rounding in roundings.items()
        }

    @torch.no_grad()
    def _quantize_inputs(self) -> list[StaticActivation]:
        """Put a quantizer before each layer, begun from what the layer sees of the first batch."""
        wanted = self.options.activations
        if wanted is None:
            return []
        seen: dict[str, Tensor] = {}
        hooks = [
            target.module.register_forward_pre_hook(
                lambda _, args, kwargs, key=key: seen.update({key: first_tensor([*args, *kwargs.values()])}),
                with_kwargs=True,
            )
            for key, target in self.targets.items()
        ]
        try:
            self.run.call(self.name, self.inputs[0])
        finally:
            for hook in hooks:
                hook.remove()
        made = {
            key: StaticActivation(x, wanted.bits, drop=wanted.drop, generator=self.generator).eval()
            for key, x in seen.items()
        }
        for key, quantizer in made.items():
            quantize_input_(self.targets[key].module, quantizer)
        return list(made.values())

    def _scales(self) -> list[Tensor]:
        return [quantizer.scale.detach().clone() for quantizer in self.quantizers]

    @torch.no_grad()
    def _restore(self, scales: list[Tensor]) -> None:
        for quantizer, scale in zip(self.quantizers, scales, strict=True):
            quantizer.eval().scale.copy_(scale)


def _convert(tree: Any, dtype: torch.dtype, device: torch.device) -> Any:
    def convert(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        return leaf.to(device, dtype) if leaf.is_floating_point() else leaf.to(device)

    return pytree.tree_map(convert, tree)


def _shared(tree: Any, other: Any) -> Any:
    """The same tree, with tensors that equal their counterpart (masks, rotary tables) replaced by it."""
    leaves, structure = pytree.tree_flatten(tree)
    others, other_structure = pytree.tree_flatten(other)
    if structure != other_structure:
        return tree
    same = [
        twin if isinstance(leaf, Tensor) and isinstance(twin, Tensor) and _equal(leaf, twin) else leaf
        for leaf, twin in zip(leaves, others, strict=True)
    ]
    return pytree.tree_unflatten(same, structure)


def _equal(left: Tensor, right: Tensor) -> bool:
    return left.dtype == right.dtype and left.device == right.device and torch.equal(left, right)


def _example(model: nn.Module, batch: Batch) -> Batch:
    """Something small to trace a model with; transformers models take sequences of any length."""
    of_transformers = hasattr(getattr(model, "config", None), "model_type")
    return batch.head(2, _TRACED_TOKENS if of_transformers else None)


def _survey(model: nn.Module, walk: Walk, targets: Mapping[str, Target], batches: list[Batch]) -> tuple[str, ...]:
    """Run the trained blocks once: refuse activations that are not finite, and find weights that see nothing."""
    called: set[str] = set()
    chosen: dict[str, set[int]] = {}  # by modules that are told which of their experts to use, the experts

    def look(name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = [*args, *(value for key, value in kwargs.items() if "mask" not in key)]
        tensors = [leaf for leaf in pytree.tree_leaves(given[:3]) if isinstance(leaf, Tensor)]  # a mask may be infinite
        if not all(tensor.isfinite().all() for tensor in tensors):
            raise UsageError(f"the input of {name} holds NaN or infinity for the calibration data: nothing has changed")
        if not any(tensor.numel() for tensor in tensors):
            return
        called.add(name)
        for tensor in tensors:
            if tensor.dtype in (torch.int32, torch.int64):
                chosen.setdefault(name, set()).update(tensor.unique().tolist())

    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: look(name, args, kwargs), with_kwargs=True
        )
        for name in dict.fromkeys(target.owner for target in targets.values())
    ]
    try:
        for batch in batches:
            walk.through(batch)
    finally:
        for hook in hooks:
            hook.remove()
    unseen = []
    for name, target in targets.items():
        if target.owner not in called:
            unseen.append(name)
        elif target.stacked and target.owner in chosen:
            unseen += [f"{name}[{i}]" for i in range(len(target.weight)) if i not in chosen[target.owner]]
    return tuple(unseen)


def _warn(block: str, roundings: Mapping[str, RoundToNearest]) -> None:
    """Pass on the first doubt that a rounding has about its result."""
    doubts = ((key, rounding.doubt()) for key, rounding in roundings.items())
    found = next(((key, doubt) for key, doubt in doubts if doubt), None)
    if found is not None:
        warnings.warn(f"{found[0]} in block {block!r}: {found[1]}", WeightsmithWarning, stacklevel=2)


def _warn_of_divergence(block: str, step: int) -> None:
    warnings.warn(
        f"the loss of block {block!r} was not finite at iteration {step}: the best before it was kept; lower lr",
        WeightsmithWarning,
        stacklevel=2,
    )
