"""Make a model ready for quantisation-aware training, and start its activation scales.

    prepare_ofq_(model, weight_bits=2, activation_bits=2)
    calibrate_(model, first_batch)                     # before the optimiser is built
    ... train, then anneal with ConfidenceGuidedAnnealing ...
    finish_ofq_(model)                                 # plain weights on the grid

Source: "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023, arXiv 2302.02210, nbasyl/OFQ.
"""

import warnings
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightsmith.core.errors import UsageError, WeightsmithWarning, unknown
from weightsmith.core.select import Where, select
from weightsmith.quantize.attention import Parts, QuantizedAttention, find_parts, obstacle, quantized_class
from weightsmith.quantize.lsq import ActivationQuantizer, LSQWeight
from weightsmith.quantize.qkr import QueryKeyProduct, query_key_product
from weightsmith.quantize.statsq import StatsQ
from weightsmith.quantize.weight_quantizer import WeightQuantizer, check_bits

Model = TypeVar("Model", bound=nn.Module)
WeightMethod = Literal["statsq", "lsq"]

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)
_HEADS = ("head", "head_dist", "classifier", "cls_classifier", "distillation_classifier", "lm_head")
_ACTIVATIONS = (nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Softmax, nn.Hardswish, nn.Mish)
_PASSING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d)
_GRANULARITIES = ("token", "channel", "tensor")


class _Plan(NamedTuple):
    weight_bits: int
    activation_bits: int | None
    ends_bits: int
    weight: WeightMethod
    granularity: str
    keep_query_bias: bool


def prepare_ofq_(
    model: Model,
    *,
    weight_bits: int = 2,
    activation_bits: int | None = 2,
    qk_reparam: bool | Literal["auto"] = True,
    weight: WeightMethod = "statsq",
    ends_bits: int | None = 8,
    granularity: Literal["token", "channel", "tensor"] = "token",
    keep_query_bias: bool = False,
    image_shift: bool = False,
    where: Where = None,
    attention_names: Mapping[str, str] | None = None,
) -> Model:
    """Quantise weights and activations while training goes on with floating-point latents.

    Weights become parametrisations: parameters keep their identity, and ``fold_`` leaves grid values in plain layers.
    Inputs of the layers pass an ``input_quantizer``, a sub-module of the layer. In attention, query, key and value,
    the softmax and (with ``qk_reparam``) the query-key product are quantised as well. Pretrained weights stay; with
    ``qk_reparam`` the biases of query and key are dropped. Biases, norms and embeddings stay in floating point.

    Args:
        model: Changed in place, after everything has been checked.
        weight_bits: Word length of weights, 1 to 8.
        activation_bits: Word length of activations, 1 to 8; ``None``: they stay in floating point.
        qk_reparam: Quantise the product of query and key weights instead of each. ``True`` refuses attention where
            something acts on query or key; ``"auto"`` quantises their weights there and warns; ``False`` everywhere.
        weight: ``"statsq"``, or ``"lsq"`` for the baseline with a learnt scale.
        ends_bits: Word length of the first layer and the classifiers, weights (LSQ) and inputs; ``None``: as the rest.
        granularity: Which activations share a step: those of a ``"token"`` (the paper; fixes the sequence length),
            a ``"channel"`` or the whole ``"tensor"``. Inputs of convolutions count channels as tokens.
        keep_query_bias: Keep what the query bias contributes, in floating point, instead of dropping it.
        image_shift: Give the input of a first convolution two learnt shifts per pixel, as the authors' code does.
        where: Which layers: ``None`` (every linear and convolution layer), glob(s) over module names, or a predicate.
            Attention is quantised inside when all its projections are chosen.
        attention_names: Attribute names of an attention that is not recognised, by role: ``qkv``, or ``q``, ``k`` and
            ``v``; ``out``; ``heads``.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: An argument is out of range, nothing matches, a weight is not finite, lazy or parametrised already,
            attention is refused, or a tied weight has an owner that cannot be quantised.
    """
    plan = _plan(weight_bits, activation_bits, ends_bits, weight, granularity, keep_query_bias)
    layers = select(model, where, default=_is_layer)
    _check(layers)
    attentions = _attentions(model, layers, qk_reparam, activation_bits, attention_names)
    ends = set() if ends_bits is None else _ends(model)
    originals = {name: id(layer.weight) for name, layer in layers.items()}
    owners = _owners(model, layers)
    after_activation = {name for name in layers if _follows_activation(model, name)}
    inside = {f"{name}.{part}".lstrip(".") for name, (parts, _) in attentions.items() for part in parts.projections}

    if not keep_query_bias:
        _warn_of_biases(model, attentions)
    for name, (parts, product) in attentions.items():
        _quantize_attention_(name, model.get_submodule(name), parts, plan, product=product)
    done: set[int] = set()
    for name, layer in layers.items():
        if name not in inside:
            if originals[name] not in done:
                done.add(originals[name])
                quantizer = _weight_quantizer(layer, plan, end=name in ends)
                for owner in owners[originals[name]]:
                    parametrize.register_parametrization(owner, "weight", quantizer)
            if activation_bits is not None:
                shift = image_shift and name in ends and isinstance(layer, _CONVOLUTIONS)
                _quantize_input_(name, layer, plan, name in ends, name in after_activation, pixels=shift)
    return model


