"""The operators of ONNX files that classifiers are made of, each as a plain call of torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from weightsmith.core.graph import UnsupportedOperation


@dataclass(frozen=True, slots=True)
class Operator:
    """One node of a file.

    Attributes:
        kind: Its type.
        inputs: Names of what it takes.
        attributes: What the file says about it.
        constants: What the file holds, by name; grows where another layout is needed.
        batch: Number of examples that the file was made for; ``None``: any.
    """

    kind: str
    inputs: tuple[str, ...]
    attributes: Mapping[str, Any]
    constants: dict[str, Tensor]
    batch: int | None

    def get(self, name: str, default: Any) -> Any:
        """An attribute."""
        found = self.attributes.get(name, default)
        return found.decode() if isinstance(found, bytes) else found

    def constant(self, index: int) -> Tensor | None:
        """An input that the file holds."""
        return self.constants.get(self.inputs[index]) if index < len(self.inputs) else None

    def integers(self, name: str, index: int) -> list[int] | None:
        """An attribute of older files that is an input in newer ones."""
        found = self.constant(index)
        if found is None and index < len(self.inputs) and self.inputs[index]:
            raise self.unsupported(f"whose {name} are computed")
        value = self.get(name, None) if found is None else found.tolist()
        return [value] if isinstance(value, int) else value

    def transposed(self, index: int) -> str:
        """The name of a constant matrix in the layout of `torch.nn.Linear`."""
        found = self.constant(index)
        if found is None or found.dim() != 2:
            raise self.unsupported("of two activations")
        name = f"{self.inputs[index]}.T"
        self.constants[name] = found.T.contiguous()
        return name

    def refuse(self, **allowed: Any) -> None:
        """Refuse attributes with other values than these."""
        for name, value in allowed.items():
            found = self.get(name, value[0] if isinstance(value, tuple) else value)
            if found not in (value if isinstance(value, tuple) else (value,)):
                raise self.unsupported(f"with {name}={found}")

    def unsupported(self, what: str = "") -> UnsupportedOperation:
        """The error that names it."""
        return UnsupportedOperation(f"the operator {self.kind}{' ' if what else ''}{what}")


Made = tuple[Callable[..., Tensor], tuple[str, ...]]
"""A function, and the names of what it takes."""


def _elementwise(call: Callable[..., Tensor], **attributes: float) -> Callable[[Operator], Made]:
    """A function of all inputs, with attributes of the file by name of the function's argument."""

    def make(o: Operator) -> Made:
        given = {name: o.get(name, value) for name, value in attributes.items()}
        return (lambda *args: call(*args, **given)), o.inputs

    return make


def _window(o: Operator, dims: int) -> tuple[list[int], list[int], list[int]]:
    """Strides, pads and dilations, where both sides have the same pads."""
    o.refuse(auto_pad=("NOTSET", "VALID"))
    pads = o.get("pads", [0] * 2 * dims)
    if pads[:dims] != pads[dims:]:
        raise o.unsupported("with other pads on both sides")
    return o.get("strides", [1] * dims), list(pads[:dims]), o.get("dilations", [1] * dims)


def _conv(o: Operator) -> Made:
    weight = o.constant(1)
    if weight is None:
        raise o.unsupported("whose weight is computed")
    dims, groups = weight.dim() - 2, o.get("group", 1)
    stride, pads, dilation = _window(o, dims)
    if o.kind == "Conv":
        plain = (F.conv1d, F.conv2d, F.conv3d)[dims - 1]
        return (lambda x, w, b=None: plain(x, w, b, stride, pads, dilation, groups)), o.inputs
    o.refuse(output_shape=(None,))
    extra = o.get("output_padding", [0] * dims)
    turned = (F.conv_transpose1d, F.conv_transpose2d, F.conv_transpose3d)[dims - 1]
    return (lambda x, w, b=None: turned(x, w, b, stride, pads, extra, groups, dilation)), o.inputs


def _pool(o: Operator) -> Made:
    kernel = o.get("kernel_shape", [])
    stride, pads, dilation = _window(o, len(kernel))
    ceil = bool(o.get("ceil_mode", 0))
    if o.kind == "MaxPool":
        most = (F.max_pool1d, F.max_pool2d, F.max_pool3d)[len(kernel) - 1]
        return (lambda x: most(x, kernel, stride, pads, dilation, ceil)), o.inputs
    if set(dilation) != {1}:
        raise o.unsupported("with dilations")
    counted = bool(o.get("count_include_pad", 0))
    mean = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(kernel) - 1]
    return (lambda x: mean(x, kernel, stride, pads, ceil, counted)), o.inputs


def _gemm(o: Operator) -> Made:
    o.refuse(transA=0, alpha=1.0, beta=1.0)
    weight = o.inputs[1] if o.get("transB", 0) else o.transposed(1)
    return F.linear, (o.inputs[0], weight, *o.inputs[2:])


