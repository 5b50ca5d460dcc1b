"""Run a model once and look: how attention is called, and which layers are the first and the last of the network.

The first layers are those whose input nothing before them can train; the last ones are those through which alone the
output depends on everything before. The graph of autograd tells both. The output of an encoder without a head is a sum
over all of its blocks, so none of its layers is a last one.
"""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from weightsmith.core.errors import UsageError
from weightsmith.core.modes import evaluating
from weightsmith.quantize.in_training.convert import Call
from weightsmith.quantize.in_training.lsq import ActivationQuantizer
from weightsmith.quantize.in_training.plan import is_layer

_HEADS = ("head", "head_dist", "classifier", "cls_classifier", "distillation_classifier", "lm_head")
_SIGNED = -0.5  # GELU, SiLU and Mish stay above


@dataclass(slots=True)
class Observed:
    """What a run has shown.

    Attributes:
        by: What was run: the user's example, one made from a transformers config, or nothing.
        calls: First and last call of the modules asked for.
        ends: Names of the first and last layers.
        signed: Layers whose input goes well below 0.
        by_run: Whether anything was run.
    """

    by: str
    by_run: bool = True
    calls: dict[str, list[Call]] = field(default_factory=dict)
    ends: set[str] = field(default_factory=set)
    signed: set[str] = field(default_factory=set)


