"""Turn an attention module into one whose inner tensors are quantized, and check first that it still is the same.

Attention is recognized by the names of its attributes, which say little about what it computes: it may reduce keys,
add a norm, or return something else. So a copy of the module is converted with every quantizer switched off and
compared with another copy, on random hidden states and random parameters (pretrained ones may hide a difference: a
bias that is zero today trains tomorrow). What differs is not converted.
"""

import contextlib
import copy
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils._pytree import tree_map

from weightsmith.quantize.in_training.attention import (
    CACHES,
    DROPOUTS,
    MASKS,
    SOURCES,
    QuantizedAttention,
    bind,
    given_kinds,
    quantized_class,
)
from weightsmith.quantize.in_training.attention_parts import Parts
from weightsmith.quantize.in_training.plan import Plan, activation_quantizer
from weightsmith.quantize.in_training.qkr import QueryKeyProduct, query_key_product
from weightsmith.quantize.inputs import release_input_

_TOLERANCE = 1e-3  # of the largest output; float32 gives 1e-6, a forgotten bias or mask gives 1e-1


class Call(NamedTuple):
    """The arguments of one call of an attention module."""

    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]


def quantize_attention_(
    name: str, attention: nn.Module, parts: Parts, plan: Plan | None, *, product: bool
) -> QuantizedAttention:
    """Convert an attention module in place.

    Args:
        name: Its qualified name, for messages.
        attention: A module that `faithful_parts` has accepted.
        parts: What that returned.
        plan: Which quantizers; ``None``: none at all, and the query bias stays.
        product: Quantize the product of query and key weights instead of each.
    """
    attention.__class__ = quantized_class(cast(Any, type(attention)))
    ours = cast(QuantizedAttention, attention)
    ours.parts = parts
    layers = [cast(nn.Linear, getattr(attention, part)) for part in parts.projections]
    first, width = layers[0], parts.width
    wq, wk = first.weight.chunk(3)[:2] if parts.qkv else (first.weight, layers[1].weight)
    ours.clear_()
    if product:
        made = query_key_product(wq.detach(), wk.detach(), parts.heads).requires_grad_(wq.requires_grad)
        quantizer = nn.Identity() if plan is None else plan.weight_quantizer(made)
        ours.product = QueryKeyProduct(parts.heads, cast(Any, quantizer))
        _drop_biases(ours, layers, width, keep=plan is None or plan.keep_query_bias)
    if plan is None:
        return ours

    if plan.activation_bits is not None:
        for layer in layers:
            release_input_(layer)
        inner = partial(activation_quantizer, beside=attention, bits=plan.activation_bits)
        token, all_in_one = plan.token_axis, plan.granularity == "tensor"
        ours.input_quantizer = inner(f"the input of {name}", axis=token, signed=True, shifts=(first.in_features,))
        values = width if parts.qkv else layers[2].out_features
        rest = None if all_in_one else -1
        ours.value_quantizer = inner(f"the value of {name}", axis=rest, signed=True, shifts=(values,))
        softmax = None if all_in_one else -2
        ours.softmax_quantizer = inner(f"the softmax of {name}", axis=softmax, signed=False)
        if product:
            ours.product_quantizer = inner(f"the query-key product of {name}", axis=token, signed=True)
            ours.product_shift = nn.Parameter(first.weight.new_zeros(parts.heads * first.in_features))
        else:
            keys = width if parts.qkv else layers[1].out_features
            ours.query_quantizer = inner(f"the query of {name}", axis=token, signed=True, shifts=(width,))
            ours.key_quantizer = inner(f"the key of {name}", axis=token, signed=True, shifts=(keys,))
    for role, layer in enumerate(layers):
        free = product and not parts.qkv and role < 2
        if not free:
            first_row = 2 * width if product and parts.qkv else 0
            quantizer = plan.weight_quantizer(layer.weight, first_row=first_row)
            parametrize.register_parametrization(layer, "weight", quantizer)
    return ours


@torch.no_grad()
def faithful_parts(
    attention: nn.Module, parts: Parts, calls: list[Call], *, product: bool, quantized_inputs: bool
) -> Parts | str:
    """Compare an attention module with what it would become, quantizers off.

    Args:
        attention: Stays as it is.
        parts: Where its projections are, see ``find_parts``.
        calls: How the model calls it; empty: unknown.
        product: As for `quantize_attention_`.
        quantized_inputs: Whether present quantizers of the projections' inputs give way.

    Returns:
        The parts, completed with what it returns and with the kinds of argument that were compared; or what differs.
    """
    if not calls and set(SOURCES) & set(parts.arguments):
        return "it can attend to another source, and no example shows whether it does"
    try:
        probe = _probe(attention, parts, quantized_inputs)
        known = [_randomized(call, parts) for call in calls] or [_guess(probe, parts)]
        with torch.random.fork_rng(_devices(attention)), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return _compared(probe, parts, known, product)
    except Exception as error:  # a stranger's code, fed with what it may not expect: any error means it is not known
        return f"it could not be compared: {type(error).__name__}: {error}".splitlines()[0]