def reparameterize_qk_(
    model: Model,
    *,
    weight_bits: int = 2,
    activation_bits: int | None = 2,
    granularity: Literal["token", "channel", "tensor"] = "token",
    keep_query_bias: bool = False,
    where: Where = None,
    attention_names: Mapping[str, str] | None = None,
) -> Model:
    """Quantise attention alone: the query-key product, the value weight, and the tensors between them.

    Args:
        model: Changed in place, after everything has been checked.
        weight_bits: Word length of the product and of the value weight.
        activation_bits: Word length inside attention; ``None``: floating point.
        granularity: As for `prepare_ofq_`.
        keep_query_bias: As for `prepare_ofq_`.
        where: Which attention modules: ``None`` (all), glob(s) over module names, or a predicate.
        attention_names: As for `prepare_ofq_`.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: As for `prepare_ofq_`; also when there is no attention.
    """
    plan = _plan(weight_bits, activation_bits, None, "statsq", granularity, keep_query_bias)
    chosen = select(model, where, default=lambda name, module: find_parts(name, module, attention_names) is not None)
    projections = {
        f"{name}.{part}".lstrip("."): module.get_submodule(part)
        for name, module in chosen.items()
        for part in cast(Parts, find_parts(name, module, attention_names)).projections
    }
    _check(projections)
    attentions = _attentions(model, projections, True, activation_bits, attention_names)
    if not keep_query_bias:
        _warn_of_biases(model, attentions)
    for name, (parts, _) in attentions.items():
        _quantize_attention_(name, model.get_submodule(name), parts, plan, product=True)
    return model


@torch.no_grad()
def calibrate_(model: Model, batch: Any) -> Model:
    """Give every activation scale its start from one batch, in evaluation mode; build the optimiser afterwards.

    With several processes all take the first one's scales.

    Args:
        model: What `prepare_ofq_` returned.
        batch: What the model takes: a tensor, a tuple of arguments, or a mapping of keyword arguments.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: NaN or infinite values reach a quantiser; the message names the layer.
    """
    quantizers = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    for quantizer in quantizers:
        quantizer.reset()
        quantizer.calibrating = True
    try:
        if isinstance(batch, Mapping):
            model(**batch)
        else:
            model(*batch) if isinstance(batch, tuple) else model(batch)
    finally:
        for quantizer in quantizers:
            quantizer.calibrating = False
        for module, training in modes:
            module.training = training
    unreached = [quantizer.name for quantizer in quantizers if not quantizer.calibrated]
    if unreached:
        warnings.warn(
            f"the batch did not reach {', '.join(unreached)}: no scale there yet", WeightsmithWarning, stacklevel=2
        )
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        for quantizer in quantizers:
            torch.distributed.broadcast(quantizer.scale.data, 0)
            torch.distributed.broadcast(quantizer.unsigned, 0)
            quantizer.signed = not bool(quantizer.unsigned)
    return model


