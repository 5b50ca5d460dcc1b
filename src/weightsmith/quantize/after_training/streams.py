"""The activations of both models while one walks through the blocks: as trained, and as quantized so far."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from weightsmith.quantize.after_training.blocks import Arguments, Walk, hollow
from weightsmith.quantize.after_training.calibration import Batch
from weightsmith.quantize.after_training.targets import Target


class Streams:
    """Outputs of the blocks for every calibration batch, by name, as long as a later block needs them.

    Args:
        walk: The blocks and how they call each other.
        batches: Calibration batches.
        parts: The weights to quantize in each block.
    """

    def __init__(self, walk: Walk, batches: list[Batch], parts: Mapping[str, Mapping[str, Target]]) -> None:
        self.walk, self.batches, self.parts = walk, batches, parts
        self.full: list[dict[str, Any]] = [{} for _ in batches]
        self.rounded: list[dict[str, Any]] = [{} for _ in batches]

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
    def inputs(self, index: int, name: str, *, keep_trained: bool) -> tuple[list[Arguments], list[Arguments]]:
        """What a block takes, by batch: behind the quantized blocks, and, if kept, behind the trained ones.

        The trained block is run on the latter.
        """
        inputs: list[Arguments] = []
        trained_inputs: list[Arguments] = []
        for batch, full, rounded in zip(self.batches, self.full, self.rounded, strict=True):
            at_full = self.walk.inputs(name, batch, full)
            at_rounded = self.walk.inputs(name, batch, rounded) if index else at_full
            inputs.append(_shared(at_rounded, inputs[0]) if inputs else at_rounded)
            if keep_trained:
                trained_inputs.append(at_full)
            full[name] = self.call(name, at_full)
            self._forget(index, full)
        return inputs, trained_inputs

    @torch.no_grad()
    def advance(self, index: int, name: str, inputs: list[Arguments]) -> None:
        """Run a quantized block on every batch."""
        for position, rounded in enumerate(self.rounded):
            rounded[name] = self.call(name, inputs[position])
            inputs[position] = (), {}  # else both streams would be held twice for a while
            self._forget(index, rounded)

    def _forget(self, index: int, outputs: dict[str, Any]) -> None:
        for name in outputs:
            if self.walk.last_use[name] <= index:
                outputs[name] = hollow(outputs[name])


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
