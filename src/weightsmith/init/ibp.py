"""First weights under which interval widths neither explode nor vanish with depth.

An interval of width ``d`` that passes a layer gets the width ``|W| d``, on average ``n E|W|`` times as wide for ``n``
inputs, and a ReLU halves it. ``W ~ N(0, sigma^2)`` with ``sigma = sqrt(2 pi) / n`` makes that factor 1, whereas usual
initializations have ``sqrt(n) / 4`` and more. Source: arXiv 2103.17268, section 3.1, and its code.
"""

import inspect
import logging
import math
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.core.graph import Graph, Live, Node, UnsupportedOperation
from weightsmith.core.select import Where, select
from weightsmith.core.tracing import trace

_LAYERS = (
    nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d,
)  # fmt: skip
_OPS = frozenset(["linear", "conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d"])
Model = TypeVar("Model", bound=nn.Module)
_log = logging.getLogger(__name__)


def fan_in(layer: nn.Module) -> float:
    """Number of inputs that one output of a layer adds up.

    Args:
        layer: Linear, a convolution (``C_in / groups`` times the kernel), or a transposed one, of whose kernel an
            output sees the part ``1 / stride`` per axis.
    """
    weight: Tensor = layer.weight  # type: ignore[assignment]
    if isinstance(layer, nn.Linear):
        return layer.in_features
    assert isinstance(
        layer, nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.ConvTranspose1d | nn.ConvTranspose2d | nn.ConvTranspose3d
    )
    kernel = weight[0, 0].numel()
    per_group = layer.in_channels // layer.groups
    return per_group * kernel / (math.prod(layer.stride) if layer.transposed else 1)


@torch.no_grad()
def ibp_(model: Model, *, where: Where = None, example: Any = None, generator: torch.Generator | None = None) -> Model:
    """Draw the weights of all hidden linear and convolutional layers from ``N(0, 2 pi / n^2)``, in place.

    Layers that feed an output stay as they are, and so do biases, batch norm and frozen weights. The weight of a layer
    that takes ``ReLU(x + y)`` directly is halved, because the sum doubles the widths. A weight that several layers
    share is drawn once.

    Args:
        model: Changed in place.
        where: Which layers; ``None``: all hidden ones.
        example: An example input, for models that only torch.export can trace. Where a model cannot be traced at all
            the last weight in the order of its parameters counts as the output's, and nothing is halved.
        generator: Where the draws come from; ``None``: torch's global one.

    Returns:
        The model.

    Raises:
        UsageError: ``where`` matches nothing, or a weight is computed by a parametrization.

    Example:
        >>> from torch import nn
        >>> from weightsmith.init import ibp_
        >>> net = ibp_(nn.Sequential(nn.Linear(784, 256), nn.ReLU(), nn.Linear(256, 10)))
    """
    graph = _graph(model, example)
    layers: dict[int, tuple[str, nn.Module]] = {}
    for name, module in select(model, where, default=lambda _, module: isinstance(module, _LAYERS)).items():
        weight = module._parameters.get("weight")
        if not isinstance(weight, nn.Parameter):
            raise UsageError(f"the weight of {name!r} is computed by a parametrization: call fold_(model) first")
        layers.setdefault(id(weight), (name, module))
    untouched, halved = _special(model, graph)
    for key, (_, module) in layers.items():
        weight = module._parameters["weight"]
        assert weight is not None
        if key in untouched or not weight.requires_grad:
            continue
        weight.normal_(0, math.sqrt(2 * math.pi) / fan_in(module), generator=generator)
        if key in halved:
            weight.div_(2)
    return model


def _graph(model: nn.Module, example: Any) -> Graph | None:
    needed = [p for p in inspect.signature(model.forward).parameters.values() if p.default is p.empty]
    given = example if isinstance(example, tuple | list) else (example,) * max(1, len(needed))
    try:
        return trace(model, given)
    except UnsupportedOperation as error:
        _log.warning("the last weight in the order of parameters counts as the output's: %s", error)
        return None


def _special(model: nn.Module, graph: Graph | None) -> tuple[set[int], set[int]]:
    """Identities of the weights that feed an output, and of those behind ``ReLU(x + y)``."""
    if graph is None:
        last = [module._parameters["weight"] for module in model.modules() if isinstance(module, _LAYERS)][-1:]
        return {id(weight) for weight in last}, set()
    untouched, halved = set(), set()
    for node in graph.nodes:
        if node.op in _OPS and (weight := _weight(node)) is not None and _doubled(node.args[0]):
            halved.add(id(weight))
    due, seen = list(graph.outputs), set[Node]()
    while due:
        node = due.pop()
        if node in seen:
            continue
        seen.add(node)
        weight = _weight(node) if node.op in _OPS else None
        if weight is not None:
            untouched.add(id(weight))
        else:
            due += node.parents
    return untouched, halved


def _weight(node: Node) -> Any:
    weight = node.args[1] if len(node.args) > 1 else node.kwargs.get("weight")
    return weight.get() if isinstance(weight, Live) else None


def _doubled(x: Any) -> bool:
    if not isinstance(x, Node) or x.op != "relu":
        return False
    (before,) = x.parents
    return before.op == "add" and sum(parent.varies for parent in before.parents) == 2
