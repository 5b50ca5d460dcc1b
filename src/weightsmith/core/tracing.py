"""Trace a model into a `weightsmith.core.graph.Graph`: by torch.fx, and by torch.export where that fails."""

import inspect
import operator
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._ops import OpOverload, OpOverloadPacket

from weightsmith.core.errors import reason
from weightsmith.core.graph import (
    AUGMENTED,
    Builder,
    Expansion,
    Graph,
    Live,
    Node,
    UnsupportedOperation,
    canonical,
    leaves,
    replaced,
)
from weightsmith.core.modes import untouched
from weightsmith.core.module_ops import MODULES, add_module, module_class

_SHAPES = frozenset(["shape", "ndim", "dtype", "device", "is_cuda", "requires_grad", "layout", "itemsize", "names"])
_WITH_INDICES = ("max", "min")
_MANY = frozenset(["split", "chunk", "unbind", "tensor_split", "split_with_sizes", "hsplit", "vsplit"])


def trace(
    model: nn.Module,
    inputs: Sequence[Any],
    *,
    own: Collection[Any] = (),
    expansions: Mapping[Any, Expansion] | None = None,
) -> Graph:
    """Trace a model into operations that share its parameters and buffers.

    Args:
        model: What to trace; it is not changed.
        inputs: Example inputs, used where torch.export has to run.
        own: Module classes and functions that stay whole.
        expansions: By operation: how it is written as simpler ones.

    Raises:
        UnsupportedOperation: Neither of the two tracers can follow the model.
    """
    if model._forward_hooks or model._forward_pre_hooks:  # torch.fx calls forward alone
        raise UnsupportedOperation(f"{type(model).__name__} has forward hooks: remove them first")
    try:
        with untouched(model) as changed:
            graph = _with_fx(model, len(inputs), own, expansions or {})
            _check_effects(graph, changed())
        return graph
    except UnsupportedOperation:
        raise
    except Exception as error:  # whatever a model's own code raises when it meets a proxy
        first = error
    from weightsmith.core.exported import with_export

    try:
        with untouched(model):
            return with_export(model, tuple(inputs), expansions or {})
    except UnsupportedOperation:
        raise
    except Exception as error:
        raise UnsupportedOperation(
            f"{type(model).__name__} cannot be traced. torch.fx: {reason(first)}; torch.export: {reason(error)}. "
            "Control flow that depends on the values of a tensor has no bounds: write it with torch.where"
        ) from error


def _check_effects(graph: Graph, changed: Sequence[Live | None]) -> None:
    """Refuse a model whose own code has already changed what its operations read: the next call would read another."""
    if None in changed:
        raise UnsupportedOperation(f"{type(graph.model).__name__} draws random numbers in forward")
    for node in graph.nodes:
        for leaf in leaves((node.args, node.kwargs)):
            if isinstance(leaf, Live) and leaf in changed:
                raise UnsupportedOperation(
                    f"node {node.name!r} reads {leaf.name!r} of a {type(leaf.owner).__name__}, which forward changes: "
                    "do that outside of forward"
                )


class _Proxy(fx.Proxy):
    """Notes what torch.fx misses: ``x += y``, of which other names of ``x`` see the change, and ``x.data = y``."""

    def __getattr__(self, k: str) -> fx.proxy.Attribute:
        return _Attribute(self, k)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in ("data", "real", "imag"):
            raise _unfollowed(str(self.node.name), f"a tensor's .{name} = ...")
        object.__setattr__(self, name, value)


class _Attribute(fx.proxy.Attribute):
    __getattr__ = _Proxy.__getattr__
    __setattr__ = _Proxy.__setattr__


def _unfollowed(node: str, what: str) -> UnsupportedOperation:
    return UnsupportedOperation(
        f"node {node!r}: {what} writes into memory in a way that cannot be followed: use the operation that returns "
        "its result as a new tensor"
    )


def _augmented(function: Any) -> Any:
    return lambda self, other: self.tracer.create_proxy("call_function", function, (self, other), {})


for _name in AUGMENTED:
    for _kind in (_Proxy, _Attribute):
        setattr(_kind, f"__{_name}__", _augmented(getattr(operator, _name)))


