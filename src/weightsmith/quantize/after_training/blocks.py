"""Which parts of a model are reconstructed as one, and a way to stop at each of them without running what comes before.

`Walk` replaces the forward pass of every block by a gate. A gate answers from memory: so a forward pass up to any block
costs only what lies between the blocks, and works for every architecture, not only for chains.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from weightsmith.core.errors import UsageError, near
from weightsmith.core.weights import is_linear
from weightsmith.quantize.after_training.calibration import Batch
from weightsmith.quantize.after_training.targets import Target

Blocks = str | Sequence[str]
_END = ""  # a block of this name is the whole model, after which nothing comes
_CALL = ("forward", "_forward_hooks", "_forward_pre_hooks")  # what decides on what a call of a module does
Arguments = tuple[tuple[Any, ...], dict[str, Any]]


def find_blocks(
    model: nn.Module, blocks: Blocks, targets: Mapping[str, Target], *, keep_others: bool
) -> dict[str, nn.Module]:
    """Find the blocks of a model that hold chosen weights.

    Args:
        model: Looked through, not changed.
        blocks: ``"auto"``: the one longest list of modules of one class; ``"layers"``: each module that is called
            with a chosen weight; ``"whole"``: the model; or names.
        targets: The chosen weights by name.
        keep_others: Modules with chosen weights outside become blocks of their own.

    Raises:
        UsageError: There is no single longest list, a name is unknown, or one block is inside another.
    """
    if blocks == "whole":
        return {"": model}
    modules = dict(model.named_modules())
    if blocks == "layers":
        return {name: modules[name] for name in _owners(targets)}
    names = _auto(model, modules) if blocks == "auto" else [blocks] if isinstance(blocks, str) else list(blocks)
    for name in names:
        if name not in modules:
            raise UsageError(f"blocks names {name!r}, which the model does not have; {near(name, modules)}")
        inside = [other for other in names if other != name and _holds(other, name)]
        if inside:
            raise UsageError(f"blocks names {name!r}, which is inside {inside[0]!r}: name one of them")
    found = {name: modules[name] for name in names if targets_of(name, targets)}
    if keep_others:
        others = {name: target for name, target in targets.items() if not any(_holds(block, name) for block in names)}
        found |= {name: modules[name] for name in _owners(others)}
    return found


def targets_of(block: str, targets: Mapping[str, Target]) -> dict[str, Target]:
    """The weights that are inside a block."""
    return {name: target for name, target in targets.items() if _holds(block, name)}


def _owners(targets: Mapping[str, Target]) -> list[str]:
    """The modules that are called with these weights; of those inside one another, the outermost."""
    owners = dict.fromkeys(target.owner for target in targets.values())
    return [name for name in owners if not any(_holds(other, name) for other in owners if other != name)]


def _holds(block: str, name: str) -> bool:
    return block in ("", name) or name.startswith(f"{block}.")


def _any_inside(block: str, layers: Sequence[str]) -> bool:
    return any(_holds(block, layer) for layer in layers)


def _auto(model: nn.Module, modules: Mapping[str, nn.Module]) -> list[str]:
    layers = [name for name, module in modules.items() if is_linear(name, module)]
    lists = [name for name, module in modules.items() if _is_list(module) and _any_inside(name, layers)]
    lists = [name for name in lists if not any(_holds(other, name) for other in lists if other != name)]
    longest = [name for name in lists if len(modules[name]) == max(len(modules[other]) for other in lists)]  # type: ignore[arg-type]
    if len(longest) == 1:
        return [f"{longest[0]}.{index}".lstrip(".") for index, _ in modules[longest[0]].named_children()]
    candidates = lists or [name for name, _ in model.named_children() if _any_inside(name, layers)]
    raise UsageError(
        f"blocks='auto' finds {'no' if not lists else 'more than one'} longest list of blocks of one class in "
        f"{type(model).__name__}: pass their names, or 'layers' (each layer on its own) or 'whole'. Candidates: "
        f"{', '.join(map(repr, candidates)) or 'none'}"
    )


def _is_list(module: nn.Module) -> bool:
    children = list(module.children())
    same_class = len({type(child) for child in children}) == 1
    return (
        isinstance(module, nn.ModuleList | nn.Sequential) and same_class and any(True for _ in children[0].children())
    )


class _Reached(BaseException):
    """Unwinds the forward pass once the wanted block is called; not for the model's own ``except Exception``."""

    def __init__(self, arguments: Arguments) -> None:
        self.arguments = arguments


