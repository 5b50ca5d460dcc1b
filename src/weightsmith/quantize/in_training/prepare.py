"""Make a model ready for quantization-aware training, and start its activation scales.

    prepare_ofq_(model, weight_bits=2, activation_bits=2)
    calibrate_(model, first_batch)                     # before the optimizer is built
    ... train, then anneal with ConfidenceGuidedAnnealing ...
    finish_ofq_(model)                                 # plain weights on the grid

Source: "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023, arXiv 2302.02210, nbasyl/OFQ.
"""

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.core.modes import evaluating
from weightsmith.core.select import Where, select
from weightsmith.core.tied import register_shared_
from weightsmith.core.weights import CONVOLUTIONS, Slot, check_plain, output_axis, owners
from weightsmith.quantize.in_training.attention_parts import Parts, find_parts
from weightsmith.quantize.in_training.attention_plan import find_candidates, plan_attentions, some, warn_of_biases
from weightsmith.quantize.in_training.convert import quantize_attention_
from weightsmith.quantize.in_training.lsq import ActivationQuantizer
from weightsmith.quantize.in_training.observe import observe, run_batch
from weightsmith.quantize.in_training.plan import (
    Plan,
    WeightMethod,
    activation_quantizer,
    is_layer,
    make_plan,
)
from weightsmith.quantize.in_training.preparation import overlooked, record_
from weightsmith.quantize.in_training.weight_quantizer import WeightQuantizer
from weightsmith.quantize.inputs import quantize_input_

Model = TypeVar("Model", bound=nn.Module)

_ACTIVATIONS = (nn.GELU, nn.ReLU, nn.ReLU6, nn.SiLU, nn.Sigmoid, nn.Softmax, nn.Hardswish, nn.Mish)
_PASSING = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.Identity, nn.Flatten, nn.MaxPool2d, nn.AvgPool2d)