def _plan(
    weight_bits: int, activation_bits: int | None, ends_bits: int | None, weight: str, granularity: str, keep: bool
) -> _Plan:
    check_bits(weight_bits, "weight_bits")
    for argument, bits in {"activation_bits": activation_bits, "ends_bits": ends_bits}.items():
        if bits is not None:
            check_bits(bits, argument)
    if weight not in ("statsq", "lsq"):
        raise unknown("weight", weight, ("statsq", "lsq"))
    if granularity not in _GRANULARITIES:
        raise unknown("granularity", granularity, _GRANULARITIES)
    return _Plan(weight_bits, activation_bits, ends_bits or weight_bits, cast(WeightMethod, weight), granularity, keep)


def _is_layer(_name: str, module: nn.Module) -> bool:
    # a subclass of Linear may use its weight in its own way, as the output projection of nn.MultiheadAttention does
    kind = type(module)
    return kind in (nn.Linear, *_CONVOLUTIONS) or (
        parametrize.is_parametrized(module) and kind.__bases__[0] in (nn.Linear, *_CONVOLUTIONS)
    )


def _check(layers: Mapping[str, nn.Module]) -> None:
    narrow = []
    for name, layer in layers.items():
        if parametrize.is_parametrized(layer, "weight") or "weight" not in layer._parameters:
            raise UsageError(f"the weight of {name or type(layer).__name__} is made by something else: fold_ it first")
        weight = cast(Tensor, layer.weight)
        if isinstance(weight, nn.parameter.UninitializedParameter) or weight.is_meta:
            raise UsageError(f"the weight of {name or type(layer).__name__} has no values yet: materialise it first")
        if not weight.isfinite().all():
            raise UsageError(f"the weight of {name or type(layer).__name__} holds NaN or infinite values")
        if weight.numel() == weight.shape[1 if isinstance(layer, _TRANSPOSED) else 0]:
            narrow.append(name or type(layer).__name__)
    if narrow:
        warnings.warn(
            f"{', '.join(narrow)} has one weight per output: it always lies on a rounding threshold, and its size is "
            "lost. Leave it out of where",
            WeightsmithWarning,
            stacklevel=3,
        )


def _attentions(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    qk_reparam: bool | str,
    activation_bits: int | None,
    names: Mapping[str, str] | None,
) -> dict[str, tuple[Parts, bool]]:
    """Attention modules that get a forward of ours: their parts, and whether query and key are multiplied."""
    if qk_reparam not in (True, False, "auto"):
        raise UsageError(f'qk_reparam must be True, False or "auto", got {qk_reparam!r}')
    chosen = {id(layer) for layer in layers.values()}
    found: dict[str, tuple[Parts, bool]] = {}
    refused: dict[str, str] = {}
    for name, module in model.named_modules():
        parts = find_parts(name, module, names)
        if parts is None or not all(id(getattr(module, part)) in chosen for part in parts.projections):
            continue
        reason = obstacle(module)
        if reason is not None:
            refused[name] = reason
        elif qk_reparam or activation_bits is not None:
            found[name] = parts, bool(qk_reparam)
    if names and not found and not refused:
        raise UsageError(f"attention_names={dict(names)} fits no module of the model whose projections are chosen")
    if refused and qk_reparam is True:
        name, reason = next(iter(refused.items()))
        raise UsageError(
            f"qk_reparam=True is not possible in {name}: {reason} between projection and dot product. Pass "
            'qk_reparam="auto" or False to quantise the weights of query and key there, or leave it out of where'
        )
    if refused and (activation_bits is not None or qk_reparam == "auto"):
        warnings.warn(
            f"the inside of {', '.join(refused)} stays in floating point ({next(iter(refused.values()))}); only its "
            "linear layers are quantised",
            WeightsmithWarning,
            stacklevel=3,
        )
    return found