class Walk:
    """Stop in front of any block, with all blocks before it answered from memory.

    Args:
        model: In evaluation mode.
        blocks: By name; none inside another.
        example: A small batch, from which the order of calls and what depends on what are read.

    Attributes:
        blocks: In the order in which they are called.
        last_use: For each block the position of the last block that needs its output, or the number of blocks when
            what comes after them does.

    Raises:
        UsageError: A block is never called, or more than once.
    """

    def __init__(self, model: nn.Module, blocks: Mapping[str, nn.Module], example: Batch) -> None:
        self.model, self._modules = model, dict(blocks)
        self._spoils_input: set[str] = set()
        self._spoilt_later: set[str] = set()
        outputs = self._record(example)
        missing = [name for name in blocks if name not in outputs]
        if missing:
            raise UsageError(f"block {missing[0]!r} is never called in a forward pass: leave it out of blocks")
        self.blocks = {name: blocks[name] for name in outputs}
        self.last_use = self._dependencies(example, outputs)

    def call(self, name: str, arguments: Arguments) -> Any:
        """Run a block itself."""
        args, kwargs = _clone(arguments) if name in self._spoils_input else arguments
        return self._modules[name](*args, **kwargs)

    def inputs(self, name: str, batch: Batch, outputs: Mapping[str, Any]) -> Arguments:
        """Arguments that a block is called with.

        Args:
            name: The block.
            batch: The model's inputs.
            outputs: What the blocks before it have returned; `hollow` where it is no longer needed.
        """

        def gate(called: str, *args: Any, **kwargs: Any) -> Any:
            if called == name:
                raise _Reached((args, kwargs))
            return self._answer(called, outputs)

        try:
            with torch.no_grad():
                self._run(gate, batch)
        except _Reached as reached:
            return reached.arguments
        raise RuntimeError(f"block {name!r} was not called for this batch, although it was for the first one")

    @torch.no_grad()
    def through(self, batch: Batch) -> None:
        """Run all blocks themselves and nothing after them, which for a language model would be its logits."""

        def stop(*_: Any) -> None:
            raise _Reached(((), {}))

        hook = list(self.blocks.values())[-1].register_forward_hook(stop)
        try:
            with no_cache(self.model):
                batch.run(self.model)
        except _Reached:
            pass
        finally:
            hook.remove()

    def finish(self, batch: Batch, outputs: Mapping[str, Any]) -> Any:
        """Run what comes after the last block."""
        return self._run(lambda called, *_, **__: self._answer(called, outputs), batch)

    def _answer(self, name: str, outputs: Mapping[str, Any]) -> Any:
        return _clone(outputs[name]) if name in self._spoilt_later else outputs[name]

    def _run(self, gate: Callable[..., Any], batch: Batch) -> Any:
        with _gates(self._modules, gate), no_cache(self.model):
            return batch.run(self.model)

    def _record(self, example: Batch) -> dict[str, Any]:
        """Run once, with hooks on the blocks that note their outputs and what is changed in place."""
        outputs: dict[str, Any] = {}
        before: dict[str, tuple[Any, list[int]]] = {}
        after: dict[str, list[int]] = {}

        def enter(name: str, _: nn.Module, *arguments: Any) -> None:
            if name in before:
                raise UsageError(f"block {name!r} is called more than once in a forward pass: name one that holds all")
            before[name] = arguments, _versions(arguments)

        def leave(name: str, _: nn.Module, __: Any, output: Any) -> None:
            arguments, versions = before[name]
            if _versions(arguments) != versions:
                self._spoils_input.add(name)
            outputs[name], after[name] = output, _versions(output)

        hooks = []
        for name, module in self._modules.items():
            hooks.append(module.register_forward_pre_hook(partial(enter, name), prepend=True, with_kwargs=True))
            hooks.append(module.register_forward_hook(partial(leave, name)))
        try:
            with torch.no_grad(), no_cache(self.model):
                example.run(self.model)
        finally:
            for hook in hooks:
                hook.remove()
        self._spoilt_later = {name for name, output in outputs.items() if _versions(output) != after[name]}
        return outputs

    @torch.no_grad()
    def _dependencies(self, example: Batch, outputs: dict[str, Any]) -> dict[str, int]:
        """Replace one output at a time by noise, and see which blocks then get other inputs.

        Noise rather than NaN, which attention kernels may swallow.
        """
        order, generator = list(outputs), torch.Generator().manual_seed(0)

        def noise(tensor: Tensor) -> Tensor:
            return torch.randn(tensor.shape, generator=generator).to(tensor)

        clean = self._inputs_of_all(example, outputs)
        last_use = {}
        for index, name in enumerate(order):
            found = self._inputs_of_all(example, {**outputs, name: _map(noise, outputs[name])})
            later = [*order[index + 1 :], _END]
            last_use[name] = max(
                (
                    order.index(other) if other != _END else len(order)
                    for other in later
                    if not _alike(found[other], clean[other])
                ),
                default=index,
            )
        return last_use

    def _inputs_of_all(self, example: Batch, outputs: Mapping[str, Any]) -> dict[str, list[Tensor]]:
        """What every block, and whoever called the model, is given."""
        seen: dict[str, list[Tensor]] = {}

        def gate(called: str, *args: Any, **kwargs: Any) -> Any:
            seen[called] = [tensor.clone() for tensor in _tensors((args, kwargs))]
            return self._answer(called, outputs)

        seen[_END] = _tensors(self._run(gate, example))
        return seen


