"""Batch norm behind every hidden linear and convolutional layer: what makes a short warmup work."""

import logging
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from weightsmith.certify.traced import as_inputs
from weightsmith.core.errors import UsageError
from weightsmith.core.graph import Graph, Live, Node
from weightsmith.core.modes import evaluating
from weightsmith.core.select import Where, select
from weightsmith.core.tracing import trace

_NORMS = {
    nn.Linear: nn.BatchNorm1d,
    nn.Conv1d: nn.BatchNorm1d,
    nn.Conv2d: nn.BatchNorm2d,
    nn.Conv3d: nn.BatchNorm3d,
}
Model = TypeVar("Model", bound=nn.Module)
_log = logging.getLogger(__name__)


def add_batchnorm_(model: Model, example: Any, *, where: Where = None) -> Model:
    """Put batch norm behind every hidden linear and convolutional layer that has none, fully connected ones included.

    Such a layer becomes ``nn.Sequential(layer, norm)`` under its own name, so that its keys in the state dict get
    ``.0``: call this before an optimizer is made and before weights are loaded. Layers that feed the output, layers
    whose output is not ``(B, features)`` or an image, and frozen ones stay as they are.

    Args:
        model: Changed in place.
        example: An example input ``(B, ...)``, on which the changed model must compute what it did.
        where: Which layers; ``None``: all hidden ones.

    Returns:
        The model.

    Raises:
        UsageError: ``where`` matches nothing, or the model uses such a layer in another way than by calling it.
        UnsupportedOperation: The model cannot be traced.
    """
    inputs = as_inputs(example)
    graph = trace(model, inputs)
    wanted = set(select(model, where, default=lambda _, m: type(m) in _NORMS).values())
    chosen = [layer for layer in _hidden(graph) if layer in wanted and _weight(layer).requires_grad]
    with evaluating(model), torch.no_grad():
        fits = _one_feature_axis(model, chosen, inputs)
        before = model(*inputs)
        replaced: list[tuple[nn.Module, str, nn.Module]] = []
        for layer in fits:
            norm = _NORMS[type(layer)](len(_weight(layer))).to(_weight(layer))
            wrapped = nn.Sequential(layer, norm)
            wrapped.eval()
            for owner, name in _places(model, layer):
                setattr(owner, name, wrapped)
                replaced.append((owner, name, layer))
        cause: Exception | None = None
        try:
            after = model(*inputs)
            same = torch.allclose(after, before, rtol=1e-2, atol=1e-3 * float(before.abs().max()))
        except Exception as error:  # whatever a model's own code raises on a module that it did not expect
            same, cause = False, error
        if not same:
            for owner, name, layer in replaced:
                setattr(owner, name, layer)
            raise UsageError(
                f"{type(model).__name__} uses a layer in another way than by calling it, so that batch norm cannot be "
                "put behind it; write batch norm into the model, or choose layers with where="
            ) from cause
    for owner, name, layer in replaced:
        getattr(owner, name).train(layer.training)
    return model


def _weight(layer: nn.Module) -> Tensor:
    weight: Any = layer.weight
    assert isinstance(weight, Tensor)
    return weight


def _hidden(graph: Graph) -> list[nn.Module]:
    """Layers that do not feed the output and are not followed by batch norm, each once."""
    users = graph.users()
    last, due = set[Node](), list(graph.outputs)
    while due:
        node = due.pop()
        if node not in last:
            last.add(node)
            due += [] if _layer(node) is not None else node.parents
    found: dict[nn.Module, bool] = {}
    for node in graph.nodes:
        layer = _layer(node)
        if layer is None or type(layer) not in _NORMS:
            continue
        followed = any(user.op == "batch_norm" for user in users[node])
        found[layer] = found.get(layer, True) and node not in last and not followed
    return [layer for layer, hidden in found.items() if hidden]


def _layer(node: Node) -> nn.Module | None:
    weight = node.args[1] if len(node.args) > 1 else None
    is_weight = (
        isinstance(weight, Live) and weight.name == "weight" and node.op in ("linear", "conv1d", "conv2d", "conv3d")
    )
    return weight.owner if is_weight and isinstance(weight, Live) else None


def _one_feature_axis(model: nn.Module, layers: list[nn.Module], inputs: tuple[Any, ...]) -> list[nn.Module]:
    """The layers whose output has its features on axis 1, found by a run."""
    shapes: dict[nn.Module, int] = {}

    def note(module: nn.Module, _: Any, output: Tensor) -> None:
        shapes[module] = output.dim()

    hooks = [layer.register_forward_hook(note) for layer in layers]
    try:
        model(*inputs)
    finally:
        for hook in hooks:
            hook.remove()
    found = []
    for layer in layers:
        expected = 2 if isinstance(layer, nn.Linear) else _weight(layer).dim()
        if shapes.get(layer) == expected:
            found.append(layer)
        else:
            _log.info("no batch norm behind %s: its output has %s axes", type(layer).__name__, shapes.get(layer))
    return found


def _places(model: nn.Module, layer: nn.Module) -> list[tuple[nn.Module, str]]:
    return [(owner, name) for owner in model.modules() for name, child in owner._modules.items() if child is layer]
