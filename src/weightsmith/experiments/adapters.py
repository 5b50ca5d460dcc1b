"""LoRA on whatever network a task has."""

from typing import Any, cast

from torch import nn

from weightsmith.core.errors import UsageError, require


def layers_before_head(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer by name but the last, which is the head.

    Raises:
        UsageError: There is no such layer.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    if len(layers) < 2:
        raise UsageError("an adapter needs a model with linear layers beside its head: try --model mlp or vit_tiny")
    return dict(list(layers.items())[:-1])


def with_lora(model: nn.Module, rank: int, *, alpha: int | None = None, start: str | bool = True) -> nn.Module:
    """Put LoRA as PEFT makes it on every linear layer but the head.

    Args:
        model: Changed in place.
        rank: Of the adapters.
        alpha: Their scaling is alpha / rank; ``None``: twice the rank.
        start: How their weights begin, PEFT's ``init_lora_weights``.

    Raises:
        UsageError: There is no linear layer beside the head.
    """
    peft: Any = require("peft", extra="hf", purpose="LoRA")
    adapter = peft.LoraConfig(
        r=rank, lora_alpha=alpha or 2 * rank, target_modules=list(layers_before_head(model)), init_lora_weights=start
    )
    return cast(nn.Module, peft.get_peft_model(model, adapter))
