"""Calibration data in whatever form it comes, as batches of a model's inputs."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from weightsmith.core.errors import UsageError

Calibration = Tensor | Iterable[Any]
_MASK = "attention_mask"
_LABELS = ("labels", "label")
_INPUT = "input"


@dataclass(frozen=True, slots=True)
class Batch:
    """Inputs of one forward pass.

    Attributes:
        inputs: By name; the single entry ``"input"`` is passed by position.
        mask: ``(B, T)``, 1 where a position counts, or ``None`` when all do.
    """

    inputs: dict[str, Tensor]
    mask: Tensor | None = None

    def run(self, model: nn.Module, **options: Any) -> Any:
        """Call the model."""
        if list(self.inputs) == [_INPUT]:
            return model(self.inputs[_INPUT], **options)
        return model(**self.inputs, **options)

    def head(self, rows: int, tokens: int | None = None) -> "Batch":
        """The first ``rows`` rows, and the first ``tokens`` columns of integer matrices."""

        def cut(tensor: Tensor) -> Tensor:
            return tensor[:rows] if tensor.is_floating_point() or tensor.ndim != 2 else tensor[:rows, :tokens]

        mask = None if self.mask is None else cut(self.mask)
        return Batch({name: cut(tensor) for name, tensor in self.inputs.items()}, mask)


def make_batches(
    calibration: Calibration, batch_size: int | None, device: torch.device, dtype: torch.dtype | None = None
) -> list[Batch]:
    """Cut calibration data into batches of equal size; the last may be smaller.

    Args:
        calibration: A tensor or NumPy array (all samples); or an iterable of batches such as a ``DataLoader``: tensors,
            arrays, dicts of them (labels are dropped), tuples or lists of tensors whose first item is taken. A
            one-dimensional integer tensor or a list of integers is one sequence.
        batch_size: Samples per batch; ``None``: 2 for token sequences, 32 for everything else.
        device: Where the batches are put.
        dtype: Of inputs that are floating-point numbers; ``None``: what they have.

    Raises:
        TypeError: The data are none of these.
        UsageError: Fewer than 2 samples, unequal shapes that are no token sequences, or values that are not finite.
    """
    if batch_size is not None and batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}")
    if isinstance(calibration, str) or not (hasattr(calibration, "__iter__") or hasattr(calibration, "__getitem__")):
        raise TypeError(
            f"calibration must be a tensor, an array or an iterable of batches, got {type(calibration).__name__}: the "
            "order of arguments is model, calibration, grid"
        )
    whole = isinstance(calibration, Tensor | Mapping) or hasattr(calibration, "__array__")
    elements = [calibration] if whole else calibration
    samples = [sample for element in elements for sample in _samples(element)]
    if len(samples) < 2:
        raise UsageError(f"calibration needs at least 2 samples, got {len(samples)}: hundreds are usual")
    for index, sample in enumerate(samples):
        for name, tensor in sample.items():
            if tensor.is_floating_point() and not tensor.isfinite().all():
                raise UsageError(f"calibration sample {index} holds NaN or infinity in {name!r}; nothing has changed")
    tokens = not any(tensor.is_floating_point() for tensor in samples[0].values())
    size = batch_size or (2 if tokens else 32)
    if dtype is not None and not tokens:
        samples = [
            {name: tensor.to(dtype) if tensor.is_floating_point() else tensor for name, tensor in sample.items()}
            for sample in samples
        ]
    return [_collate(samples[start : start + size], device) for start in range(0, len(samples), size)]


def _samples(element: Any) -> list[dict[str, Tensor]]:
    if isinstance(element, Mapping):
        named = {
            name: _tensor(value, name) for name, value in element.items() if value is not None and name not in _LABELS
        }
        if len({len(tensor) for tensor in named.values() if tensor.ndim != 1}) > 1:
            shapes = {name: tuple(tensor.shape) for name, tensor in named.items()}
            raise UsageError(f"the inputs of a calibration batch must hold as many samples each, got {shapes}")
        if all(tensor.ndim == 1 for tensor in named.values()):
            return [named]
        return [{name: tensor[row] for name, tensor in named.items()} for row in range(len(next(iter(named.values()))))]
    if isinstance(element, tuple) or (isinstance(element, list) and element and hasattr(element[0], "shape")):
        return _samples(element[0])
    tensor = _tensor(element)
    if not tensor.ndim:
        raise TypeError(f"calibration must consist of batches or token sequences, got the number {tensor.item()}")
    if tensor.ndim == 1 and not tensor.is_floating_point():
        return [{_INPUT: tensor}]
    return [{_INPUT: row} for row in tensor]


def _tensor(value: Any, name: str = "") -> Tensor:
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        what = f"calibration input {name!r}" if name else "a calibration batch"
        raise TypeError(
            f"{what} must be a tensor, an array or numbers, got {type(value).__name__}: tokenize texts, preprocess "
            "images, and drop other columns first"
        ) from error


def _collate(samples: list[dict[str, Tensor]], device: torch.device) -> Batch:
    names = list(samples[0])
    if any(list(sample) != names for sample in samples):
        raise UsageError("calibration samples must all have the same inputs")
    columns = {name: [sample[name].to(device) for sample in samples] for name in names}
    if any(len({len(tensor) for tensor in tensors if tensor.ndim == 1}) > 1 for tensors in columns.values()):
        first = columns.get("input_ids", columns[names[0]])  # which may stand behind those of a decoder
        columns.setdefault(_MASK, [torch.ones(len(tensor), dtype=torch.long, device=device) for tensor in first])
        inputs = {name: pad_sequence(tensors, batch_first=True) for name, tensors in columns.items()}
    elif len({tensor.shape for tensor in columns[names[0]]}) > 1:
        raise UsageError(
            f"calibration samples differ in shape ({columns[names[0]][0].shape} and others): resize them to one"
        )
    else:
        inputs = {name: torch.stack(tensors) for name, tensors in columns.items()}
    if _MASK in inputs and _INPUT in inputs:
        inputs["input_ids"] = inputs.pop(_INPUT)  # a mask has to be passed by name, and so has what it masks
    mask = inputs.get(_MASK)
    return Batch(inputs, None if mask is None or bool(mask.all()) else mask)