def _ends(model: nn.Module) -> set[str]:
    """The classifiers, and the first layer unless an embedding comes before it."""
    names = [name for name, module in model.named_modules() if _is_layer(name, module)]
    embedded = any(isinstance(module, nn.Embedding) for module in model.modules())
    return {name for name in names if name.rpartition(".")[2] in _HEADS} | {names[-1]} | set(names[: not embedded])


def _owners(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[int, list[nn.Module]]:
    """Modules that share a chosen weight, by the weight's id."""
    chosen = {id(layer.weight): name for name, layer in reversed(list(layers.items()))}
    owners: dict[int, list[nn.Module]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            if id(parameter) in chosen:
                if attribute != "weight" or isinstance(module, parametrize.ParametrizationList):
                    raise UsageError(
                        f"{chosen[id(parameter)]} is tied to {name}.{attribute}, which cannot be quantised"
                    )
                owners.setdefault(id(parameter), []).append(module)
    tied = {chosen[key]: shared for key, shared in owners.items() if len(shared) > 1}
    for name, shared in tied.items():
        warnings.warn(
            f"{name} is tied: its weight is quantised once, for all {len(shared)} owners",
            WeightsmithWarning,
            stacklevel=3,
        )
    return owners


def _weight_quantizer(layer: nn.Module, plan: _Plan, *, end: bool) -> WeightQuantizer:
    axis = 1 if isinstance(layer, _TRANSPOSED) else 0
    if end:
        return LSQWeight(cast(Tensor, layer.weight), plan.ends_bits, axis)
    return _quantizer(cast(Tensor, layer.weight), plan, axis)


def _quantizer(w: Tensor, plan: _Plan, axis: int = 0, first_row: int = 0) -> WeightQuantizer:
    if plan.weight == "lsq":
        return LSQWeight(w, plan.weight_bits, axis, first_row)
    return StatsQ(plan.weight_bits, axis, first_row)


def _quantize_input_(
    name: str, layer: nn.Module, plan: _Plan, end: bool, after_activation: bool, *, pixels: bool
) -> None:
    bits = cast(int, plan.ends_bits if end else plan.activation_bits)
    if isinstance(layer, nn.Linear):
        axis = None if end else {"token": -2, "channel": -1, "tensor": None}[plan.granularity]
        shifts: tuple[int, ...] | None = (layer.in_features,)
    else:
        spatial = cast(Tensor, layer.weight).dim() - 2
        axis = None if plan.granularity == "tensor" else -(spatial + 1)
        shifts = () if pixels else None
    quantizer = _activations(f"the input of {name}", layer, bits, axis, False if after_activation else None, shifts)
    layer.add_module("input_quantizer", quantizer)
    layer.register_forward_pre_hook(_quantized_input)


def _quantized_input(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (cast(nn.Module, module.input_quantizer)(args[0]), *args[1:])


def _activations(
    name: str,
    beside: nn.Module,
    bits: int,
    axis: int | None,
    signed: bool | None,
    shifts: tuple[int, ...] | None = None,
) -> ActivationQuantizer:
    like = next(beside.parameters())
    dtype = torch.promote_types(like.dtype, torch.float32)
    quantizer = ActivationQuantizer(bits, axis, signed=signed, shifts=shifts, dtype=dtype, device=like.device)
    quantizer.name = name
    return quantizer


def _quantize_attention_(name: str, attention: nn.Module, parts: Parts, plan: _Plan, *, product: bool) -> None:
    attention.__class__ = quantized_class(cast(Any, type(attention)))
    ours = cast(QuantizedAttention, attention)
    ours.parts = parts
    layers = [cast(nn.Linear, getattr(attention, part)) for part in parts.projections]
    first = layers[0]
    width = parts.width
    wq, wk = first.weight.chunk(3)[:2] if parts.qkv else (first.weight, layers[1].weight)
    for module in ("input", "query", "key", "value", "softmax", "product"):
        setattr(ours, f"{module}_quantizer", None)
    ours.product = None
    for parameter in ("product_weight", "product_shift", "query_bias", "logit_bias"):
        ours.register_parameter(parameter, None)
    if product:
        made = query_key_product(wq.detach(), wk.detach(), parts.heads)
        ours.product = QueryKeyProduct(parts.heads, _quantizer(made.requires_grad_(wq.requires_grad), plan))
        _drop_biases(ours, layers, width, keep=plan.keep_query_bias)

    if plan.activation_bits is not None:
        token = {"token": -2, "channel": -1, "tensor": None}[plan.granularity]
        inner = partial(_activations, beside=attention, bits=plan.activation_bits)
        ours.input_quantizer = inner(f"the input of {name}", axis=token, signed=True, shifts=(first.in_features,))
        values = width if parts.qkv else layers[2].out_features
        rest = None if plan.granularity == "tensor" else -1
        ours.value_quantizer = inner(f"the value of {name}", axis=rest, signed=True, shifts=(values,))
        softmax = None if plan.granularity == "tensor" else -2
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
            quantizer = _quantizer(layer.weight, plan, first_row=first_row)
            parametrize.register_parametrization(layer, "weight", quantizer)


@torch.no_grad()
def _drop_biases(attention: QuantizedAttention, layers: list[nn.Linear], width: int, *, keep: bool) -> None:
    fused = attention.parts.qkv != ""
    biases = [layer.bias for layer in (layers if fused else layers[:2]) if layer.bias is not None]
    if keep and biases:
        attention.query_bias = nn.Parameter(biases[0][:width].clone(), requires_grad=biases[0].requires_grad)
    if fused and biases:
        biases[0][: 2 * width] = 0  # out of use: the value bias is the rest
    elif not fused:
        for layer in layers[:2]:
            layer.register_parameter("bias", None)


def _warn_of_biases(model: nn.Module, attentions: Mapping[str, tuple[Parts, bool]]) -> None:
    lost = []
    for name, (parts, product) in attentions.items():
        layers = [model.get_submodule(name).get_submodule(part) for part in parts.projections]
        biases = [layer.bias for layer in (layers if parts.qkv else layers[:2]) if isinstance(layer.bias, Tensor)]
        if product and any(bias[: 2 * len(bias) // 3].any() if parts.qkv else bias.any() for bias in biases):
            lost.append(name or "the model")
    if lost:
        warnings.warn(
            f"the biases of query and key of {', '.join(lost)} are dropped; keep_query_bias=True keeps what they "
            "contribute",
            WeightsmithWarning,
            stacklevel=3,
        )


def _follows_activation(model: nn.Module, name: str) -> bool:
    """Whether the input of a layer comes out of a function like GELU, as far as names and order tell."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if leaf == "fc2":
        return hasattr(parent, "fc1")
    if leaf == "dense":
        grandparent = model.get_submodule(parent_name.rpartition(".")[0])
        return parent_name.rpartition(".")[2] == "output" and hasattr(grandparent, "intermediate")
    if not isinstance(parent, nn.Sequential):
        return False
    return isinstance(next(_before(parent, leaf), None), _ACTIVATIONS)


def _before(parent: nn.Sequential, leaf: str) -> Iterator[nn.Module]:
    earlier = list(parent.named_children())
    at = [child for child, _ in earlier].index(leaf)
    return (module for _, module in reversed(earlier[:at]) if not isinstance(module, _PASSING))