class _Tracer(fx.Tracer):
    def __init__(self, own: Collection[Any]) -> None:
        super().__init__(autowrap_functions=tuple(f for f in own if inspect.isfunction(f)))
        self._own = own

    def proxy(self, node: fx.Node) -> fx.Proxy:
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:  # noqa: ARG002
        kind = module_class(m)
        return kind in self._own or kind in MODULES or _is_elementary(kind)


def _is_elementary(kind: type[nn.Module]) -> bool:
    """Modules of torch other than containers, attention and recurrent layers, which are looked into."""
    whole = ("container", "transformer", "rnn")
    return kind.__module__.startswith("torch.nn.modules.") and not kind.__module__.endswith(whole) and (
        kind is not nn.MultiheadAttention
    )  # fmt: skip


def _with_fx(model: nn.Module, count: int, own: Collection[Any], expansions: Mapping[Any, Expansion]) -> Graph:
    tracer = _Tracer(own)
    parameters = list(inspect.signature(model.forward).parameters.values())
    rest = {p.name: p.default for p in parameters[count:] if p.default is not p.empty}
    if module_class(model) in MODULES or module_class(model) in own:  # a single layer has nothing to look into
        builder = Builder(model, expansions)
        given = tuple(builder.input(f"input {index}") for index in range(count))
        return finished(builder, add_module(builder, type(model).__name__, model, given, {}, own))
    traced = tracer.trace(model, concrete_args=rest)
    builder = Builder(model, expansions)
    made: dict[fx.Node, Any] = {}
    constants = nn.Module()

    def known(tree: Any) -> Any:
        return replaced(tree, lambda leaf: made[leaf] if isinstance(leaf, fx.Node) else leaf)

    output: Any = None
    for node in traced.nodes:
        args, kwargs = known(tuple(node.args)), known(dict(node.kwargs))
        if node.op == "placeholder":
            # tracing with concrete arguments leaves placeholders for them as well
            made[node] = builder.input(node.name) if len(builder.graph.inputs) < count else rest.get(str(node.target))
        elif node.op == "get_attr":
            made[node] = _attribute(model, str(node.target), constants)
        elif node.op == "call_module":
            made[node] = add_module(builder, str(node.target), model.get_submodule(str(node.target)), args, kwargs, own)
        elif node.op == "call_method":
            made[node] = add_call(builder, node.name, str(node.target), _method(str(node.target)), args, kwargs)
        elif node.op == "call_function":
            function: Any = node.target
            key = function if function in own or _is_foreign(function) else _name_of(function)
            made[node] = add_call(builder, node.name, key, function, args, kwargs)
        else:
            output = args[0]
    return finished(builder, output)


def finished(builder: Builder, output: Any) -> Graph:
    """Close a graph.

    Raises:
        UnsupportedOperation: The model returns no tensor that depends on its input.
    """
    found = [builder.current(leaf) for leaf in leaves(output) if isinstance(leaf, Node)]
    if not found:
        raise UnsupportedOperation(f"{type(builder.graph.model).__name__} returns nothing that depends on its input")
    builder.graph.outputs = found
    every = list(builder.graph.nodes)
    builder.graph.prune()
    kept = set(builder.graph.nodes)
    for node in every:
        if node not in kept and inspect.isfunction(node.op) and node.varies:
            raise UnsupportedOperation(
                f"node {node.name!r} calls {node.op.__name__} and does not use what it returns: if it changes its "
                "argument, return the changed tensor and use it; else leave the call out"
            )
    return builder.graph


def _attribute(model: nn.Module, path: str, constants: nn.Module) -> Live:
    owner, _, name = path.rpartition(".")
    if name.startswith("_tensor_constant"):  # made by torch.fx, and gone from the model afterwards
        setattr(constants, name, getattr(model, path))
        return Live(constants, name)
    return Live(model.get_submodule(owner), name)


def _name_of(function: Any) -> str:
    if isinstance(function, OpOverload):
        function = function._overloadpacket
    return str(getattr(function, "__name__", function))


def _is_foreign(function: Any) -> bool:
    """Whether a function is not torch's or Python's, so that its name says nothing."""
    return inspect.isfunction(function) and function.__module__.partition(".")[0] != "torch"


def _method(name: str) -> Callable[..., Any]:
    if name == "contiguous" or name == "clone":
        return lambda x, *args, **kwargs: x
    name = name.rstrip("_") if name.endswith("_") and not name.endswith("__") else name
    return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)


