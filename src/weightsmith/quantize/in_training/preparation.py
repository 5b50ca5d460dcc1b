"""What `prepare_ofq_` has done to a model: told to the user, and told to a file, from which it is done again."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from weightsmith.core.errors import UsageError
from weightsmith.quantize.in_training.attention import QuantizedAttention, quantized_class
from weightsmith.quantize.in_training.attention_parts import Parts
from weightsmith.quantize.in_training.lsq import ActivationQuantizer
from weightsmith.quantize.in_training.weight_quantizer import WeightQuantizer
from weightsmith.quantize.inputs import quantize_input_

_RECORD = "_ofq_record"
_QUANTIZERS = tuple(f"{role}_quantizer" for role in ("input", "query", "key", "value", "softmax", "product"))
_TENSORS = ("product_weight", "product_shift", "query_bias", "logit_bias")
_NOT_WEIGHTS = ("embed", "position", "pos_", "relative", "token")


@dataclass(frozen=True, slots=True)
class OFQReport:
    """What `prepare_ofq_` has done.

    Attributes:
        attention: By name what became of every attention module: ``"query-key product"``, ``"inside"`` (query, key,
            value and softmax), or why only its linear layers are quantized.
        ends: Layers that got ``ends_bits``.
        ends_by: How they were found.
        kept: Matrices and tables that stay in floating point, and their share of all matrices, the largest first.
    """

    attention: dict[str, str]
    ends: tuple[str, ...]
    ends_by: str
    kept: dict[str, float]

    def __str__(self) -> str:
        """Word it, a line each."""
        lines = [f"attention {name}: {done}" for name, done in self.attention.items()]
        lines.append(f"first and last layers: {', '.join(self.ends) or 'none'}, by {self.ends_by}")
        lines += [f"in floating point: {name}, {share:.1%} of all matrices" for name, share in self.kept.items()]
        return "\n".join(lines)


def ofq_report(model: nn.Module) -> OFQReport:
    """Say what `prepare_ofq_` has done to a model, and what it has left in floating point.

    Args:
        model: What `prepare_ofq_` returned.

    Raises:
        UsageError: The model has not been prepared.
    """
    held = vars(model).get(_RECORD)
    if held is None:
        raise UsageError("the model has no record of a preparation: call prepare_ofq_ first, and pass the same model")
    return OFQReport(dict(held["attention"]), tuple(held["ends"]), held["by"], kept_in_float(model))


def record_(model: nn.Module, attention: dict[str, str], ends: set[str], by: str) -> None:
    """Remember for `ofq_report`; not part of the ``state_dict()``."""
    held = vars(model).get(_RECORD, {"attention": {}, "ends": []})
    held = {
        "attention": {**held["attention"], **attention},
        "ends": [*held["ends"], *sorted(ends - set(held["ends"]))],
        "by": by,
    }
    setattr(model, _RECORD, held)


def kept_in_float(model: nn.Module) -> dict[str, float]:
    """Names of the matrices that no quantizer has, with their share of the entries of all matrices."""
    quantized = {id(parameter) for parameter in _quantized(model)}
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if parameter.squeeze().dim() > 1}
    total = sum(sizes.values()) or 1
    kept = {name: sizes[name] / total for name in sizes if id(model.get_parameter(name)) not in quantized}
    return dict(sorted(kept.items(), key=lambda item: -item[1]))


def overlooked(model: nn.Module) -> dict[str, float]:
    """Of these the large ones that a user would expect to be quantized: neither embeddings nor tables of positions."""
    tables = {id(p) for module in model.modules() if isinstance(module, nn.Embedding) for p in module.parameters()}
    return {
        name: share
        for name, share in kept_in_float(model).items()
        if share >= 0.005 and id(model.get_parameter(name)) not in tables
        if not any(word in name.rpartition(".")[2] for word in _NOT_WEIGHTS)
    }


def _quantized(model: nn.Module) -> Iterator[nn.Parameter]:
    for module in model.modules():
        if isinstance(module, ActivationQuantizer | WeightQuantizer):
            yield from module.parameters()
        if isinstance(module, QuantizedAttention) and module.product is not None:
            for part in module.parts.projections[:2]:
                yield from module.get_submodule(part).parameters()
        for attribute in vars(module).get("_quantized_tensors", {}):
            yield cast(nn.Parameter, getattr(module, attribute))
        if parametrize.is_parametrized(module):
            for held in cast(nn.ModuleDict, module.parametrizations).values():
                if any(isinstance(inner, WeightQuantizer) for inner in cast(nn.ModuleList, held)):
                    yield cast(nn.Parameter, held.original)


def describe(model: nn.Module) -> dict[str, Any] | None:
    """What of a finished model is not in its tensors, for JSON; ``None``: nothing."""
    attention = {
        name: {
            "parts": asdict(module.parts),
            "quantizers": {role: _facts(getattr(module, role)) for role in _QUANTIZERS if getattr(module, role)},
            "tensors": {key: list(held.shape) for key in _TENSORS if (held := getattr(module, key)) is not None},
        }
        for name, module in model.named_modules()
        if isinstance(module, QuantizedAttention)
    }
    inputs = {
        name: _facts(module.input_quantizer)
        for name, module in model.named_modules()
        if not isinstance(module, QuantizedAttention)
        if isinstance(getattr(module, "input_quantizer", None), ActivationQuantizer)
    }
    return {"attention": attention, "inputs": inputs} if attention or inputs else None


@torch.no_grad()
def restore_(model: nn.Module, facts: dict[str, Any]) -> None:
    """Give a plain model the form of the finished one that was described; values come with the state dict.

    Args:
        model: As it was before `prepare_ofq_`; one that has the form already stays as it is.
        facts: What `describe` returned.

    Raises:
        UsageError: The model has another form.
    """
    present = describe(model)
    if present is not None:
        if _comparable(present) != _comparable(facts):
            raise UsageError("the model has been prepared in another way than the saved one: pass it unprepared")
        return
    names = dict(model.named_modules())
    missing = [name for name in [*facts["attention"], *facts["inputs"]] if name not in names]
    if missing:
        raise UsageError(f"the model has no {', '.join(missing)}, which the saved one has")
    for name, fact in facts["attention"].items():
        _restore_attention_(names[name], fact)
    for name, fact in facts["inputs"].items():
        quantize_input_(names[name], _quantizer(fact, names[name]))


def _restore_attention_(module: nn.Module, fact: dict[str, Any]) -> None:
    like = next(module.parameters())
    module.__class__ = quantized_class(cast(Any, type(module)))
    ours = cast(QuantizedAttention, module)
    lists = ("arguments", "checked", "gone")
    parts = {**fact["parts"], **{key: None if (held := fact["parts"][key]) is None else tuple(held) for key in lists}}
    ours.parts = Parts(**parts)
    ours.clear_()
    if ours.parts.gone:
        whole = ours.parts
        names = {"qkv": whole.v, "v": ""} if len(whole.gone) == 1 else dict(zip("qk", whole.gone, strict=True))
        ours.parts = Parts(**{**parts, **names, "gone": ()})
        ours.remove_projections_()
    for role, held in fact["quantizers"].items():
        setattr(ours, role, _quantizer(held, module))
    for key, shape in fact["tensors"].items():
        setattr(ours, key, nn.Parameter(like.new_zeros(shape)))


def _facts(quantizer: ActivationQuantizer) -> dict[str, Any]:
    shape = None if quantizer.before is None else list(quantizer.before.shape)
    return {
        "bits": quantizer.bits,
        "axis": quantizer.axis,
        "signed": quantizer.signed,
        "shifts": shape,
        "dtype": str(quantizer.scale.dtype).removeprefix("torch."),
        "name": quantizer.name,
    }


def _quantizer(fact: dict[str, Any], beside: nn.Module) -> ActivationQuantizer:
    device = next(beside.parameters()).device
    shifts = None if fact["shifts"] is None else tuple(fact["shifts"])
    dtype = getattr(torch, fact["dtype"])
    quantizer = ActivationQuantizer(
        fact["bits"], fact["axis"], signed=fact["signed"], shifts=shifts, dtype=dtype, device=device
    )
    quantizer.name = fact["name"]
    return quantizer


def _comparable(facts: Any) -> Any:
    """Without what calibration decides, and tuples as lists."""
    if isinstance(facts, dict):
        return {key: _comparable(value) for key, value in facts.items() if key not in ("signed", "shifts", "checked")}
    return [*facts] if isinstance(facts, tuple) else facts


def refuse_to_save(*_: Any, **__: Any) -> None:
    """Take the place of ``save_pretrained`` where plain transformers could not read what it writes.

    Raises:
        UsageError: Always.
    """
    raise UsageError(
        "transformers cannot read this model back: it has quantized activations or query-key products, which its class "
        "knows nothing of. save_quantized(model, folder) writes a folder that load_quantized reads"
    )
