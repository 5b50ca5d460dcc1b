"""What an attention module computes whose inner tensors are quantized.

An attention module keeps its class (by a subclass of it), its sub-modules and its weights; only its ``forward`` is
ours, because the usual one leaves no room between softmax and the product with the values.
"""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.core.errors import UsageError
from weightsmith.quantize.in_training.attention_parts import Parts
from weightsmith.quantize.in_training.lsq import ActivationQuantizer
from weightsmith.quantize.in_training.qkr import QueryKeyProduct, query_key_bias
from weightsmith.quantize.in_training.weight_quantizer import Site

DROPOUTS = ("attn_drop", "attn_dropout", "attention_dropout", "dropout")
SOURCES = ("encoder_hidden_states", "key_value_states", "context")
CACHES = ("past_key_values", "past_key_value", "layer_past")
MASKS = ("attention_mask", "attn_mask", "mask")
_HARMLESS = ("output_attentions", "use_cache")


class QuantizedAttention(nn.Module):
    """What an attention module becomes a subclass of, see ``prepare_ofq_``."""

    parts: Parts
    input_quantizer: ActivationQuantizer | None
    query_quantizer: ActivationQuantizer | None
    key_quantizer: ActivationQuantizer | None
    value_quantizer: ActivationQuantizer | None
    softmax_quantizer: ActivationQuantizer | None
    product: QueryKeyProduct | None
    product_weight: nn.Parameter | None
    product_quantizer: ActivationQuantizer | None
    product_shift: nn.Parameter | None
    query_bias: nn.Parameter | None
    logit_bias: nn.Parameter | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Take what the original takes, hidden states ``(B, T, C)`` first, and return what it returns."""
        given = bind(self.parts.arguments, args, kwargs)
        self._check(given)
        x = given[self.parts.arguments[0]]
        x = _apply(self.input_quantizer, x)
        reparameterized = self.product is not None or self.product_weight is not None
        logits = self._product_logits(x) if reparameterized else self._plain_logits(x)
        logits = _masked(logits, self._position_bias(), given, causal=self._is_causal(given))
        full = torch.promote_types(logits.dtype, torch.float32)
        weights = _apply(self.softmax_quantizer, logits.softmax(-1, dtype=full).to(x.dtype))
        weights = self._dropped(weights)
        if given.get("head_mask") is not None:
            weights = weights * given["head_mask"]
        v = _apply(self.value_quantizer, self._project(x, 2))
        out = (weights @ self._split(v)).transpose(1, 2).flatten(2)
        if self.parts.out:
            out = getattr(self, self.parts.out)(out)
            out = getattr(self, "proj_drop", nn.Identity())(out)
        return (out, weights)[: self.parts.returns] if self.parts.returns else out

    def _check(self, given: Mapping[str, Any]) -> None:
        refused = next((key for key in (*SOURCES, *CACHES) if given.get(key) is not None), None)
        if refused is not None:
            raise UsageError(
                f"quantized attention is self-attention without a cache: {refused} must be None (use_cache=False in a "
                "transformers config)"
            )
        x = given[self.parts.arguments[0]]
        if x.dim() != 3:
            raise UsageError(f"quantized attention takes (batch, tokens, channels), got {tuple(x.shape)}")
        if self.parts.checked is None:
            return
        for name in self.parts.arguments[1:]:
            unknown = [kind for kind in given_kinds({name: given.get(name)}) if kind not in self.parts.checked]
            if unknown:
                raise UsageError(
                    f"quantized attention has not been compared with the original for {unknown[0]}: prepare the model "
                    "with an example= that has it"
                )

    def _plain_logits(self, x: Tensor) -> Tensor:
        q = self._split(_apply(self.query_quantizer, self._project(x, 0)))
        k = self._split(_apply(self.key_quantizer, self._project(x, 1)))
        return q @ k.transpose(-1, -2) * self._scale()

    def _product_logits(self, x: Tensor) -> Tensor:
        product, bias = self.product_weight, cast(Tensor | None, self.logit_bias)
        if self.product is not None:
            wq, wk = self.query_key_weights()
            product = self.product(wq, wk).to(wq.dtype)
            bias = None if self.query_bias is None else query_key_bias(self.query_bias, wk, self.parts.heads)
        t = F.linear(x, cast(Tensor, product), self.product_shift).unflatten(-1, (self.parts.heads, -1))  # (B, T, H, C)
        t = _apply(self.product_quantizer, t.flatten(1, 2)).view_as(t).to(x.dtype)
        logits = x[:, None] @ t.permute(0, 2, 3, 1)
        if bias is not None:
            logits = logits + F.linear(x, bias).transpose(1, 2)[:, :, None]
        return logits * self._scale()

    def query_key_weights(self) -> tuple[Tensor, Tensor]:
        """Latent query and key weights."""
        if self.parts.qkv:
            layer = getattr(self, self.parts.qkv)
            original = layer.parametrizations.weight.original if hasattr(layer, "parametrizations") else layer.weight
            q, k, _ = original.chunk(3)
            return q, k
        return getattr(self, self.parts.q).weight, getattr(self, self.parts.k).weight

    def clear_(self) -> None:
        """Take every quantizer off."""
        for module in ("input", "query", "key", "value", "softmax", "product"):
            setattr(self, f"{module}_quantizer", None)
        self.product = None
        for parameter in ("product_weight", "product_shift", "query_bias", "logit_bias"):
            self.register_parameter(parameter, None)

    @torch.no_grad()
    def finish_(self) -> None:
        """Put the quantized product in the place of the weights that it is made from; for inference alone."""
        if self.product is None:
            return
        wq, wk = self.query_key_weights()
        self.product_weight = nn.Parameter(self.product(wq, wk).to(wq.dtype))
        if self.query_bias is not None:
            self.logit_bias = nn.Parameter(query_key_bias(self.query_bias, wk, self.parts.heads))
        self.product, self.query_bias = None, None
        self.remove_projections_()

    @torch.no_grad()
    def remove_projections_(self) -> None:
        """Remove the projections of query and key; the rows of the value stay of a fused one."""
        gone = self.parts.projections[:2]
        if self.parts.qkv:
            fused = getattr(self, self.parts.qkv)
            value = nn.Linear(fused.in_features, fused.out_features // 3, bias=fused.bias is not None)
            value.weight = nn.Parameter(fused.weight.chunk(3)[2].clone())
            if fused.bias is not None:
                value.bias = nn.Parameter(fused.bias.chunk(3)[2].clone())
            setattr(self, self.parts.qkv, value)
        else:
            for name in gone:
                delattr(self, name)
        self.parts = replace(self.parts, qkv="", q="", k="", v=self.parts.qkv or self.parts.v, gone=gone)

    def query_key_sites(self, prefix: str) -> list[Site]:
        """The quantized product, if there is one, as a place that holds codes."""
        if self.product is None:
            return []
        product = self.product
        return [Site(f"{prefix}product", product.quantizer, lambda: product.latent(*self.query_key_weights()), None)]

    def _project(self, x: Tensor, role: int) -> Tensor:
        if not self.parts.qkv:
            layer = getattr(self, self.parts.projections[role])
            return F.linear(x, layer.weight, layer.bias)
        layer = getattr(self, self.parts.qkv)
        bias = None if layer.bias is None else layer.bias.chunk(3)[role]
        return F.linear(x, layer.weight.chunk(3)[role], bias)

    def _split(self, y: Tensor) -> Tensor:
        width = self._head_width()
        y = y.unflatten(-1, (-1, width)).transpose(1, 2)
        return y if y.shape[1] == self.parts.heads else y.repeat_interleave(self.parts.heads // y.shape[1], 1)

    def _is_causal(self, given: Mapping[str, Any]) -> bool:
        if given.get("is_causal") is not None:
            return bool(given["is_causal"])
        if any(given.get(key) is not None for key in MASKS):
            return False
        # transformers: its kernels hide later tokens by themselves when there is no mask, plain operations never do
        kernel = getattr(getattr(self, "config", None), "_attn_implementation", None)
        return kernel not in (None, "eager") and getattr(self, "is_causal", False) is True

    def _head_width(self) -> int:
        return self.parts.width // self.parts.heads

    def _scale(self) -> float:
        given = (getattr(self, name, None) for name in ("scale", "scaling"))
        return next((scale for scale in given if isinstance(scale, float)), self._head_width() ** -0.5)

    def _position_bias(self) -> Tensor | None:
        held: Any = self
        if hasattr(self, "_get_rel_pos_bias"):  # timm's Swin
            bias: Tensor | None = held._get_rel_pos_bias()
            return bias
        if isinstance(getattr(self, "relative_position_bias", None), nn.Module):
            bias = held.relative_position_bias()
            return bias
        if hasattr(self, "relative_position_bias_table"):
            table, index = held.relative_position_bias_table, held.relative_position_index
            tokens = int(index.numel() ** 0.5)
            bias = table[index.view(-1)].view(tokens, tokens, -1).permute(2, 0, 1)[None]
            return bias
        return None

    def _dropped(self, weights: Tensor) -> Tensor:
        for name in DROPOUTS:
            dropout = getattr(self, name, None)
            if isinstance(dropout, nn.Module):
                dropped: Tensor = dropout(weights)
                return dropped
            if isinstance(dropout, float):
                return F.dropout(weights, dropout, self.training)
        return weights


@functools.cache
def quantized_class(original: Any) -> Any:
    """The subclass of an attention class whose ``forward`` is ``QuantizedAttention``'s."""
    return type(original.__name__, (QuantizedAttention, original), {"__module__": original.__module__})


