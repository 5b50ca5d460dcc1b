"""Decide which attention modules are converted: those that look like attention and compute the same when converted."""

import warnings
from collections.abc import Iterable, Mapping
from typing import NamedTuple

from torch import Tensor, nn

from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.quantize.in_training.attention_parts import NotUnderstood, Parts, find_parts, obstacle
from weightsmith.quantize.in_training.convert import faithful_parts
from weightsmith.quantize.in_training.observe import Observed
from weightsmith.quantize.in_training.plan import Plan


class Attentions(NamedTuple):
    """Attention modules that are converted, and why others are not."""

    found: dict[str, Parts]
    refused: dict[str, str]


def find_candidates(
    model: nn.Module, layers: Mapping[str, nn.Module], names: Mapping[str, str] | None, *, strict: bool
) -> dict[str, Parts | str]:
    """Modules that look like attention and whose projections are all chosen; a reason in the place of unknown parts."""
    chosen = {id(layer) for layer in layers.values()}
    found: dict[str, Parts | str] = {}
    for name, module in model.named_modules():
        try:
            parts = find_parts(name, module, names)
        except NotUnderstood as error:
            if strict:
                raise
            found[name] = str(error)
            continue
        if parts is not None and all(id(getattr(module, part)) in chosen for part in parts.projections):
            found[name] = parts
    return found


def plan_attentions(
    model: nn.Module,
    candidates: Mapping[str, Parts | str],
    seen: Observed,
    plan: Plan,
    qk_reparam: bool | str,
    names: Mapping[str, str] | None,
) -> Attentions:
    """Compare every candidate with what it would become; refuse, or say what is left in floating point.

    Raises:
        UsageError: ``qk_reparam=True`` is not possible somewhere.
    """
    decided = Attentions({}, {})
    for name, parts in candidates.items():
        module = model.get_submodule(name)
        outcome = parts if isinstance(parts, str) else obstacle(module) or parts
        if isinstance(outcome, Parts):
            if seen.by_run and name not in seen.calls:
                outcome = f"{seen.by} does not reach it"
            else:
                calls = seen.calls.get(name, [])
                quantized_inputs = plan.activation_bits is not None
                outcome = faithful_parts(
                    module, outcome, calls, product=bool(qk_reparam), quantized_inputs=quantized_inputs
                )
        if isinstance(outcome, Parts):
            decided.found[name] = outcome
        else:
            decided.refused[name] = outcome
    if names and not candidates:
        raise UsageError(f"attention_names={dict(names)} fits no module of the model whose projections are chosen")
    if not decided.refused:
        return decided
    name, reason = next(iter(decided.refused.items()))
    if qk_reparam is True:
        raise UsageError(
            f"qk_reparam=True is not possible in {name or type(model).__name__}: {reason}. Pass "
            'qk_reparam="auto" or False to quantize the weights of query and key there, or leave it out of where'
        )
    if plan.activation_bits is not None or qk_reparam:
        others = dict.fromkeys(decided.refused.values())
        warnings.warn(
            f"the inside of {some(decided.refused)} stays in floating point ({'; '.join(others)}); only the linear "
            "layers there are quantized",
            WeightsmithWarning,
            stacklevel=3,
        )
    return decided


def warn_of_biases(model: nn.Module, attentions: Mapping[str, Parts]) -> None:
    """Name the attention modules whose nonzero query and key biases are dropped."""
    lost = []
    for name, parts in attentions.items():
        layers = [model.get_submodule(name).get_submodule(part) for part in parts.projections]
        biases = [layer.bias for layer in (layers if parts.qkv else layers[:2]) if isinstance(layer.bias, Tensor)]
        if any(bias[: 2 * len(bias) // 3].any() if parts.qkv else bias.any() for bias in biases):
            lost.append(name or "the model")
    if lost:
        warnings.warn(
            f"the biases of query and key of {', '.join(lost)} are dropped; keep_query_bias=True keeps what they "
            "contribute",
            WeightsmithWarning,
            stacklevel=3,
        )


def some(names: Iterable[str], most: int = 4) -> str:
    """The first few names, and how many more there are."""
    held = [name or "the model" for name in names]
    return ", ".join(held[:most]) + (f" and {len(held) - most} more" if len(held) > most else "")
