"""What a module of ``torch.nn`` computes, as one operation on tensors with live parameters."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import nn
from torch.nn import functional as F

from weightsmith.core.graph import Builder, Live, Node, UnsupportedOperation


class Operation(NamedTuple):
    """An operation without its first argument.

    Attributes:
        op: Its name.
        call: The function.
        args: Arguments after the first.
        kwargs: Keyword arguments.
    """

    op: str
    call: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = {}


def _convolution(m: Any) -> Operation:
    op = f"conv{len(m.kernel_size)}d"
    args = (Live(m, "weight"), Live(m, "bias"), m.stride, m.padding, m.dilation, m.groups)
    return Operation(op, getattr(F, op), args)


def _transposed(m: Any) -> Operation:
    op = f"conv_transpose{len(m.kernel_size)}d"
    args = (Live(m, "weight"), Live(m, "bias"), m.stride, m.padding, m.output_padding, m.groups, m.dilation)
    return Operation(op, getattr(F, op), args)


def _batch_norm(m: Any) -> Operation:
    names = ("weight", "bias", "running_mean", "running_var", "training", "num_batches_tracked")
    named = {name: Live(m, name) for name in names}
    group = (m.process_group,) if isinstance(m, nn.SyncBatchNorm) else ()
    return Operation("batch_norm", F.batch_norm, (), named | {"momentum": m.momentum, "eps": m.eps, "synced": group})


def _max_pool(m: Any) -> Operation:
    op = {nn.MaxPool1d: "max_pool1d", nn.MaxPool2d: "max_pool2d", nn.MaxPool3d: "max_pool3d"}[type(m)]
    return Operation(op, getattr(F, op), (m.kernel_size, m.stride, m.padding, m.dilation, m.ceil_mode))


def _average_pool(m: Any) -> Operation:
    op = {nn.AvgPool1d: "avg_pool1d", nn.AvgPool2d: "avg_pool2d", nn.AvgPool3d: "avg_pool3d"}[type(m)]
    args = (m.kernel_size, m.stride, m.padding, m.ceil_mode, m.count_include_pad)
    more = (m.divisor_override,) if op != "avg_pool1d" else ()
    return Operation(op, getattr(F, op), args + more)


def _adaptive(kind: str) -> Callable[[Any], Operation]:
    return lambda m: Operation(kind, getattr(F, kind), (m.output_size,))


def _function(op: str, *names: str) -> Callable[[Any], Operation]:
    return lambda m: Operation(op, getattr(F, op), tuple(getattr(m, name) for name in names))


def _pad(mode: str) -> Callable[[Any], Operation]:
    return lambda m: Operation("pad", F.pad, (tuple(m.padding), mode, getattr(m, "value", None)))


def _norm_args(m: Any) -> tuple[Any, ...]:
    return Live(m, "weight"), Live(m, "bias"), m.eps


MODULES: Mapping[type[nn.Module], Callable[[Any], Operation]] = {
    nn.Linear: lambda m: Operation("linear", F.linear, (Live(m, "weight"), Live(m, "bias"))),
    nn.Conv1d: _convolution, nn.Conv2d: _convolution, nn.Conv3d: _convolution,
    nn.ConvTranspose1d: _transposed, nn.ConvTranspose2d: _transposed, nn.ConvTranspose3d: _transposed,
    nn.BatchNorm1d: _batch_norm, nn.BatchNorm2d: _batch_norm, nn.BatchNorm3d: _batch_norm,
    nn.SyncBatchNorm: _batch_norm,
    nn.LayerNorm: lambda m: Operation("layer_norm", F.layer_norm, (m.normalized_shape, *_norm_args(m))),
    nn.GroupNorm: lambda m: Operation("group_norm", F.group_norm, (m.num_groups, *_norm_args(m))),
    nn.RMSNorm: lambda m: Operation("rms_norm", F.rms_norm, (m.normalized_shape, Live(m, "weight"), m.eps)),
    nn.ReLU: _function("relu"), nn.ReLU6: _function("relu6"), nn.SiLU: _function("silu"), nn.Mish: _function("mish"),
    nn.SELU: _function("selu"), nn.Hardsigmoid: _function("hardsigmoid"), nn.Hardswish: _function("hardswish"),
    nn.LogSigmoid: _function("logsigmoid"), nn.Softsign: _function("softsign"),
    nn.Sigmoid: lambda m: Operation("sigmoid", F.sigmoid), nn.Tanh: lambda m: Operation("tanh", F.tanh),
    nn.LeakyReLU: _function("leaky_relu", "negative_slope"), nn.ELU: _function("elu", "alpha"),
    nn.CELU: _function("celu", "alpha"), nn.Hardtanh: _function("hardtanh", "min_val", "max_val"),
    nn.Softplus: _function("softplus", "beta", "threshold"),
    nn.PReLU: lambda m: Operation("prelu", F.prelu, (Live(m, "weight"),)),
    nn.GELU: lambda m: Operation("gelu", F.gelu, (), {"approximate": m.approximate}),
    nn.Softmax: _function("softmax", "dim"), nn.LogSoftmax: _function("log_softmax", "dim"),
    nn.MaxPool1d: _max_pool, nn.MaxPool2d: _max_pool, nn.MaxPool3d: _max_pool,
    nn.AvgPool1d: _average_pool, nn.AvgPool2d: _average_pool, nn.AvgPool3d: _average_pool,
    **{getattr(nn, f"Adaptive{kind}Pool{d}d"): _adaptive(f"adaptive_{kind.lower()}_pool{d}d")
       for kind in ("Avg", "Max") for d in (1, 2, 3)},
    **{kind: lambda m: Operation("dropout", F.dropout, (m.p, Live(m, "training"))) for kind in (nn.Dropout,)},
    **{kind: lambda m: Operation("channel_dropout", F.dropout2d, (m.p, Live(m, "training")))
       for kind in (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)},
    nn.Identity: lambda m: Operation("identity", lambda x: x),
    nn.Flatten: lambda m: Operation("flatten", lambda x, *dims: x.flatten(*dims), (m.start_dim, m.end_dim)),
    nn.Unflatten: lambda m: Operation("unflatten", lambda x, *to: x.unflatten(*to), (m.dim, m.unflattened_size)),
    nn.Upsample: lambda m: Operation(
        "interpolate", F.interpolate, (m.size, m.scale_factor, m.mode, m.align_corners, m.recompute_scale_factor)),
    nn.UpsamplingNearest2d: lambda m: Operation("interpolate", F.interpolate, (m.size, m.scale_factor, m.mode)),
    nn.PixelShuffle: _function("pixel_shuffle", "upscale_factor"),
    nn.PixelUnshuffle: _function("pixel_unshuffle", "downscale_factor"),
    **{getattr(nn, f"{name}Pad{d}d"): _pad(mode) for name, mode in
       (("Zero", "constant"), ("Constant", "constant"), ("Reflection", "reflect"), ("Replication", "replicate"),
        ("Circular", "circular")) for d in (1, 2, 3)},
}  # fmt: skip
"""Exactly these classes; a subclass may compute something else."""


def module_class(module: nn.Module) -> type[nn.Module]:
    """The class of a module, seen through a parametrization, which makes a subclass of its own."""
    kind = type(module)
    return kind.__bases__[0] if kind.__module__ == "torch.nn.utils.parametrize" else kind


def add_module(builder: Builder, name: str, module: nn.Module, args: tuple[Any, ...], kwargs: Any, own: Any) -> Node:
    """Add what a module computes.

    Args:
        builder: Where to.
        name: Its qualified name.
        module: The module.
        args: What it is called with.
        kwargs: Likewise.
        own: Classes that the user has registered, which stay whole.

    Raises:
        UnsupportedOperation: It has hooks of unknown effect.
    """
    builder.graph.before += _weight_hooks(name, module)
    kind = module_class(module)
    if kind in own:
        return builder.add(name, kind, lambda own, *args, **kwargs: own(*args, **kwargs), (module, *args), kwargs)
    if kind not in MODULES or len(args) + len(kwargs) != 1 or getattr(module, "return_indices", False):
        in_place = bool(getattr(module, "inplace", False))
        if in_place and not args:
            raise UnsupportedOperation(f"module {name!r} ({kind.__name__}): leave out inplace=True")
        return builder.add(name, kind, module, args, kwargs, in_place=in_place)
    x = args[0] if args else next(iter(kwargs.values()))
    mode = getattr(module, "padding_mode", "zeros")
    op, call, more, named = MODULES[kind](module)
    if mode != "zeros":
        around: Any = module._reversed_padding_repeated_twice
        x = builder.add(f"{name}.pad", "pad", F.pad, (x, tuple(around), mode))
        more = (*more[:3], 0, *more[4:])
    return builder.add(name, op, call, (x, *more), named, in_place=bool(getattr(module, "inplace", False)))


def _weight_hooks(name: str, module: nn.Module) -> list[Callable[[], Any]]:
    """Hooks by which older reparametrizations of torch (pruning, weight norm) set a weight before every use."""
    if module._forward_hooks:
        raise UnsupportedOperation(f"module {name!r} ({type(module).__name__}) has forward hooks: remove them first")
    found: list[Callable[[], Any]] = []
    for hook in module._forward_pre_hooks.values():
        if not type(hook).__module__.startswith("torch.nn.utils."):
            raise UnsupportedOperation(
                f"module {name!r} ({type(module).__name__}) has forward hooks: remove them first"
            )
        found.append(partial(hook, module, ()))
    return found