def _apply(quantizer: ActivationQuantizer | None, x: Tensor) -> Tensor:
    return x if quantizer is None else quantizer(x)


def _masked(logits: Tensor, bias: Tensor | None, given: Mapping[str, Any], *, causal: bool) -> Tensor:
    if bias is not None:
        logits = logits + bias
    mask = next((given[key] for key in MASKS if given.get(key) is not None), None)
    if mask is not None:
        if mask.dim() == 3:  # (windows, T, T): the same for every image of the batch
            mask = mask.repeat(len(logits) // len(mask), 1, 1)[:, None]
        if mask.dim() == 2 and mask.shape != logits.shape[-2:]:
            raise UsageError(f"a mask must be (T, T), (windows, T, T) or (B, 1, T, T), got {tuple(mask.shape)}")
        logits = _without(logits, ~mask) if mask.dtype == torch.bool else logits + mask
    if causal:
        logits = _without(logits, torch.ones(logits.shape[-2:], dtype=torch.bool, device=logits.device).triu(1))
    return logits


def _without(logits: Tensor, hidden: Tensor) -> Tensor:
    return logits.masked_fill(hidden, torch.finfo(logits.dtype).min)


def bind(arguments: tuple[str, ...], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Name the arguments of a call; cheaper than ``inspect``, and ``torch.compile`` follows it."""
    return {**dict(zip(arguments, args, strict=False)), **kwargs}


def given_kinds(given: Mapping[str, Any]) -> list[str]:
    """Word what a call is given on top of its hidden states: name, and for tensors kind and dimensions."""
    return [
        f"{name} ({'bool' if value.dtype == torch.bool else 'number'}, {value.dim()}-d)"
        if isinstance(value, Tensor)
        else name
        for name, value in given.items()
        if value is not None and value is not False and name not in _HARMLESS
    ]