def prepare_ofq_(
    model: Model,
    *,
    weight_bits: int = 2,
    activation_bits: int | None = 2,
    qk_reparam: bool | Literal["auto"] = "auto",
    weight: WeightMethod = "statsq",
    ends_bits: int | None = 8,
    granularity: Literal["token", "channel", "tensor"] = "token",
    keep_query_bias: bool = False,
    image_shift: bool = False,
    where: Where = None,
    attention_names: Mapping[str, str] | None = None,
    example: Any = None,
) -> Model:
    """Quantize weights and activations while training goes on with floating-point latents.

    Weights become parametrizations: parameters keep their identity, and ``fold_`` leaves grid values in plain layers.
    Inputs of the layers pass an ``input_quantizer``, a sub-module of the layer. In attention, query, key and value,
    the softmax and (with ``qk_reparam``) the query-key product are quantized as well. Pretrained weights stay; with
    ``qk_reparam`` the biases of query and key are dropped. Biases, norms and embeddings stay in floating point, and so
    do inputs of ``nn.MultiheadAttention``. What was done where, and what was left, is in `ofq_report`.

    Args:
        model: Changed in place, after everything has been checked.
        weight_bits: Bit width of weights, 1 to 8.
        activation_bits: Bit width of activations, 1 to 8; ``None``: they stay in floating point.
        qk_reparam: Quantize the product of query and key weights instead of each. Attention that does more than the
            converted module would, quantizers off, keeps its forward: only its linear layers are quantized, with a
            warning (``"auto"``) or not at all, with an error (``True``). ``False``: no product anywhere.
        weight: ``"statsq"``, or ``"lsq"`` for the baseline with a learned scale.
        ends_bits: Bit width of the first layer and the classifiers, weights (LSQ) and inputs; ``None``: as the rest.
        granularity: Which activations share a step: those of a ``"token"`` (the paper; fixes the sequence length),
            a ``"channel"`` or the whole ``"tensor"``. Inputs of convolutions count channels as tokens.
        keep_query_bias: Keep what the query bias contributes, in floating point, instead of dropping it.
        image_shift: Give the input of a first convolution two learned shifts per pixel, as the authors' code does.
        where: Which layers: ``None`` (every linear and convolution layer), glob(s) over module names, or a predicate.
            Attention is quantized inside when all its projections are chosen.
        attention_names: Attribute names of an attention that is not recognized, by role: ``qkv``, or ``q``, ``k`` and
            ``v``; ``out``; ``heads``.
        example: What the model takes, as for `calibrate_`; a few samples will do. It shows how attention is called and
            which layers are the first and the last. ``None``: random inputs for a transformers model; else attention is
            called with hidden states alone, and names and order of modules decide on the ends.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: An argument is out of range, nothing matches, a weight is not finite, lazy or parametrized already,
            the example does not fit, attention is refused, or a tied weight has an owner that cannot be quantized.
    """
    plan = make_plan(weight_bits, activation_bits, ends_bits, weight, granularity, keep_query_bias)
    if qk_reparam not in (True, False, "auto"):
        raise UsageError(f'qk_reparam must be True, False or "auto", got {qk_reparam!r}')
    adapters = _adapters(model)
    chosen = select(
        model,
        where,
        default=lambda name, module: _is_chosen(name, module) and name not in adapters,
        supported=_is_chosen,
    )
    layers = {name: module for name, module in chosen.items() if not isinstance(module, nn.MultiheadAttention)}
    slots = [Slot(name, layer, "weight") for name, layer in layers.items()]
    for name, module in chosen.items():
        if isinstance(module, nn.MultiheadAttention):
            slots += _packed(name, module)
    _check(slots)
    converts = bool(qk_reparam) or activation_bits is not None
    candidates = find_candidates(model, layers, attention_names, strict=qk_reparam is True) if converts else {}
    seen = observe(model, candidates, example)
    attentions = plan_attentions(model, candidates, seen, plan, qk_reparam, attention_names)
    ends = seen.ends if ends_bits is not None else set()
    held_by = _owners(model, slots)
    unsigned = {name for name in layers if _follows_activation(model, name)} - seen.signed
    inside = {f"{name}.{part}".lstrip(".") for name, parts in attentions.found.items() for part in parts.projections}
    quantizers: dict[int, WeightQuantizer] = {}
    inputs: dict[str, ActivationQuantizer] = {}
    for layer, module, attribute in slots:
        if layer not in inside:
            held = getattr(module, attribute)
            if id(held) not in quantizers:
                quantizers[id(held)] = plan.slot_quantizer(module, held, end=layer in ends)
            if activation_bits is not None and layer in layers:
                pixels = image_shift and layer in ends and isinstance(module, CONVOLUTIONS)
                inputs[layer] = _input_quantizer(layer, module, plan, layer in ends, layer in unsigned, pixels=pixels)

    if qk_reparam and not keep_query_bias:
        warn_of_biases(model, attentions.found)
    for name, parts in attentions.found.items():
        quantize_attention_(name, model.get_submodule(name), parts, plan, product=bool(qk_reparam))
    for key, quantizer in quantizers.items():
        register_shared_([(slot.module, slot.attribute) for slot in held_by[key]], quantizer)
    for name, input_quantizer in inputs.items():
        quantize_input_(layers[name], input_quantizer)

    done = dict.fromkeys(attentions.found, "query-key product" if qk_reparam else "inside")
    record_(model, {**done, **attentions.refused}, ends & {slot.owner for slot in slots}, seen.by)
    left = {} if where is not None else overlooked(model)
    left = {name: share for name, share in left.items() if name.removesuffix(".weight") not in adapters}
    if where is None and adapters:
        warnings.warn(
            f"the adapters {some(adapters)} stay in floating point, and what they add is not on the grid: merge them "
            "first if it shall be",
            WeightsmithWarning,
            stacklevel=2,
        )
    if left:
        warnings.warn(
            f"{', '.join(f'{name} ({share:.1%} of all matrices)' for name, share in left.items())} stays in floating "
            "point: it belongs to no plain linear layer or convolution",
            WeightsmithWarning,
            stacklevel=2,
        )
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
    example: Any = None,
) -> Model:
    """Quantize attention alone: the query-key product, the value weight, and the tensors between them.

    Args:
        model: Changed in place, after everything has been checked.
        weight_bits: Bit width of the product and of the value weight.
        activation_bits: Bit width inside attention; ``None``: floating point.
        granularity: As for `prepare_ofq_`.
        keep_query_bias: As for `prepare_ofq_`.
        where: Which attention modules: ``None`` (all), glob(s) over module names, or a predicate.
        attention_names: As for `prepare_ofq_`.
        example: As for `prepare_ofq_`.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: As for `prepare_ofq_`; also when there is no attention.
    """
    plan = make_plan(weight_bits, activation_bits, None, "statsq", granularity, keep_query_bias)
    chosen = select(model, where, default=lambda name, module: find_parts(name, module, attention_names) is not None)
    candidates = {name: cast(Parts, find_parts(name, module, attention_names)) for name, module in chosen.items()}
    slots = [
        Slot(f"{name}.{part}".lstrip("."), chosen[name].get_submodule(part), "weight")
        for name, parts in candidates.items()
        for part in parts.projections
    ]
    _check(slots)
    seen = observe(model, candidates, example)
    attentions = plan_attentions(model, candidates, seen, plan, True, attention_names)
    if not keep_query_bias:
        warn_of_biases(model, attentions.found)
    for name, parts in attentions.found.items():
        quantize_attention_(name, model.get_submodule(name), parts, plan, product=True)
    record_(model, dict.fromkeys(attentions.found, "query-key product"), set(), seen.by)
    return model