def _matmul(o: Operator) -> Made:
    constant = o.constant(1)
    if constant is None or constant.dim() != 2:
        return torch.matmul, o.inputs
    return F.linear, (o.inputs[0], o.transposed(1))


def _reshape(o: Operator) -> Made:
    target = o.integers("shape", 1)
    if target is None:
        raise o.unsupported("without a shape")
    o.refuse(allowzero=(0, int(0 not in target)))

    def size(x: Tensor, axis: int, wanted: int) -> int:
        # a file for a fixed number of examples is used for any
        return x.shape[axis] if wanted == 0 or (axis == 0 and wanted == o.batch) else wanted

    return (lambda x: x.reshape([size(x, *item) for item in enumerate(target)])), o.inputs[:1]


def _reduced(call: Callable[..., Tensor]) -> Callable[[Operator], Made]:
    def make(o: Operator) -> Made:
        axes, keep = o.integers("axes", 1), bool(o.get("keepdims", 1))
        if axes is None:
            raise o.unsupported("over all axes, examples included,")
        return (lambda x: call(x, axes, keep)), o.inputs[:1]

    return make


def _squeeze(o: Operator) -> Made:
    axes = o.integers("axes", 1)
    if axes is None:
        raise o.unsupported("without axes")

    def call(x: Tensor) -> Tensor:
        for axis in sorted(axes, reverse=o.kind == "Squeeze"):
            x = x.squeeze(axis) if o.kind == "Squeeze" else x.unsqueeze(axis)
        return x

    return call, o.inputs[:1]


def _clip(o: Operator) -> Made:
    ends = [o.constant(1), o.constant(2)]
    low, high = (
        o.get(name, None) if end is None else float(end) for name, end in zip(("min", "max"), ends, strict=True)
    )
    return (lambda x: x.clamp(low, high)), o.inputs[:1]


def _global(o: Operator) -> Made:
    return (lambda x: x.mean(tuple(range(2, x.dim())), keepdim=True)), o.inputs


def _flatten(o: Operator) -> Made:
    o.refuse(axis=1)
    return (lambda x: x.flatten(1)), o.inputs


def _transpose(o: Operator) -> Made:
    axes: Sequence[int] = o.get("perm", ())
    if not axes:
        raise o.unsupported("without perm")
    return (lambda x: x.permute(*axes)), o.inputs


def _concat(o: Operator) -> Made:
    axis = o.get("axis", 1)
    return (lambda *parts: torch.cat(parts, axis)), o.inputs


def _batch_norm(o: Operator) -> Made:
    o.refuse(training_mode=0)
    eps = o.get("epsilon", 1e-5)
    return (lambda x, scale, shift, mean, var: F.batch_norm(x, mean, var, scale, shift, False, 0.0, eps)), o.inputs


def _softmax(o: Operator) -> Made:
    axis = o.get("axis", -1)
    return (lambda x: x.softmax(axis)), o.inputs


def _gelu(o: Operator) -> Made:
    kind = o.get("approximate", "none")
    return (lambda x: F.gelu(x, approximate=kind)), o.inputs


def _leaky(o: Operator) -> Made:
    slope = o.get("alpha", 0.01)
    return (lambda x: F.leaky_relu(x, slope)), o.inputs


def _passed(o: Operator) -> Made:
    return (lambda x: x), o.inputs[:1]


OPERATORS: Mapping[str, Callable[[Operator], Made]] = {
    "Conv": _conv, "ConvTranspose": _conv, "MaxPool": _pool, "AveragePool": _pool, "Gemm": _gemm, "MatMul": _matmul,
    "Reshape": _reshape, "ReduceMean": _reduced(torch.mean), "ReduceSum": _reduced(torch.sum), "Squeeze": _squeeze,
    "Unsqueeze": _squeeze, "Clip": _clip, "GlobalAveragePool": _global, "Flatten": _flatten,
    "Transpose": _transpose, "Concat": _concat, "BatchNormalization": _batch_norm, "Softmax": _softmax, "Gelu": _gelu,
    "Identity": _passed, "Dropout": _passed, "Relu": _elementwise(torch.relu), "Sigmoid": _elementwise(torch.sigmoid),
    "Tanh": _elementwise(torch.tanh), "Softplus": _elementwise(F.softplus), "Abs": _elementwise(torch.abs),
    "Neg": _elementwise(torch.neg), "Exp": _elementwise(torch.exp), "Sqrt": _elementwise(torch.sqrt),
    "Elu": _elementwise(F.elu, alpha=1.0), "HardSwish": _elementwise(F.hardswish), "Mish": _elementwise(F.mish),
    "Add": _elementwise(torch.add), "Sub": _elementwise(torch.sub), "Mul": _elementwise(torch.mul),
    "Div": _elementwise(torch.div), "LeakyRelu": _leaky,
}  # fmt: skip
