"""Calling models of others: inputs of any kind in, logits out."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from weightsmith.core.errors import UsageError


def call(model: nn.Module, inputs: Any) -> Any:
    """Call ``model`` with a tensor, a tuple of positional or a mapping of keyword arguments."""
    if isinstance(inputs, Mapping):
        return model(**inputs)
    if isinstance(inputs, tuple | list):
        return model(*inputs)
    return model(inputs)


def logits_of(output: Any) -> Tensor:
    """The logits of whatever a model returns: a tensor, an object or mapping with ``logits``, a tuple of them first.

    Raises:
        UsageError: It holds none.
    """
    if isinstance(output, Tensor):
        return output
    found = output.get("logits") if isinstance(output, Mapping) else getattr(output, "logits", None)
    if found is None and isinstance(output, tuple | list) and output:
        found = output[0]
    if not isinstance(found, Tensor):
        raise UsageError(f"the model returns {type(output).__name__}, which holds no logits")
    return found