def run_batch(model: nn.Module, batch: Any) -> Any:
    """Call a model with a tensor, with a tuple or list of arguments, or with a mapping of keyword arguments."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, tuple | list) else model(batch)


def observe(model: nn.Module, attentions: Iterable[str], example: Any) -> Observed:
    """Run a model on an example; on one made from its config where it is a transformers model and none is given.

    Args:
        model: Stays as it is, buffers of the forward pass apart.
        attentions: Names of modules whose calls are wanted.
        example: What the model takes, or ``None``.

    Raises:
        UsageError: The model does not take the example.
    """
    if example is not None:
        try:
            return _run(model, attentions, example, "the example")
        except Exception as error:
            raise UsageError(f"example= does not fit the model, {type(error).__name__}: {error}") from error
    made = _example_of(model)
    if made is not None:
        try:
            return _run(model, attentions, made, "an example made from the model's config")
        except Exception:  # the guess did not fit
            pass
    return Observed("names and order of modules, as no example was given", by_run=False, ends=_ends_by_name(model))


def _run(model: nn.Module, attentions: Iterable[str], example: Any, by: str) -> Observed:
    seen = Observed(by)
    made: dict[Any, str] = {}  # nodes of the graph, by which layer
    handles = []
    layers = {name: module for name, module in model.named_modules() if is_layer(name, module)}

    def before(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        x = next(iter((*args, *kwargs.values())), None)
        if not isinstance(x, Tensor) or not x.is_floating_point():
            return
        if torch.is_grad_enabled() and not x.requires_grad:
            seen.ends.add(name)
        if x.numel() and x.detach().amin() < _SIGNED:
            seen.signed.add(name)

    def after(name: str, output: Any) -> None:
        if isinstance(output, Tensor) and output.grad_fn is not None:
            made[output.grad_fn] = name

    def called(name: str, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        call = Call(*tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, (args, kwargs)))
        seen.calls[name] = [*seen.calls.get(name, ())[:1], call]

    for name, layer in layers.items():
        handles.append(
            layer.register_forward_pre_hook(
                lambda _, args, kwargs, name=name: before(name, args, kwargs), with_kwargs=True
            )
        )
        handles.append(layer.register_forward_hook(lambda _, args, output, name=name: after(name, output)))
    handles += [
        model.get_submodule(name).register_forward_pre_hook(
            lambda _, args, kwargs, name=name: called(name, args, kwargs), with_kwargs=True
        )
        for name in attentions
    ]
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    fresh = [held for held in model.modules() if isinstance(held, ActivationQuantizer) and not held.calibrated]
    try:
        for quantizer in fresh:
            quantizer.calibrating = True
        for parameter, _ in flags:
            parameter.requires_grad_(parameter.is_floating_point())
        with evaluating(model), torch.enable_grad(), torch.random.fork_rng():
            out = run_batch(model, example)
        for tensor in _outputs(out):
            heads = _heads(tensor, made)
            seen.ends |= heads
            if isinstance(out, Mapping) and not heads:  # what comes after is made from the same hidden states
                break
    finally:
        for handle in handles:
            handle.remove()
        for quantizer in fresh:
            quantizer.calibrating = False
            quantizer.reset()
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
    return seen


def _outputs(out: Any) -> list[Tensor]:
    """The tensors that a model gives, other than losses; of a mapping (transformers) those at its top."""
    leaves = list(out.values()) if isinstance(out, Mapping) else tree_leaves(out)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.grad_fn is not None and leaf.dim()]


def _heads(output: Tensor, made: Mapping[Any, str]) -> set[str]:
    last = {made[node]: node for node in _upstream([output.grad_fn], made)}
    for node in last.values():
        further = _upstream([parent for parent, _ in node.next_functions], {})
        if any(made.get(other) in last for other in further):
            return set()
    return set(last)


def _upstream(nodes: list[Any], stops: Mapping[Any, str]) -> set[Any]:
    """With stops those that are met first, else all nodes."""
    met, found, todo = set(), set(), [node for node in nodes if node is not None]
    while todo:
        node = todo.pop()
        if node in met:
            continue
        met.add(node)
        if node in stops:
            found.add(node)
        else:
            todo += [parent for parent, _ in node.next_functions if parent is not None]
    return found if stops else met


def _example_of(model: nn.Module) -> dict[str, Tensor] | None:
    """Random inputs for a transformers model, as its config describes them."""
    if not hasattr(model, "main_input_name") or not hasattr(model, "config"):
        return None
    held: Any = model
    config, like = held.config, next(model.parameters())
    generator = torch.Generator().manual_seed(0)

    def number(name: str, *parts: Any) -> Any:
        return next((getattr(part, name) for part in parts if getattr(part, name, None) is not None), None)

    def ids(part: Any) -> Tensor:
        return torch.randint(number("vocab_size", part) or 2, (1, 8), generator=generator).to(like.device)

    text, image = getattr(config, "text_config", config), getattr(config, "vision_config", config)
    made: dict[str, Tensor] = {}
    size, channels = number("image_size", image), number("num_channels", image)
    if size is not None and channels is not None:
        height, width = (size, size) if isinstance(size, int) else tuple(size)
        made["pixel_values"] = torch.randn(1, channels, height, width, generator=generator).to(like)
    elif held.main_input_name == "pixel_values":
        made["pixel_values"] = torch.randn(1, channels or 3, 64, 64, generator=generator).to(like)
    if held.main_input_name == "input_features":
        frames = 2 * (number("max_source_positions", config) or 64)
        made["input_features"] = torch.randn(1, config.num_mel_bins, frames, generator=generator).to(like)
    elif number("vocab_size", text) is not None and held.main_input_name == "input_ids":
        made["input_ids"] = ids(text)
    if getattr(config, "is_encoder_decoder", False) and hasattr(model, "get_decoder"):
        made["decoder_input_ids"] = ids(text)
    return made or None


def _ends_by_name(model: nn.Module) -> set[str]:
    """Layers that are called heads, the very last one, and the first one unless an embedding comes before it."""
    names = {module: name for name, module in model.named_modules() if is_layer(name, module)}
    embedded = any(isinstance(module, nn.Embedding) for module in model.modules())
    last = _last(model)
    heads = {name for name in names.values() if name.rpartition(".")[2] in _HEADS}
    return heads | ({names[last]} if last is not None else set()) | set([*names.values()][: not embedded])


def _last(module: nn.Module) -> nn.Module | None:
    """The layer that was registered last, unless it belongs to one of several blocks of one kind."""
    if is_layer("", module):
        return module
    children = [child for child in module.children() if any(_layers(child))]
    if not children:
        return None
    last = children[-1]
    blocks = isinstance(module, nn.Sequential | nn.ModuleList) and not is_layer("", last)
    if blocks and sum(type(child) is type(last) for child in children) > 1:
        return None
    return _last(last)


def _layers(module: nn.Module) -> Iterator[nn.Module]:
    return (inner for inner in module.modules() if is_layer("", inner))
