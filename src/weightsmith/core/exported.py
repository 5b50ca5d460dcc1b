"""Trace what torch.fx cannot, by torch.export; the graph goes on using the model's own parameters."""

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn
from torch.export import export
from torch.export.graph_signature import InputKind

from weightsmith.core.graph import Builder, Expansion, Graph, Live, UnsupportedOperation, replaced
from weightsmith.core.tracing import add_call, finished


def with_export(model: nn.Module, inputs: tuple[Any, ...], expansions: Mapping[Any, Expansion]) -> Graph:
    """Trace a model by running it on example inputs.

    Code that reads a size runs with the sizes of these inputs: the graph is good for inputs of their shapes alone, and
    for their values where they are no tensors.

    Raises:
        UnsupportedOperation: It holds something that cannot be followed.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = export(model, inputs, strict=False)
    builder = Builder(model, expansions)
    made: dict[Any, Any] = {}
    kinds = {spec.arg.name: spec for spec in program.graph_signature.input_specs}

    def known(tree: Any) -> Any:
        return replaced(tree, lambda leaf: made[leaf] if isinstance(leaf, torch.fx.Node) else leaf)

    for node in program.graph_module.graph.nodes:
        args, kwargs = known(tuple(node.args)), known(dict(node.kwargs))
        if node.op == "placeholder":
            spec = kinds[node.name]
            if spec.kind is InputKind.USER_INPUT:
                made[node] = builder.input(node.name)
            elif spec.kind in (InputKind.PARAMETER, InputKind.BUFFER) and _has(model, str(spec.target)):
                owner, _, name = str(spec.target).rpartition(".")
                made[node] = Live(model.get_submodule(owner), name)
            else:
                made[node] = program.constants[str(spec.target)]
        elif node.op == "call_function":
            target: Any = node.target
            key = target._overloadpacket.__name__ if hasattr(target, "_overloadpacket") else target.__name__
            made[node] = add_call(builder, node.name, key, target, args, kwargs)
        elif node.op == "output":
            signature = program.graph_signature.user_outputs
            found = [made[item] for item in node.args[0] if isinstance(item, torch.fx.Node) and item.name in signature]
            graph = finished(builder, found)
            graph.batch = len(inputs[0])
            return graph
        else:
            raise UnsupportedOperation(f"node {node.name!r} ({node.op} {node.target}) cannot be followed")
    raise UnsupportedOperation(f"{type(model).__name__} returns nothing")


def _has(model: nn.Module, path: str) -> bool:
    try:
        owner, _, name = path.rpartition(".")
        return hasattr(model.get_submodule(owner), name)
    except AttributeError:
        return False
