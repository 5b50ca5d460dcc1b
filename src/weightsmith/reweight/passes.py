"""Passes of a batch through somebody's classifier: with dropout, without, and past a last linear layer."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.core.errors import UsageError
from weightsmith.core.outputs import logits_of

Forward = Callable[[nn.Module, Any], tuple[Tensor, Tensor]]
"""``(model, batch) -> (logits (B, C), labels (B,))``."""
LossFn = Callable[[Tensor, Tensor], Tensor]
"""``(logits, labels) -> (B,)``: a loss per sample."""


def forward_batch(model: nn.Module, batch: Any) -> tuple[Tensor, Tensor]:
    """Call a model the way batches usually say it.

    Args:
        model: Returns logits, or an object, mapping or tuple that holds them first.
        batch: ``(inputs, labels)``, where inputs are a tensor, a tuple or a mapping of arguments; or a mapping with
            ``"labels"`` or ``"label"``, which the model is not given.

    Raises:
        UsageError: The batch is neither, or there are no logits.
    """
    if isinstance(batch, Mapping):
        key = next((name for name in ("labels", "label") if name in batch), None)
        if key is None:
            raise UsageError(f"batch must hold labels, it has {', '.join(map(str, batch))}: give a forward_fn")
        inputs: Any = {name: value for name, value in batch.items() if name != key}
        labels = batch[key]
    elif isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, labels = batch
    else:
        raise UsageError(f"batch must be (inputs, labels) or a mapping, got {type(batch).__name__}: give a forward_fn")
    if isinstance(inputs, Mapping):
        output = model(**inputs)
    else:
        output = model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
    return _logits_of(output), labels


def _logits_of(output: Any) -> Tensor:
    try:
        return logits_of(output)
    except UsageError as error:
        raise UsageError(f"{error}: give a forward_fn") from None


def cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """``-log p(label)`` of every sample, ``(B,)``, in float32 at least."""
    return F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), labels, reduction="none")


@contextmanager
def without_traces(module: nn.Module) -> Iterator[None]:
    """Keep the buffers: running statistics of the passes within the block are forgotten."""
    kept = [
        (part, name, buffer, buffer.clone())
        for part in module.modules()
        for name, buffer in part._buffers.items()
        if buffer is not None
    ]
    try:
        yield
    finally:
        for part, name, buffer, value in kept:
            part._buffers[name] = buffer
            # past autograd: a graph of the block may hold running statistics, which its backward does not read
            buffer.data.copy_(value)


@contextmanager
def repeatable(module: nn.Module) -> Iterator[None]:
    """No dropout, full precision, no traces; batch and instance normalization go on with the statistics of their input.

    The derivative of the losses that were trained on is wanted, and running statistics would give other losses.
    """
    modes = [(part, part.training) for part in module.modules()]
    with without_traces(module), _full_precision(module):
        try:
            for part, _ in modes:
                part.training = part.training and isinstance(part, nn.modules.batchnorm._NormBase)
            yield
        finally:
            for part, training in modes:
                part.training = training


@contextmanager
def _full_precision(module: nn.Module) -> Iterator[None]:
    # Accelerate puts autocast into the forward of the model itself, and keeps the former one beside it
    patched = module.__dict__.get("forward"), module.__dict__.get("_original_forward")
    device = next((p.device.type for p in module.parameters()), "cpu")
    try:
        if None not in patched:
            module.__dict__["forward"] = patched[1]
        with torch.autocast(device, enabled=False):
            yield
    finally:
        if None not in patched:
            module.__dict__["forward"] = patched[0]


def same_autocast(device: torch.device) -> Callable[[], Any]:
    """Remember the autocast that is on; the result gives a context that turns it on again.

    Without its cache of cast weights, which would hide that weights have moved.
    """
    if not torch.is_autocast_enabled(device.type):
        return contextlib.nullcontext
    dtype = torch.get_autocast_dtype(device.type)
    return lambda: torch.autocast(device.type, dtype=dtype, cache_enabled=False)


class Head:
    """The last linear layer of a model: the one whose output the logits are.

    Found by running the model, not by its name.

    Attributes:
        layer: The layer, once found.
        inputs: What it was called with in the last pass that was watched, ``(B, D)``.
    """

    def __init__(self) -> None:
        self.layer: nn.Linear | None = None
        self.inputs: Tensor | None = None

    def parameters(self) -> list[Tensor]:
        """Its weight and, where it has one that trains, its bias."""
        assert self.layer is not None
        bias = self.layer.bias
        return [self.layer.weight, *([bias] if bias is not None and bias.requires_grad else [])]

    def watched(self, module: nn.Module, run: Callable[[], tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
        """Run a pass and keep what the head was called with.

        Raises:
            UsageError: The logits do not come straight out of a trainable linear layer.
        """
        seen: list[tuple[nn.Linear, Tensor, Tensor]] = []
        layers = (
            [part for part in module.modules() if isinstance(part, nn.Linear)] if self.layer is None else [self.layer]
        )
        hooks = [
            layer.register_forward_hook(
                lambda part, args, named, out: seen.append((part, (args[0] if args else named["input"]).detach(), out)),
                with_kwargs=True,
            )
            for layer in layers
        ]
        try:
            logits, labels = run()
        finally:
            for hook in hooks:
                hook.remove()
        for layer, inputs, out in reversed(seen):
            if out is logits or (out.data_ptr() == logits.data_ptr() and out.shape == logits.shape):
                if not layer.weight.requires_grad or inputs.dim() != 2:
                    break
                if self.layer is None and not _computes(layer, inputs, logits):
                    break
                self.layer, self.inputs = layer, inputs
                return logits, labels
        raise UsageError(
            "meta_grad='head' needs a model whose logits come straight out of a trainable linear layer: "
            "use meta_grad='finite_difference' or 'none'"
        )


@torch.no_grad()
def _computes(layer: nn.Linear, inputs: Tensor, logits: Tensor) -> bool:
    """Whether the logits are the layer's own product: not that of a subclass, nor changed in place afterwards."""
    if not isinstance(layer.weight, nn.Parameter):  # computed from other parameters, as by weight_norm
        return False
    expected = F.linear(inputs, layer.weight, layer.bias)
    return torch.allclose(expected, logits, rtol=1e-3, atol=1e-3 * float(expected.abs().mean().nan_to_num(0.0)))
