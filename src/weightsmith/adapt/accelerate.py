"""``accelerate_peft_``: our forward and backward pass under an unchanged PEFT model."""

from torch import nn

from weightsmith.adapt.apply import Model
from weightsmith.core.errors import UsageError, require


def accelerate_peft_(model: Model) -> Model:
    """Let every MiSS layer of a PEFT model compute through the fused functions, in place.

    Outputs and gradients are the same to rounding, and so are saving, loading and merging, which stay PEFT's. The forms
    that PEFT calls ``"bat"`` keep ``x`` for the backward pass in place of two tensors of the weight's size.

    Args:
        model: What ``peft.get_peft_model`` or ``PeftModel.from_pretrained`` gave for a ``MissConfig``.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: No layer of it is a MiSS layer.
        MissingExtra: ``peft`` is not installed.
    """
    layer = require("peft.tuners.miss.layer", extra="hf", purpose="accelerate_peft_")
    found: list[nn.Module] = [module for module in model.modules() if isinstance(module, layer.MissLinear)]
    if not found:
        raise UsageError(f"model must be a PEFT model with MiSS layers, and this {type(model).__name__} has none")
    from weightsmith.adapt.under_peft import FusedMissLinear

    for module in found:
        if type(module) is layer.MissLinear:
            module.__class__ = FusedMissLinear
    return model
