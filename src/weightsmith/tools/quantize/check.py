"""What rounding has done to a model's outputs, and whether the folder that was written computes the same again."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.quantize.after_training.blocks import first_tensor, no_cache
from weightsmith.quantize.after_training.calibration import make_batches
from weightsmith.quantize.after_training.states import moved
from weightsmith.quantize.after_training.targets import choose_targets

_SAMPLES = 2
_TOKENS = 128
_PROMPT, _GENERATED = 16, 24


@dataclass(frozen=True, slots=True)
class LayerCheck:
    """One layer behind all rounded layers before it.

    Attributes:
        name: Of the layer.
        error: ``||after - before||^2 / ||before||^2`` of its output.
    """

    name: str
    error: float


@dataclass(frozen=True, slots=True)
class Check:
    """Outputs on a few samples.

    Attributes:
        error: ``||after - before||^2 / ||before||^2`` of the model's output.
        agreement: Share of positions whose largest logit is the same; ``None`` when the output is no logits.
        reloaded: Largest absolute difference between the outputs of the reloaded folder and of the model in memory.
        layers: The largest errors first.
        prompt: What was continued, ``None`` unless the model is a causal language model.
        text_before: The greedy continuation by the trained model.
        text_after: The same by the quantized one.
    """

    error: float
    agreement: float | None
    reloaded: float
    layers: tuple[LayerCheck, ...]
    prompt: str | None = None
    text_before: str | None = None
    text_after: str | None = None


@dataclass(frozen=True, slots=True)
class Seen:
    """What a model has computed."""

    output: Tensor
    is_logits: bool
    layers: Mapping[str, Tensor]
    tokens: Tensor | None


class Examples:
    """A few samples to run every model on.

    Args:
        inputs: Calibration data.
        tokenizer: Of a causal language model, else ``None``.
        device: Where models are run; ``None``: where they are.
    """

    def __init__(
        self, inputs: Sequence[Tensor] | Mapping[str, Tensor], tokenizer: Any, device: torch.device | None
    ) -> None:
        few: Any
        self.prompt: Tensor | None = None
        if isinstance(inputs, Mapping):
            few = {name: tensor[:_SAMPLES] for name, tensor in inputs.items()}
        else:
            few = [sample[:_TOKENS] for sample in inputs[:_SAMPLES]]
            self.prompt = inputs[0][: max(1, min(_PROMPT, len(inputs[0]) // 2))]
        self.few, self.tokenizer, self.device = few, tokenizer, device

    @torch.no_grad()
    def run(self, model: Any) -> Seen:
        """Compute outputs, those of the layers that are rounded by default, and a greedy continuation.

        Args:
            model: In evaluation mode; left as it was.
        """
        seen: dict[str, Tensor] = {}

        def keep(name: str, output: Any) -> None:
            seen[name] = first_tensor(output).float().cpu()

        hooks = [
            model.get_submodule(name).register_forward_hook(lambda _, __, output, name=name: keep(name, output))
            for name in {target.owner: None for target in choose_targets(model, None).values()}
        ]
        with moved(model, self.device):
            place: nn.Parameter = next(model.parameters())
            (batch,) = make_batches(self.few, _SAMPLES, place.device, place.dtype)
            try:
                with no_cache(model):
                    output = batch.run(model)
            finally:
                for hook in hooks:
                    hook.remove()
            tokens = None
            if self.tokenizer is not None and self.prompt is not None:
                ids = self.prompt[None].to(place.device)
                options = {
                    "max_new_tokens": _GENERATED,
                    "do_sample": False,
                    "pad_token_id": self.tokenizer.pad_token_id,
                }
                tokens = model.generate(ids, attention_mask=torch.ones_like(ids), **options)[0, ids.shape[1] :].cpu()
        return Seen(first_tensor(output).float().cpu(), "logits" in output, seen, tokens)

    def compare(self, before: Seen, after: Seen, reloaded: Seen) -> Check:
        """Put the three together."""
        layers = [LayerCheck(name, _error(after.layers[name], output)) for name, output in before.layers.items()]
        agreement = None
        if before.is_logits:
            agreement = (before.output.argmax(-1) == after.output.argmax(-1)).float().mean().item()
        return Check(
            _error(after.output, before.output),
            agreement,
            (reloaded.output - after.output).abs().max().item(),
            tuple(sorted(layers, key=lambda layer: -layer.error)),
            *(self._text(tokens) for tokens in (self.prompt, before.tokens, after.tokens)),
        )

    def _text(self, tokens: Tensor | None) -> str | None:
        return None if tokens is None or self.tokenizer is None else self.tokenizer.decode(tokens)


def _error(got: Tensor, wanted: Tensor) -> float:
    size = wanted.square().sum().clamp_min(torch.finfo(torch.float32).tiny)
    return ((got - wanted).square().sum() / size).item()
