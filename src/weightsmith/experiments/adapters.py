"""LoRA on whatever network a task has."""

from typing import Any, cast

from torch import nn

from weightsmith.core.errors import UsageError, require


def with_lora(model: nn.Module, rank: int) -> nn.Module:
    """Put LoRA of a rank on every linear layer but the last, which is the head.

    Raises:
        UsageError: There is no such layer.
    """
    peft: Any = require("peft", extra="hf", purpose="LoRA")
    layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][:-1]
    if not layers:
        raise UsageError("rank must be 0 for a model without linear layers beside its head")
    adapter = peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers)
    return cast(nn.Module, peft.get_peft_model(model, adapter))
