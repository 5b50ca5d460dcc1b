"""ONNX export in which quantized weights stay integers: each becomes an initializer behind ``DequantizeLinear``.

Codes of up to 4 bits are stored as INT4 or UINT4, wider ones as INT8 or UINT8. ``DequantizeLinear`` knows no half
zero-points, so a half-integer grid is written on odd integers, ``scale (k + 0.5) = (scale / 2) (2k + 1)``, which costs
one bit more: INT4 up to 3 bits, INT8 up to 7, INT16 at 8. The runtime computes the very values that the model holds.
"""

import inspect
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, require
from weightsmith.core.files import file_atomically
from weightsmith.core.modes import evaluating
from weightsmith.quantize.formats.pack import pack_rows
from weightsmith.quantize.grid import QuantizedWeight, quantized_weights

_OPSET = 21  # the first with 4-bit integers and block-wise DequantizeLinear
_PURPOSE = "exporting to ONNX"
_FIXED = "pass free_batch=False, and an example of the size to run with"


def export_onnx(
    model: nn.Module, example: Tensor | tuple[Tensor, ...], path: Path | str, *, free_batch: bool = True
) -> Path:
    """Write a quantized model as ONNX (opset 21) with integer weights and ``DequantizeLinear``.

    Made for image models (convolutional networks, vision transformers); inputs have the shapes of ``example`` but for
    the first axis, the batch, which may have any size. Where onnxruntime fuses matrix products with 4-bit weights, it
    rounds activations to 8 bits unless the session's configuration entry ``session.qdq_matmulnbits_accuracy_level`` is
    ``"1"``.

    Args:
        model: Carries quantized weights; it is exported in evaluation mode and left as it was.
        example: Inputs to trace with, one tensor or several.
        path: The ``.onnx`` file; replaced as a whole.
        free_batch: Leave the size of every input's first axis open; ``False``: all sizes are those of ``example``.

    Returns:
        ``path``.

    Raises:
        UsageError: The model has no quantized weights or experts, the traced graph has lost a weight, or the model
            fixes the size of the batch.
        MissingExtra: ``onnx`` or ``onnxscript`` is not installed.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a module, got {type(model).__name__}: the order is model, example, path")
    weights = quantized_weights(model)
    if not weights:
        raise UsageError("the model has no quantized weights: quantize it first, for example with round_to_nearest_")
    if stacks := [name for name, quantized in weights.items() if quantized.stacked]:
        raise UsageError(f"{stacks[0]} holds the weights of experts, which DequantizeLinear cannot: use save_quantized")
    onnx = require("onnx", extra="onnx", purpose=_PURPOSE)
    require("onnxscript", extra="onnx", purpose=_PURPOSE)
    inputs = example if isinstance(example, tuple) else (example,)
    with evaluating(model):
        proto = _trace(model, inputs, free_batch)
    _insert(onnx, proto.graph, weights)
    onnx.checker.check_model(proto)
    return _write(onnx, proto, Path(path))


def _trace(model: nn.Module, inputs: tuple[Tensor, ...], free_batch: bool) -> Any:
    if free_batch and len({len(tensor) for tensor in inputs if tensor.ndim}) != 1:
        shapes = ", ".join(str(tuple(tensor.shape)) for tensor in inputs)
        raise UsageError(f"example must hold as many samples in each input, got {shapes}: or pass free_batch=False")
    axes: Any = None
    if free_batch:
        axes = tuple({0: torch.export.Dim.DYNAMIC} if tensor.ndim else {} for tensor in inputs)
        if any(tensor.ndim and len(tensor) == 1 for tensor in inputs):  # the tracer takes a size of 1 for a constant
            inputs = tuple(torch.cat([tensor, tensor]) if tensor.ndim else tensor for tensor in inputs)
    kinds = [param.kind for param in inspect.signature(model.forward).parameters.values()]
    if axes and inspect.Parameter.VAR_POSITIONAL in kinds:
        axes = (axes,)
    try:
        program = torch.onnx.export(
            model, inputs, dynamo=True, opset_version=_OPSET, optimize=False, verbose=False, dynamic_shapes=axes
        )
    except torch.onnx.errors.OnnxExporterError as error:
        if not free_batch:
            raise
        raise UsageError(f"{type(model).__name__} cannot be traced with a free batch: {_FIXED} ({error})") from error
    assert program is not None
    proto: Any = program.model_proto  # every access makes a new one
    if not free_batch:
        return proto
    graph = proto.graph
    names = {value.type.tensor_type.shape.dim[0].dim_param for value in graph.input if value.type.tensor_type.shape.dim}
    if len(names) != 1 or "" in names:
        raise UsageError(f"{type(model).__name__} was traced with a fixed size of the batch: {_FIXED}")
    for value in [*graph.input, *graph.output, *graph.value_info]:
        for dim in value.type.tensor_type.shape.dim:
            if dim.dim_param in names:
                dim.dim_param = "batch"
    return proto


def _insert(onnx: Any, graph: Any, weights: dict[str, QuantizedWeight]) -> None:
    held = {tensor.name: tensor for tensor in graph.initializer}
    nodes = []
    for name, quantized in weights.items():
        if name not in held:
            raise UsageError(f"{name} is not in the exported graph: is the layer used in the model's forward?")
        graph.initializer.remove(held[name])
        nodes += _dequantize(onnx, graph, name, quantized, held[name].data_type)
    for node in reversed(nodes):
        graph.node.insert(0, node)


def _dequantize(onnx: Any, graph: Any, name: str, quantized: QuantizedWeight, data_type: int) -> list[Any]:
    kind, codes, zero, scale = _integers(onnx, quantized)
    axis: dict[str, int] = {"axis": quantized.axis}
    if quantized.granularity == "tensor":
        scale, zero = scale.reshape(()), zero.reshape(())
    elif quantized.group_size is None:
        scale, zero = scale.flatten(), zero.flatten()
    else:
        axis = {"axis": 1 - quantized.axis, "block_size": quantized.group_size}
        if quantized.axis == 1:
            scale, zero = scale.T, zero.T
    scale = scale.float()
    parts = {"codes": (kind, codes), "scale": (onnx.TensorProto.FLOAT, scale), "zero_point": (kind, zero)}
    for part, (element, tensor) in parts.items():
        graph.initializer.append(_raw(onnx, f"{name}.{part}", element, tensor.contiguous()))
    cast = data_type != onnx.TensorProto.FLOAT
    output = f"{name}.float" if cast else name
    inputs = [f"{name}.{part}" for part in parts]
    nodes = [onnx.helper.make_node("DequantizeLinear", inputs, [output], name=f"{name}.dequantize", **axis)]
    if cast:
        nodes.append(onnx.helper.make_node("Cast", [output], [name], name=f"{name}.cast", to=data_type))
    return nodes


def _raw(onnx: Any, name: str, kind: int, tensor: Tensor) -> Any:
    """A constant as plain bytes; ONNX's own helper writes every small integer as a varint, twice to four times as long.

    Elements of 4 bits lie two to a byte, the first in the lower half.
    """
    kinds = onnx.TensorProto
    if kind in (kinds.INT4, kinds.UINT4):
        stored = pack_rows(tensor.reshape(1, -1) & 15, 4, signed=False)
    else:
        stored = tensor.to({kinds.INT8: torch.int8, kinds.INT16: torch.int16}.get(kind, tensor.dtype))
    return onnx.TensorProto(name=name, data_type=kind, dims=tensor.shape, raw_data=stored.numpy().tobytes())


def _integers(onnx: Any, quantized: QuantizedWeight) -> tuple[int, Tensor, Tensor, Tensor]:
    codes, zero, scale = (part.detach().cpu() for part in (quantized.codes, quantized.zero_point, quantized.scale))
    bits, kinds = quantized.bits, onnx.TensorProto
    if not quantized.symmetric:
        return (kinds.UINT4 if bits <= 4 else kinds.UINT8), codes, zero, scale
    if quantized.offset:
        codes, scale, bits = 2 * codes.to(torch.int16) + 1, scale / 2, bits + 1
    kind = kinds.INT4 if bits <= 4 else kinds.INT8 if bits <= 8 else kinds.INT16
    return kind, codes, zero, scale


def _write(onnx: Any, proto: Any, path: Path) -> Path:
    with file_atomically(path) as fresh:
        onnx.save_model(proto, str(fresh), format="protobuf")  # whatever the name of the file ends in
    return path
