"""How many labels a model predicts, on batches in any of the usual forms."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.core.modes import evaluating
from weightsmith.core.outputs import call, logits_of

_IGNORED = -100


@torch.no_grad()
def prediction_accuracy(model: nn.Module, batches: Iterable[Any], *, shift: bool | None = None) -> float:
    """Percent of the labels that a model predicts.

    Args:
        model: Returns logits ``(B, C)`` or ``(B, T, C)``; is put into evaluation mode for the call.
        batches: Mappings with ``labels``, or pairs of inputs and labels; labels of -100 do not count. Tensors are moved
            to the model's device.
        shift: Label ``t`` is predicted at ``t - 1``, as in causal language models; ``None``: if the model is one, by
            its class.

    Raises:
        UsageError: There is no label, or logits and labels do not fit.
    """
    device = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    shifted = _is_causal(model) if shift is None else shift
    decoder = {"decoder_input_ids", "decoder_inputs_embeds"}
    virtual = _virtual_tokens(model)
    right = count = 0
    with evaluating(model):
        for batch in batches:
            inputs, labels = _divided(batch, device)
            if _decodes(model) and isinstance(inputs, dict) and labels.dim() == 2 and not decoder & inputs.keys():
                inputs["labels"] = labels  # from which an encoder-decoder makes what its decoder reads
            found = logits_of(call(model, inputs)).argmax(-1)
            if virtual and found.dim() == labels.dim() == 2 and found.shape[1] == labels.shape[1] + virtual:
                found = found[:, virtual:]  # prompt tuning puts vectors before the tokens, and they have no labels
            if shifted:
                found, labels = found[..., :-1], labels[..., 1:]
            if found.shape != labels.shape:
                raise UsageError(f"predictions are {tuple(found.shape)} and labels {tuple(labels.shape)}")
            counted = labels != _IGNORED
            right += int((found == labels)[counted].sum())
            count += int(counted.sum())
    if not count:
        raise UsageError("the held-out set has no labels: give batches that can be read more than once, such as a list")
    return 100.0 * right / count


def _divided(batch: Any, device: torch.device) -> tuple[Any, Tensor]:
    if isinstance(batch, Mapping):
        if "labels" not in batch:
            raise UsageError(f"a batch must hold labels, got {', '.join(map(str, batch))}")
        moved = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}
        labels = moved.pop("labels")
        if not isinstance(labels, Tensor):
            raise UsageError(
                f"labels of a batch must be a tensor, got {type(labels).__name__}: give batches, not rows, for example "
                "DataLoader(rows, batch_size=8, collate_fn=...)"
            )
        ids = moved.get("input_ids")
        if isinstance(ids, Tensor) and ids.dim() < 2:
            raise UsageError(
                f"input_ids of a batch must be (B, T), got {tuple(ids.shape)}: give batches, not rows, for example "
                "DataLoader(rows, batch_size=8)"
            )
        return moved, labels
    if isinstance(batch, tuple | list) and len(batch) == 2:
        inputs, labels = batch
        if not isinstance(labels, Tensor):
            raise UsageError(f"labels of a batch must be a tensor, got {type(labels).__name__}")
        if isinstance(inputs, Mapping):
            inputs = {key: value.to(device) if isinstance(value, Tensor) else value for key, value in inputs.items()}
        return inputs.to(device) if isinstance(inputs, Tensor) else inputs, labels.to(device)
    raise UsageError(f"a batch must be a mapping with labels, or inputs and labels, got {type(batch).__name__}")


def _is_causal(model: nn.Module) -> bool:
    return type(_inner(model)).__name__.endswith(("ForCausalLM", "LMHeadModel"))


def _decodes(model: nn.Module) -> bool:
    return bool(getattr(getattr(_inner(model), "config", None), "is_encoder_decoder", False))


def _virtual_tokens(model: nn.Module) -> int:
    """How many vectors the active prompt of a PEFT model puts before its inputs."""
    base: Any = model
    while inner := next((key for key in ("_orig_mod", "module") if hasattr(base, key)), None):
        base = getattr(base, inner)
    configs, active = getattr(base, "peft_config", None), getattr(base, "active_adapter", None)
    config = configs.get(active) if isinstance(configs, dict) and isinstance(active, str) else None
    return int(getattr(config, "num_virtual_tokens", None) or 0)


def _inner(model: nn.Module) -> Any:
    base: Any = model
    while inner := next((key for key in ("_orig_mod", "module", "get_base_model") if hasattr(base, key)), None):
        base = getattr(base, inner)() if inner == "get_base_model" else getattr(base, inner)
    return base
