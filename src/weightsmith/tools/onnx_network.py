"""A network out of an ONNX file, as a module that can be traced and certified."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, reason, require
from weightsmith.tools.onnx_operators import OPERATORS, Operator

Step = tuple[Callable[..., Tensor], tuple[str, ...], str]
"""A function, the names of what it takes, and the name of what it gives."""


def read_onnx(path: Path) -> nn.Module:
    """Read a network with one input and one output.

    Args:
        path: The file.

    Returns:
        A module with the file's weights as frozen parameters, which works for any batch size.

    Raises:
        UsageError: The file is damaged, or has several inputs or outputs.
        UnsupportedOperation: It has an operator that is not known here; the message names it.
        MissingExtra: The package ``onnx`` is not installed.
    """
    onnx: Any = require("onnx", extra="onnx", purpose=f"the model {str(path)!r}")
    try:
        model = onnx.load(str(path))
        onnx.checker.check_model(model)
    except Exception as error:  # whatever the package raises on a file that is none
        raise UsageError(f"model {str(path)!r} is no ONNX file: {reason(error)}") from error
    graph = model.graph
    constants = {item.name: _tensor(onnx, item) for item in graph.initializer}
    inputs = [item for item in graph.input if item.name not in constants]
    if len(inputs) != 1 or len(graph.output) != 1:
        raise UsageError(
            f"model {str(path)!r} must have one input and one output, has {len(inputs)} and {len(graph.output)}"
        )
    sizes = inputs[0].type.tensor_type.shape.dim
    batch = sizes[0].dim_value if sizes and sizes[0].HasField("dim_value") else None
    steps: list[Step] = []
    for node in graph.node:
        given = {item.name: onnx.helper.get_attribute_value(item) for item in node.attribute}
        if node.op_type == "Constant" and "value" in given:
            constants[node.output[0]] = _tensor(onnx, given["value"])
            continue
        operator = Operator(node.op_type, tuple(node.input), given, constants, batch)
        if node.domain not in ("", "ai.onnx") or node.op_type not in OPERATORS:
            raise operator.unsupported()
        call, takes = OPERATORS[node.op_type](operator)
        steps.append((call, takes, node.output[0]))
    return _Network(inputs[0].name, graph.output[0].name, steps, constants)


def _tensor(onnx: Any, proto: Any) -> Tensor:
    return torch.tensor(onnx.numpy_helper.to_array(proto))


class _Network(nn.Module):
    """Steps in order; weights are parameters, so that they can be traced and moved."""

    def __init__(self, source: str, target: str, steps: list[Step], constants: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._source, self._target, self._steps = source, target, steps
        self._names: dict[str, str] = {}
        for _, takes, _ in steps:
            for name in takes:
                if name in constants and name not in self._names:
                    self._names[name] = f"weight_{len(self._names)}"
                    self.register_parameter(self._names[name], nn.Parameter(constants[name], requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """The file's output."""
        values = {self._source: x}
        for call, takes, gives in self._steps:
            args = [getattr(self, self._names[name]) if name in self._names else values.get(name) for name in takes]
            values[gives] = call(*args)
        return values[self._target]