def _compared(original: nn.Module, parts: Parts, calls: list[Call], product: bool) -> Parts | str:
    for call in calls:
        given = bind(parts.arguments, call.args, call.kwargs)
        if any(given.get(key) is not None for key in SOURCES):
            return "it attends to another source"
        if any(given.get(key) is not None for key in CACHES):
            return "it is given a key-value cache; set use_cache=False in the model's config to do without"
    out = original(*calls[0].args, **calls[0].kwargs)
    returns = len(out) if isinstance(out, tuple) else 0
    if returns > 2 or not isinstance(out, Tensor | tuple):
        return "it returns more than its output and the attention weights"
    parts = replace(parts, returns=returns, checked=None)
    stand_in = quantize_attention_("", copy.deepcopy(original), parts, None, product=product)
    checked: set[str] = set()
    for call in calls:
        reason = _difference(original, stand_in, call)
        if reason is not None:
            return reason
        checked |= set(given_kinds(bind(parts.arguments, call.args, call.kwargs)))
    call = calls[0]
    given = bind(parts.arguments, call.args, call.kwargs)
    for name, value in _options(parts, given[parts.arguments[0]]):
        with contextlib.suppress(Exception):  # it does not take this, or the stand-in does not
            if _difference(original, stand_in, Call((), {**given, name: value})) is None:
                checked |= set(given_kinds({name: value}))
    if _is_random(original, call) != _is_random(stand_in, call):
        return "its dropout is not where it was looked for"
    return replace(parts, checked=tuple(sorted(checked)))


def _difference(original: nn.Module, stand_in: nn.Module, call: Call) -> str | None:
    expected, found = (module(*call.args, **call.kwargs) for module in (original, stand_in))
    expected, found = (out if isinstance(out, tuple) else (out,) for out in (expected, found))
    for what, left, right in zip(("outputs", "attention weights"), expected, found, strict=False):
        if left is None:
            continue
        if not isinstance(left, Tensor) or left.shape != right.shape:
            return f"its {what} would have another shape"
        finite = left.isfinite()
        error = torch.where(finite, left - right, 0).abs().max()
        scale = torch.where(finite, left, 0).abs().max()
        if not error <= _TOLERANCE * scale:
            return f"its {what} would differ by {float(error / scale):.1e} of their size, quantizers off"
    return None


def _probe(attention: nn.Module, parts: Parts, quantized_inputs: bool) -> nn.Module:
    """A copy in evaluation mode and at least single precision, with random parameters that all matter."""
    probe = copy.deepcopy(attention).eval()
    for tensor in [*probe.parameters(), *probe.buffers()]:
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(torch.promote_types(tensor.dtype, torch.float32))
    generator = torch.Generator().manual_seed(0)
    for parameter in probe.parameters():
        if parameter.is_floating_point():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.device)
            if parameter.dim() > 1:
                parameter.copy_(noise * 1.5 * max(1, parameter[0].numel()) ** -0.5)
            else:
                parameter.add_(0.3 * noise)
    if quantized_inputs:
        for part in parts.projections:
            release_input_(probe.get_submodule(part))
    for module in probe.modules():
        if isinstance(module, nn.Dropout) and module.p:
            module.p = 0.5
    for name in DROPOUTS:
        if isinstance(getattr(probe, name, None), float) and getattr(probe, name):
            setattr(probe, name, 0.5)
    return probe


def _randomized(call: Call, parts: Parts) -> Call:
    """The call with random hidden states, and floating-point tensors in at least single precision."""

    def widened(value: Any) -> Any:
        if isinstance(value, Tensor) and value.is_floating_point():
            return value.to(torch.promote_types(value.dtype, torch.float32))
        return value

    args, kwargs = tree_map(widened, call.args), tree_map(widened, dict(call.kwargs))
    hidden = args[0] if args else kwargs[parts.arguments[0]]
    noise = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(1)).to(hidden)
    return Call((noise, *args[1:]), kwargs) if args else Call((), {**kwargs, parts.arguments[0]: noise})


def _guess(probe: nn.Module, parts: Parts) -> Call:
    """A call with hidden states alone."""
    index = getattr(probe, "relative_position_index", None)
    tokens = int(index.numel() ** 0.5) if isinstance(index, Tensor) else 5
    layer = cast(nn.Linear, getattr(probe, parts.projections[0]))
    return _randomized(Call((layer.weight.new_empty(2, tokens, layer.in_features),), {}), parts)


def _options(parts: Parts, hidden: Tensor) -> Iterator[tuple[str, Any]]:
    """What else the module can be given, in every form that the converted one knows."""
    batch, tokens = hidden.shape[:2]
    added = torch.randn(batch, tokens, tokens, generator=torch.Generator().manual_seed(2)).to(hidden)
    visible = (added > 0) | torch.eye(tokens, dtype=torch.bool, device=hidden.device)
    for name in parts.arguments[1:]:
        if name in MASKS:
            for mask in (visible, added):
                yield from ((name, mask[0]), (name, mask), (name, mask[:, None]))
        elif name == "head_mask":
            yield name, torch.linspace(0, 1, parts.heads).to(hidden)[:, None, None]
            yield name, torch.linspace(0, 1, parts.heads).to(hidden)[None, :, None, None]
        elif name == "is_causal":
            yield name, True


def _is_random(module: nn.Module, call: Call) -> bool:
    outs = []
    module.train()
    for seed in range(2):
        torch.manual_seed(seed)
        out = module(*call.args, **call.kwargs)
        outs.append(out[0] if isinstance(out, tuple) else out)
    module.eval()
    return not torch.equal(*outs)


@torch.no_grad()
def _drop_biases(attention: QuantizedAttention, layers: list[nn.Linear], width: int, *, keep: bool) -> None:
    fused = attention.parts.qkv != ""
    biases = [layer.bias for layer in (layers if fused else layers[:2]) if layer.bias is not None]
    if keep and isinstance(layers[0].bias, Tensor):
        query = layers[0].bias
        attention.query_bias = nn.Parameter(query[:width].clone(), requires_grad=query.requires_grad)
    if fused and biases:
        biases[0][: 2 * width] = 0  # out of use: the value bias is the rest
    elif not fused:
        for layer in layers[:2]:
            layer.register_parameter("bias", None)


def _devices(module: nn.Module) -> list[int]:
    return [parameter.device.index or 0 for parameter in list(module.parameters())[:1] if parameter.is_cuda]