_OUT_OF_PLACE: Mapping[Any, Callable[..., Any]] = {
    operator.iadd: operator.add,
    operator.isub: operator.sub,
    operator.imul: operator.mul,
    operator.itruediv: operator.truediv,
    operator.ipow: operator.pow,
    operator.ifloordiv: operator.floordiv,
    operator.imod: operator.mod,
    operator.iand: operator.and_,
    operator.ior: operator.or_,
    operator.ixor: operator.xor,
    operator.ilshift: operator.lshift,
    operator.irshift: operator.rshift,
}


def add_call(builder: Builder, name: str, key: Any, call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Add a call of a function or method.

    Args:
        builder: Where to.
        name: Of the node.
        key: Name of the function, or a registered function itself.
        call: The function.
        args: Its arguments.
        kwargs: Its keyword arguments.
    """
    op, in_place = canonical(key) if isinstance(key, str) else (key, False)
    if isinstance(key, str):
        _refuse_writes(name, key, call, args, kwargs)
        if key.startswith("__") and key.strip("_") in AUGMENTED:
            call = getattr(operator, key.strip("_"))
    if op == "getattr":
        if isinstance(args[0], Live) and args[1] == "data":
            return args[0]
        if isinstance(args[0], Live) and not isinstance(getattr(args[0].get(), args[1]), Tensor):
            return getattr(args[0].get(), args[1])
        return _attribute_of(builder, name, *args[:2])
    for first in ("input", "self"):
        if first in kwargs and not args:
            args = (kwargs.pop(first),)
    for second in ("other", "mat2"):
        if second in kwargs and len(args) == 1:
            args = (args[0], kwargs.pop(second))
    if in_place or call in _OUT_OF_PLACE:
        in_place = not (call in _OUT_OF_PLACE and _is_number(args[0]))
        if in_place and not (args and isinstance(args[0], Node | Live | Tensor)):
            raise _unfollowed(name, str(key))
        call = _OUT_OF_PLACE.get(call) or _plain_function(op, call)
    args, kwargs, asked = _without_inplace(call, args, kwargs)
    in_place = in_place or asked
    if op == "reshape":
        if any(isinstance(arg, torch.dtype) for arg in args):
            raise UnsupportedOperation(f"node {name!r} reads a tensor as another type")
        call = torch.Tensor.reshape  # what is bounded may lie in memory in another order
    if op == "identity":
        same = builder.add(name, op, lambda x, *_, **__: x, args[:1])
        if key in ("clone", "lift_fresh_copy"):
            same.memory = object()
        return same
    if op in ("transpose", "permute", "t") and not args:
        raise UnsupportedOperation(f"node {name!r} has no arguments")
    if op == "dropout" and isinstance(key, str) and key.rstrip("_") != "dropout":
        op = "channel_dropout"
    if op in _LAYERS and kwargs:
        given = dict(zip(_LAYERS[op], args, strict=False)) | kwargs
        args, kwargs = tuple(given.get(name, _DEFAULTS.get(name)) for name in _LAYERS[op]), {}
    if op == "batch_norm":
        return builder.add(name, op, torch.nn.functional.batch_norm, args[:1], _batch_norm(args, kwargs, call))
    if op == "getitem" and isinstance(args[0], Node) and args[0].op in _MANY and isinstance(args[1], int):
        parent, index = args[0], args[1]

        def pick(*args: Any, **kwargs: Any) -> Any:
            return parent.call(*args, **kwargs)[index]

        return builder.add(name, "pick", pick, parent.args, parent.kwargs)
    if op == "getitem" and isinstance(args[0], Node) and args[0].op in _WITH_INDICES and args[1] == 0:
        return _extreme(builder, name, args[0])
    if (
        op == "getitem"
        and isinstance(args[0], Node)
        and isinstance(args[0].call, OpOverload)
        and (
            str(args[0].op).startswith("adaptive_max_pool")  # aten gives the indices as well
        )
    ):
        return _extreme(builder, name, args[0]) if args[1] == 0 else builder.add(name, "indices", call, args)
    if op == "mul" and len(args) == 2 and args[0] is args[1] and isinstance(args[0], Node):
        return builder.add(name, "square", torch.square, args[:1])
    return builder.add(name, op, call, args, kwargs, in_place=in_place)


_WRITERS = frozenset([
    "set_", "resize_", "resize_as_", "apply_", "map_", "map2_", "set_data", "__delitem__",
    "_has_compatible_shallow_copy_type",  # what torch.export leaves of ``x.data = y``
])  # fmt: skip


def _refuse_writes(name: str, key: str, call: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
    """Refuse calls that write elsewhere than into their first argument, or have no form that returns a new tensor.

    Raises:
        UnsupportedOperation: The call is one of them.
    """
    given = dict(kwargs)
    if inspect.isfunction(call):
        given = dict(zip(inspect.signature(call).parameters, args, strict=False)) | given
    if given.get("out") is not None:
        raise _unfollowed(name, f"{key}(out=...)")
    if key in _WRITERS or (key.startswith("_foreach") and key.endswith("_")) or key.startswith("__set"):
        raise _unfollowed(name, key)
    if canonical(key)[1]:
        return
    overloads: list[Any] = []
    if isinstance(call, OpOverload):
        overloads = [call]
    elif isinstance(call, OpOverloadPacket):
        overloads = [getattr(call, overload) for overload in call.overloads()]
    if overloads and all(overload._schema.is_mutable for overload in overloads):
        raise _unfollowed(name, key)


def _is_number(x: Any) -> bool:
    """Whether a value is a size or computed from sizes in Python, which has no memory that could be overwritten."""
    if not isinstance(x, Node):
        return isinstance(x, int | float)
    if x.op == "getattr" or x.op in ("size", "dim", "numel", "ndimension", "len"):
        return True
    return getattr(x.call, "__module__", None) == "_operator" and all(
        _is_number(arg) for arg in leaves(x.args) if isinstance(arg, Node | Live | Tensor)
    )


_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")
_LAYERS = {
    "linear": ("input", "weight", "bias"),
    **{f"conv{dims}d": _CONVOLUTION for dims in (1, 2, 3)},
    **{f"conv_transpose{dims}d": _TRANSPOSED for dims in (1, 2, 3)},
}
_DEFAULTS = {"bias": None, "stride": 1, "padding": 0, "output_padding": 0, "groups": 1, "dilation": 1}


def _attribute_of(builder: Builder, name: str, x: Any, attribute: str) -> Node:
    """``x.shape`` and its like are known exactly; ``x.T`` moves elements; others are refused where they are bounded."""
    if isinstance(x, Node) and x.op in _WITH_INDICES and attribute == "values":
        return _extreme(builder, name, x)
    op = "getattr" if attribute in _SHAPES else "transpose" if attribute in ("T", "mT") else f"attribute {attribute}"
    op = "detach" if attribute == "data" else op
    return builder.add(name, op, lambda x: getattr(x, attribute), (x,))


def _extreme(builder: Builder, name: str, parent: Node) -> Node:
    """The values of ``max`` or ``min`` along an axis, or of a pool, without the indices."""

    def values(*args: Any, **kwargs: Any) -> Any:
        return parent.call(*args, **kwargs)[0]

    op = f"a{parent.op}" if parent.op in _WITH_INDICES else parent.op
    return builder.add(name, op, values, parent.args, parent.kwargs)


def _plain_function(op: str, call: Any) -> Any:
    if op == "copy":
        return lambda x, source, *_, **__: source.to(x.dtype).expand_as(x)
    for home in (torch.nn.functional, torch, torch.Tensor):
        if hasattr(home, op):
            return getattr(home, op)
    return call


def _without_inplace(call: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Take ``inplace`` out of the arguments; it is the last parameter wherever torch has it."""
    kwargs = dict(kwargs)
    asked = bool(kwargs.pop("inplace", False))
    if inspect.isfunction(call):
        names = list(inspect.signature(call).parameters)
        if "inplace" in names and len(args) > names.index("inplace"):
            at = names.index("inplace")
            asked, args = bool(args[at]), args[:at]
    return args, kwargs, asked


def _batch_norm(args: tuple[Any, ...], kwargs: dict[str, Any], call: Any) -> dict[str, Any]:
    python = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    aten = ("input", "weight", "bias", "running_mean", "running_var", "training", "momentum", "eps", "cudnn_enabled")
    names = python if inspect.isfunction(call) else aten
    defaults = {"weight": None, "bias": None, "training": False, "momentum": 0.1, "eps": 1e-5}
    found = defaults | dict(zip(names, args, strict=False)) | kwargs
    return {name: value for name, value in found.items() if name not in ("input", "cudnn_enabled", "cudnn_enable")}