@contextmanager
def _gates(blocks: Mapping[str, nn.Module], gate: Callable[..., Any]) -> Iterator[None]:
    """Call ``gate(name, *args, **kwargs)`` in place of each block and its hooks."""
    held = {name: {key: vars(block)[key] for key in _CALL if key in vars(block)} for name, block in blocks.items()}
    try:
        for name, block in blocks.items():
            vars(block).update(forward=partial(gate, name), _forward_hooks={}, _forward_pre_hooks={})
        yield
    finally:
        for name, block in blocks.items():
            vars(block).pop("forward")
            vars(block).update(held[name])


@contextmanager
def no_cache(model: nn.Module) -> Iterator[None]:
    """Keep a language model from caching keys and values."""
    config = getattr(model, "config", None)
    before = getattr(config, "use_cache", None)
    if not before:
        yield
        return
    assert config is not None
    config.use_cache = False
    try:
        yield
    finally:
        config.use_cache = before


def first_tensor(output: Any) -> Tensor:
    """The tensor that a block's output is compared by: itself, its logits, or its first item."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output["logits"] if "logits" in output else first_tensor(next(iter(output.values())))
    return first_tensor(output[0])


def hollow(output: Any) -> Any:
    """An output of the same shapes that takes no memory, and shows up as NaN where it is used after all."""
    return _map(lambda tensor: tensor.new_tensor(torch.nan).expand(tensor.shape), output)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def _floats(tree: Any) -> list[Tensor]:
    return [tensor for tensor in _tensors(tree) if tensor.is_floating_point()]


def _alike(left: list[Tensor], right: list[Tensor]) -> bool:
    return len(left) == len(right) and all(map(torch.equal, left, right))


def _versions(tree: Any) -> list[int]:
    return [tensor._version for tensor in _floats(tree)]


def _map(change: Callable[[Tensor], Tensor], tree: Any) -> Any:
    return pytree.tree_map(lambda leaf: change(leaf) if _floats([leaf]) else leaf, tree)


def _clone(tree: Any) -> Any:
    return _map(torch.clone, tree)
