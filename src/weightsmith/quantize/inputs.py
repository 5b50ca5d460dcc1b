"""Attach a quantizer to the input of a layer, as its submodule ``input_quantizer``, and remove it again."""

from typing import Any

from torch import nn

INPUT = "input_quantizer"


def quantize_input_(layer: nn.Module, quantizer: nn.Module) -> None:
    """Let a layer quantize its input; a quantizer that is there already is replaced."""
    if not hasattr(layer, INPUT):
        layer.register_forward_pre_hook(_quantize_input, with_kwargs=True)
    layer.add_module(INPUT, quantizer)


def release_input_(layer: nn.Module) -> None:
    """Let a layer take its input as it comes again."""
    if hasattr(layer, INPUT):
        delattr(layer, INPUT)
        hooks = layer._forward_pre_hooks
        for key in [key for key, hook in hooks.items() if hook is _quantize_input]:
            del hooks[key], layer._forward_pre_hooks_with_kwargs[key]


def _quantize_input(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    quantize: Any = layer.input_quantizer
    if args:
        return (quantize(args[0]), *args[1:]), kwargs
    first, *_ = kwargs
    return args, {**kwargs, first: quantize(kwargs[first])}