@torch.no_grad()
def calibrate_(model: Model, batch: Any) -> Model:
    """Give every activation scale its start from one batch, in evaluation mode; build the optimizer afterwards.

    With several processes all take the first one's scales.

    Args:
        model: What `prepare_ofq_` returned.
        batch: What the model takes: a tensor, a tuple or list of arguments, or a mapping of keyword arguments.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: NaN or infinite values reach a quantizer; the message names the layer.
    """
    quantizers = [module for module in model.modules() if isinstance(module, ActivationQuantizer)]
    for quantizer in quantizers:
        quantizer.reset()
        quantizer.calibrating = True
    try:
        with evaluating(model):
            run_batch(model, batch)
    finally:
        for quantizer in quantizers:
            quantizer.calibrating = False
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


def _is_chosen(name: str, module: nn.Module) -> bool:
    return is_layer(name, module) or type(module) is nn.MultiheadAttention


def _adapters(model: nn.Module) -> dict[str, nn.Module]:
    """Layers that PEFT has put beside a layer of the model."""
    return {
        f"{name}.{inner}".lstrip("."): part
        for name, module in model.named_modules()
        if isinstance(getattr(module, "base_layer", None), nn.Module)
        for inner, part in module.named_modules()
        if is_layer(inner, part) and inner.partition(".")[0] != "base_layer"
    }


def _check(slots: list[Slot]) -> None:
    narrow = []
    for slot in slots:
        weight = check_plain(slot.name, slot.module, slot.attribute, finite=True)
        if 0 < weight.numel() == weight.shape[output_axis(slot.module)]:
            narrow.append(slot.name)
    if narrow:
        warnings.warn(
            f"{', '.join(narrow)} has one value per output: it always lies on a rounding threshold, and its size is "
            "lost. Leave it out of where",
            WeightsmithWarning,
            stacklevel=3,
        )


def _packed(name: str, module: nn.MultiheadAttention) -> Iterator[Slot]:
    """The weights of torch's attention, which is no composition of layers."""
    for attribute in ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight"):
        if module._parameters.get(attribute) is not None:
            yield Slot(name, module, attribute)
    if "weight" in module.out_proj._parameters:
        yield Slot(f"{name}.out_proj".lstrip("."), module.out_proj, "weight")


def _owners(model: nn.Module, slots: list[Slot]) -> dict[int, list[Slot]]:
    """Every place of the chosen weights, by the weight's id."""
    chosen = {id(slot.module._parameters[slot.attribute]): slot.name for slot in reversed(slots)}
    packed = {(id(slot.module), slot.attribute) for slot in slots}
    held_by = {key: held for key, held in owners(model).items() if key in chosen}
    for key, held in held_by.items():
        for slot in held:
            usual = slot.attribute == "weight" or (id(slot.module), slot.attribute) in packed
            if not usual or isinstance(slot.module, parametrize.ParametrizationList):
                raise UsageError(f"{chosen[key]} is tied to {slot.name}, which cannot be quantized")
    tied = {chosen[key]: shared for key, shared in held_by.items() if len(shared) > 1}
    for name, shared in tied.items():
        warnings.warn(
            f"{name} is tied: it is quantized once, for all {len(shared)} owners",
            WeightsmithWarning,
            stacklevel=3,
        )
    return held_by


def _input_quantizer(
    name: str, layer: nn.Module, plan: Plan, end: bool, after_activation: bool, *, pixels: bool
) -> ActivationQuantizer:
    bits = cast(int, plan.ends_bits if end else plan.activation_bits)
    if isinstance(layer, nn.Linear):
        axis = None if end else plan.token_axis
        shifts: tuple[int, ...] | None = (layer.in_features,)
    else:
        spatial = cast(Tensor, layer.weight).dim() - 2
        axis = None if plan.granularity == "tensor" else -(spatial + 1)
        shifts = () if pixels else None
    return activation_quantizer(f"the input of {name}", layer, bits, axis, False if after_activation else None, shifts)


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
