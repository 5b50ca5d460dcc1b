"""A model as a graph of named operations that goes on using the model's own parameters and buffers.

Every node holds a plain operation on tensors (``"conv2d"``, ``"add"``), whether the model calls a module, a function
or a method for it. Parameters and buffers are no part of a node: a `Live` looks them up at every use.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn


class UnsupportedOperation(NotImplementedError):
    """The model holds something that cannot be analyzed; the message names where."""


@dataclass(frozen=True, slots=True)
class Live:
    """A parameter, buffer or flag of a module, looked up when it is used.

    Attributes:
        owner: The module.
        name: Its attribute.
    """

    owner: nn.Module
    name: str

    def get(self) -> Any:
        """Read it."""
        return getattr(self.owner, self.name)


@dataclass(eq=False, slots=True)
class Node:
    """One operation of a model.

    Attributes:
        name: As the model has it: qualified name of the module, or name of the operation.
        op: What is computed, by one name however the model says it; a registered module class or function itself.
        call: ``(*args, **kwargs) -> output``; never changes its arguments.
        args: Positional arguments; those that come from other nodes are `Node`, parameters are `Live`.
        kwargs: Keyword arguments, likewise.
        varies: Whether it depends on the values of the inputs, not on their shapes alone.
        memory: Identifies the memory that the output lives in, shared by views.
    """

    name: str
    op: Any
    call: Callable[..., Any]
    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)
    varies: bool = True
    memory: object = None

    def __repr__(self) -> str:
        return f"Node({self.name}: {self.op})"

    @property
    def parents(self) -> list["Node"]:
        """The nodes among its arguments, each once."""
        return list(dict.fromkeys(leaf for leaf in leaves((self.args, self.kwargs)) if isinstance(leaf, Node)))


@dataclass(eq=False, slots=True)
class Graph:
    """The operations of a model in the order of their execution.

    Attributes:
        model: The model that was traced.
        nodes: All operations; the inputs come first.
        inputs: One node per input of the model.
        outputs: The nodes that the model returns.
        before: Called before every use: hooks that compute a weight.
        batch: The only batch size that it works for, and then only inputs of the shapes that it was traced with count;
            ``None``: any.
    """

    model: nn.Module
    nodes: list[Node] = field(default_factory=list)
    inputs: list[Node] = field(default_factory=list)
    outputs: list[Node] = field(default_factory=list)
    before: list[Callable[[], Any]] = field(default_factory=list)
    batch: int | None = None
    _users: dict[Node, list[Node]] | None = None

    @property
    def output(self) -> Node:
        """The node that a model with one output returns."""
        (node,) = self.outputs
        return node

    def prune(self) -> None:
        """Drop the operations that no output needs."""
        needed, due = set(self.inputs), list(self.outputs)
        while due:
            node = due.pop()
            if node not in needed:
                needed.add(node)
                due += node.parents
        self.nodes = [node for node in self.nodes if node in needed]

    def users(self) -> dict[Node, list[Node]]:
        """The nodes that use each node."""
        if self._users is None:
            self._users = {node: [] for node in self.nodes}
            for node in self.nodes:
                for parent in node.parents:
                    self._users[parent].append(node)
        return self._users


def leaves(tree: Any) -> Iterator[Any]:
    """Everything within nested tuples, lists, mappings and slices."""
    if isinstance(tree, tuple | list):
        for item in tree:
            yield from leaves(item)
    elif isinstance(tree, Mapping):
        yield from leaves(list(tree.values()))
    elif isinstance(tree, slice):
        yield from leaves((tree.start, tree.stop, tree.step))
    else:
        yield tree


def replaced(tree: Any, change: Callable[[Any], Any]) -> Any:
    """The same nested structure with every leaf changed."""
    if type(tree) is tuple:  # nearly always: kept short
        return tuple([replaced(item, change) for item in tree])
    if isinstance(tree, torch.Size):
        return tree
    if isinstance(tree, tuple | list):
        items = [replaced(item, change) for item in tree]
        return tuple(items) if isinstance(tree, tuple) else items
    if isinstance(tree, Mapping):
        return {key: replaced(item, change) for key, item in tree.items()}
    if isinstance(tree, slice):
        return slice(*(replaced(end, change) for end in (tree.start, tree.stop, tree.step)))
    return change(tree)


Expansion = Callable[..., Node]
"""``(add, *args, **kwargs) -> last node``: writes an operation as simpler ones by calls of ``add(op, call, *args)``."""


class Builder:
    """Collects operations into a graph and looks after what the model changes in place.

    Args:
        model: The model that is traced.
        expansions: By operation: how it is written as simpler ones.
    """

    def __init__(self, model: nn.Module, expansions: Mapping[Any, Expansion]) -> None:
        self.graph = Graph(model)
        self._expansions = expansions
        self._current: dict[Node, Node] = {}  # a node that was changed in place -> what its memory holds now
        self._spoiled: dict[Node, str] = {}
        self._held: dict[object, str] = {}  # memory of the model's own tensors that was overwritten -> by which node

    def input(self, name: str) -> Node:
        """Add an input; only the first one varies."""
        node = Node(name, "input", lambda: None, varies=not self.graph.inputs, memory=object())
        self.graph.inputs.append(node)
        self.graph.nodes.append(node)
        return node

    def add(
        self, name: str, op: Any, call: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any] | None =
        None, *, in_place: bool = False,
    ) -> Node:  # fmt: skip
        """Add an operation, or those that it expands to.

        Args:
            name: See `Node`.
            op: Likewise.
            call: Likewise.
            args: Likewise.
            kwargs: Likewise.
            in_place: The model writes the output over the first argument.

        Raises:
            UnsupportedOperation: It reads memory that was overwritten under another name.
        """
        named = kwargs or {}
        args, named = (replaced(tree, self._now) for tree in (tuple(args), dict(named)))
        if op in self._expansions and any(isinstance(a, Node) and a.varies for a in leaves((args, named))):

            def simpler(op: Any, call: Callable[..., Any], *args: Any, **named: Any) -> Node:
                return self._append(f"{name}.{op}", op, call, args, named)

            last = self._expansions[op](simpler, *args, **named)
        else:
            last = self._append(name, op, call, args, named)
        if in_place and args and isinstance(args[0], Node | Live | Tensor):
            self._overwritten(args[0], last)
        return last

    def _append(self, name: str, op: Any, call: Callable[..., Any], args: Any, kwargs: Any) -> Node:
        node = Node(name, op, call, tuple(args), kwargs)
        node.varies = op not in SHAPE_ONLY and any(parent.varies for parent in node.parents)
        kinds = Node | Live | Tensor
        shared = next((leaf for leaf in leaves(args) if isinstance(leaf, kinds)), None) if _may_share(op) else None
        node.memory = object() if shared is None else _memory(shared)
        self.graph.nodes.append(node)
        return node

    def current(self, node: Node) -> Node:
        """The node that holds what is now in the memory of a node that was changed in place."""
        found: Node = self._now(node)
        return found

    def _now(self, leaf: Any) -> Any:
        if isinstance(leaf, Live | Tensor) and self._held and (by := self._held.get(_memory(leaf))) is not None:
            what = f"{leaf.name!r} of a {type(leaf.owner).__name__}" if isinstance(leaf, Live) else "a constant"
            raise UnsupportedOperation(
                f"node {by!r} changes {what}, which the model reads afterwards: do that outside of forward"
            )
        if not isinstance(leaf, Node):
            return leaf
        while leaf in self._current:
            leaf = self._current[leaf]
        if leaf in self._spoiled:
            raise UnsupportedOperation(
                f"node {leaf.name!r} is read after {self._spoiled[leaf]!r} has overwritten its memory through another "
                "view; write that operation without inplace=True"
            )
        return leaf

    def _overwritten(self, old: Node | Live | Tensor, new: Node) -> None:
        memory = _memory(old)
        for node in self.graph.nodes:
            if node is not old and node is not new and node.memory == memory:
                self._spoiled[node] = new.name
        if isinstance(memory, Live | _Storage):
            self._held[memory] = new.name
        if isinstance(old, Node):
            self._current[old] = new
        new.memory = memory


@dataclass(frozen=True, slots=True)
class _Storage:
    """Memory of a tensor that the model holds; tensors that share it are changed together."""

    place: int


def _memory(leaf: Node | Live | Tensor) -> object:
    if isinstance(leaf, Node):
        return leaf.memory
    tensor: Any = leaf
    if isinstance(leaf, Live):
        owner = leaf.owner
        tensor = owner._parameters.get(leaf.name)
        tensor = owner._buffers.get(leaf.name) if tensor is None else tensor
        tensor = vars(owner).get(leaf.name) if tensor is None else tensor
    try:
        return _Storage(tensor.untyped_storage()._cdata)
    except (AttributeError, NotImplementedError, RuntimeError):  # computed at every use, or sparse
        return leaf if isinstance(leaf, Live) else object()


@cache
def _may_share(op: Any) -> bool:
    """Whether the output of an operation may live in the memory of its first argument."""
    if op in VIEWS:
        return True
    if not isinstance(op, str):
        return False
    if op.startswith("attribute "):
        return True
    packet = getattr(torch.ops.aten, op, None)
    schemas = [getattr(packet, overload)._schema for overload in packet.overloads()] if packet is not None else []
    return any(
        found.alias_info is not None and not found.alias_info.is_write for schema in schemas for found in schema.returns
    )


VIEWS = frozenset(
    {
        *("reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "permute", "transpose", "movedim", "t"),
        *(
            "expand",
            "expand_as",
            "broadcast_to",
            "einsum",
            "reshape_as",
            "as_strided",
            "diagonal",
            "getitem",
            "select",
            "slice",
            "narrow",
            "chunk",
            "split",
            "unbind",
            "pick",
        ),
        *("identity", "to", "type_as", "float", "double", "detach", "dropout", "channel_dropout"),
        *("type", "half", "bfloat16", "cpu", "cuda", "numpy", "broadcast_tensors", "meshgrid"),
        *("atleast_1d", "atleast_2d", "atleast_3d"),
    }
)
"""Operations whose output may share the memory of their first argument, beside those whose schema says so."""

SHAPE_ONLY = frozenset(
    {
        *("size", "dim", "numel", "ndimension", "is_floating_point", "getattr", "len"),
        *("new_zeros", "new_ones", "zeros_like", "ones_like"),
    }
)
"""Operations whose result does not depend on the values of a tensor."""

ALIASES: Mapping[str, str] = {
    "iadd": "add", "isub": "sub", "imul": "mul", "itruediv": "div", "ipow": "pow",
    "ifloordiv": "floordiv", "imod": "mod", "truediv": "div", "true_divide": "div",
    "divide": "div", "multiply": "mul", "subtract": "sub", "negative": "neg", "absolute": "abs", "clip": "clamp",
    "concat": "cat", "concatenate": "cat", "view": "reshape", "view_as": "reshape_as", "_unsafe_view": "reshape",
    "swapaxes": "transpose", "swapdims": "transpose", "moveaxis": "movedim", "sym_size": "size",
    "bmm": "matmul", "mm": "matmul", "mv": "matmul", "_softmax": "softmax", "constant_pad_nd": "pad",
    "clone": "identity", "contiguous": "identity", "alias": "identity", "lift_fresh_copy": "identity",
    "_adaptive_avg_pool2d": "adaptive_avg_pool2d", "_max_pool2d": "max_pool2d", "_max_pool1d": "max_pool1d",
    "dropout1d": "dropout", "dropout2d": "dropout", "dropout3d": "dropout", "feature_dropout": "dropout",
    "_to_copy": "to", "unsafe_split": "split", "unsafe_chunk": "chunk", "special_expit": "sigmoid",
    "log_sigmoid": "logsigmoid",
}  # fmt: skip
"""Names of one operation, by the name that is used here."""


AUGMENTED = frozenset([
    "iadd", "isub", "imul", "itruediv", "ipow", "ifloordiv", "imod", "iand", "ior", "ixor", "ilshift", "irshift",
])  # fmt: skip
"""Python's names of ``x += y`` and its like, without underscores."""

_KEYWORDS = frozenset(["and_", "or_", "not_", "is_"])  # the underscore only keeps them apart from Python's keywords


def canonical(name: str) -> tuple[str, bool]:
    """The name of an operation here, and whether its own name says that it works in place."""
    in_place = (name.endswith("_") and not name.endswith("__") and name not in _KEYWORDS) or (
        name.strip("_") in AUGMENTED
    )
    plain = name.strip("_") if name.startswith("__") else name.rstrip("_") if in_place else name
    return ALIASES.get(name, ALIASES.get(plain, plain)), in_place
