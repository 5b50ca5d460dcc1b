"""The end of quantization-aware training: what integers the weights have become, and a model of plain weights.

A grid must come from the latents: measuring the scale of weights that are on a grid already gives another one.
"""

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.core.fold import fold_
from weightsmith.quantize.grid import QuantizedWeight, attach_quantized_
from weightsmith.quantize.in_training.attention import QuantizedAttention
from weightsmith.quantize.in_training.preparation import describe, refuse_to_save
from weightsmith.quantize.in_training.weight_quantizer import WeightQuantizer, sites

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def integer_weights(model: nn.Module) -> dict[str, QuantizedWeight]:
    """Read the integers that the weights have become, with the scales of this moment.

    A fused projection of which only the value rows are quantized gives those rows; the query-key product is
    ``<attention>.product``, ``(heads * C, C)``. Ask before the model is folded.

    Args:
        model: What `prepare_ofq_` returned.

    Returns:
        By parameter name, in the model's order; ``dequantize`` gives the values that the network uses, to the last bit.
    """
    return {site.name: _integers(site.quantizer, site.latent()) for site in sites(model)}


def finish_ofq_(model: Model) -> Model:
    """End quantization-aware training: plain weights with grid values, which ``save_quantized`` knows the integers of.

    Query and key weights give way to their quantized product, as ``product_weight`` of the attention; a fused
    projection is left with its value rows. Activation quantizers stay. A transformers model with either is no longer
    what its class computes: its ``save_pretrained`` refuses, and ``save_quantized`` writes it.

    Args:
        model: What `prepare_ofq_` returned, trained.

    Returns:
        ``model`` itself; its outputs have not changed.

    Raises:
        UsageError: A weight is not finite.
    """
    _check_finite(model)
    weights = integer_weights(model)
    for module in model.modules():
        if isinstance(module, QuantizedAttention):
            module.finish_()
    fold_(model)
    for name, quantized in weights.items():
        owner, _, attribute = name.rpartition(".")
        attach_quantized_(
            model.get_submodule(owner), quantized, "product_weight" if attribute == "product" else attribute
        )
    for module in model.modules():
        if hasattr(type(module), "save_pretrained") and describe(module) is not None:
            cast(Any, module).save_pretrained = refuse_to_save
    return model


def _check_finite(model: nn.Module) -> None:
    """Raise `UsageError` that names the quantized weights which hold NaN or infinite values."""
    broken = [site.name for site in sites(model) if not site.latent().isfinite().all()]
    if broken:
        raise UsageError(f"{', '.join(broken)} holds NaN or infinite values: training has diverged")


def _integers(quantizer: WeightQuantizer, rows: Tensor) -> QuantizedWeight:
    step = quantizer.step(rows).movedim(quantizer.axis, 0).reshape(-1, 1)
    return QuantizedWeight(
        codes=quantizer.codes(rows),
        scale=step.clone(),
        zero_point=torch.zeros_like(step, dtype=torch.int8),
        bits=quantizer.bits,
        symmetric=True,
        granularity="channel",
        axis=quantizer.axis,
        offset=quantizer.offset,
    )
