"""Learning the rounding of one block, and keeping the best that was seen on the way."""

import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from weightsmith.core.errors import WeightsmithWarning
from weightsmith.quantize.after_training.activations import StaticActivation, mask_like
from weightsmith.quantize.after_training.blocks import Arguments, first_tensor
from weightsmith.quantize.after_training.options import LearningOptions, Recipe
from weightsmith.quantize.after_training.rtn import RoundToNearest
from weightsmith.quantize.after_training.streams import Streams
from weightsmith.quantize.after_training.targets import written
from weightsmith.quantize.grid import Grid, QuantizedWeight
from weightsmith.quantize.inputs import quantize_input_

_AUTO_LRS = (3e-3, 1e-3, 3e-4)
_AUTO_ITERATIONS = 100


@dataclass(frozen=True, slots=True)
class Found:
    """The rounding of one block: as `BlockReport`, with the weights by layer."""

    rtn: dict[str, QuantizedWeight]
    kept: dict[str, QuantizedWeight]
    error_rtn: float
    error: float
    iterations: int
    name: str


class BlockTask:
    """Finding the rounding of one block.

    Attributes:
        inputs: What the block takes behind the quantized blocks, by batch.
        recipe: With the learning rate that was chosen, if that was ``"auto"``.
    """

    def __init__(
        self,
        streams: Streams,
        index: int,
        name: str,
        grids: Mapping[str, Grid],
        recipe: Recipe,
        options: LearningOptions,
    ) -> None:
        self.streams, self.name, self.recipe, self.options = streams, name, recipe, options
        self.targets = streams.parts[name]
        self.inputs, self.trained_inputs = streams.inputs(index, name, keep_trained=options.input_drop < 1)
        self.seed = recipe.seed + 1_000_003 * index  # of its own, so that a resumed run repeats an unbroken one
        self.by_logits = options.last_block == "logits" and index == len(streams.walk.blocks) - 1
        self.grids = {key: grids[key] for key in self.targets}
        self.weights = {key: target.view(target.weight, self.grids[key]) for key, target in self.targets.items()}
        batches = len(self.inputs)
        count = min(options.measured_batches or batches, batches)
        self.measured = [position * batches // count for position in range(count)]
        self.device = next(iter(self.weights.values())).device
        self.generator = torch.Generator()
        self.steps = 0
        self.quantizers = self._quantize_inputs()

    def given(self, done: Mapping[str, QuantizedWeight]) -> Found:
        """Take over weights that are finished already."""
        kept = {key: done[target.parameter] for key, target in self.targets.items()}
        rtn = self._quantized(self._roundings(), learned=False)
        return Found(rtn, kept, self._error(rtn), self._error(kept), 0, "done")

    def fit(self) -> Found:
        """Learn, and keep what is best."""
        recipe, roundings = self.recipe, self._roundings()
        rtn = self._quantized(roundings, learned=False)
        error_rtn = self._error(rtn)
        found = Found(rtn, rtn, error_rtn, error_rtn, 0, "rtn")
        if not recipe.iterations or not any(True for rounding in roundings.values() for _ in rounding.parameters()):
            return found
        if recipe.lr == "auto":
            self.recipe = recipe = replace(recipe, lr=self._choose_lr())
        marks = {recipe.iterations // 2, 3 * recipe.iterations // 4} if self.options.keep_best else set()
        scales = self._scales()
        for step in self._optimize(roundings, float(recipe.lr), recipe.iterations):
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
            for _ in self._optimize(roundings, lr, min(_AUTO_ITERATIONS, self.recipe.iterations)):
                pass
            error = self._error(self._quantized(roundings))
            tried[lr] = error if math.isfinite(error) else math.inf
            self._restore(scales)
        return min(tried, key=tried.__getitem__)

    def _optimize(self, roundings: dict[str, RoundToNearest], lr: float, iterations: int) -> Iterator[int]:
        """Make steps, and stop after each; the end comes early when the loss is not finite."""
        units = {key: rounding.units(self.weights[key]) for key, rounding in roundings.items()}
        learned = [parameter for rounding in roundings.values() for parameter in rounding.parameters()]
        groups: list[dict[str, Any]] = [{"params": learned, "lr": lr, "cosine": self.recipe.cosine}]
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
            output = self.streams.call(self.name, arguments)
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
                output = self.streams.call(self.name, self.inputs[index])
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
        wanted = first_tensor(self.streams.full[index][self.name]).to(got)
        mask = self.streams.batches[index].mask
        if mask is None or mask.shape != got.shape[:2]:
            return got, wanted, None
        return got, wanted, mask.to(got).view(*mask.shape, *(1,) * (got.ndim - 2))

    def _divergence(self, index: int, output: Any) -> Tensor:
        """Mean Kullback-Leibler divergence of the model's predictions: cross-entropy up to a constant."""
        batch, walk = self.streams.batches[index], self.streams.walk
        with torch.no_grad():
            wanted = first_tensor(walk.finish(batch, self.streams.full[index])).float().log_softmax(-1)
        got = (
            first_tensor(walk.finish(batch, {**self.streams.rounded[index], self.name: output})).float().log_softmax(-1)
        )
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
            key: target.rounding(self.recipe.make, self.grids[key], self.generator)
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
        """Put a quantizer before each layer, begun from what the layer sees of the first batch that reaches it."""
        wanted = self.options.activations
        if wanted is None:
            return []
        seen: dict[str, Tensor] = {}

        def look(key: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            x = first_tensor([*args, *kwargs.values()])
            if x.numel():  # an expert may get no tokens
                seen.setdefault(key, x)

        hooks = [
            target.module.register_forward_pre_hook(
                lambda _, args, kwargs, key=key: look(key, args, kwargs), with_kwargs=True
            )
            for key, target in self.targets.items()
        ]
        try:
            for arguments in self.inputs:
                if len(seen) == len(self.targets):
                    break
                self.streams.call(self.name, arguments)
        finally:
            for hook in hooks:
                hook.remove()
        if unseen := [key for key in self.targets if key not in seen]:
            warnings.warn(
                f"the input of {', '.join(unseen)} stays in floating point: no calibration batch reaches it",
                WeightsmithWarning,
                stacklevel=2,
            )
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
