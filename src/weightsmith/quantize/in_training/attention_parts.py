"""Which modules are attention, and where things are in them.

Known are modules with a fused projection (timm: ``qkv``, ``proj``) and with separate ones (Hugging Face: ``q_proj`` ...
or ``query`` ...); a map of names tells of others.
"""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import cast

from torch import nn

from weightsmith.core.errors import UsageError, near

_QKV = (("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("to_q", "to_k", "to_v"), ("q", "k", "v"))
_OUT = ("o_proj", "out_proj", "proj", "to_out")
_HEADS = ("num_heads", "num_attention_heads", "heads")
_ROLES = ("qkv", "q", "k", "v", "out", "heads")
_BETWEEN = {
    "query and key are normalized": ("q_norm", "k_norm", "query_norm", "key_norm", "q_layernorm", "k_layernorm"),
    "a rotary embedding turns query and key": ("rotary_emb", "rotary_embedding", "rope", "rotary"),
    "its output is normalized before the projection": ("norm",),
    "its logits are cosines": ("logit_scale", "continuous_position_bias_mlp", "cpb_mlp"),
}
_ROTARY_ARGUMENTS = ("position_embeddings", "rope", "freqs_cis", "rotary_pos_emb")


class NotUnderstood(UsageError):
    """A module looks like attention and does not fit together."""


@dataclass(frozen=True, slots=True)
class Parts:
    """Where things are in an attention module: names of attributes, and the number of heads.

    Attributes:
        qkv: The fused projection, ``""`` when there are three.
        q: Query projection; likewise the next two.
        k: Key projection.
        v: Value projection.
        out: Output projection within the module, ``""`` when it is elsewhere.
        heads: Number of query heads.
        width: Of all query heads together.
        arguments: Names of what the original ``forward`` takes.
        returns: Length of the tuple that it returns, the output and the attention weights; 0: the output alone.
        checked: Kinds of optional argument with which the converted module has been compared; ``None``: not looked at.
        gone: Projections that a finished module no longer has.
    """

    qkv: str = ""
    q: str = ""
    k: str = ""
    v: str = ""
    out: str = ""
    heads: int = 1
    width: int = 1
    arguments: tuple[str, ...] = ()
    returns: int = 0
    checked: tuple[str, ...] | None = None
    gone: tuple[str, ...] = ()

    @property
    def projections(self) -> tuple[str, ...]:
        """Names of the modules that make query, key and value."""
        return (self.qkv,) if self.qkv else (self.q, self.k, self.v)


def find_parts(name: str, module: nn.Module, names: Mapping[str, str] | None = None) -> Parts | None:
    """Recognize an attention module.

    Args:
        name: Its qualified name, for messages.
        module: Any module.
        names: Attribute names by role: ``qkv``, or ``q``, ``k`` and ``v``; ``out``; ``heads``.

    Returns:
        Its parts, or ``None`` when it is none.

    Raises:
        UsageError: ``names`` has an unknown role, the heads do not divide the width, or their number is not known.
    """
    names = names or {}
    for role in names:
        if role not in _ROLES:
            raise UsageError(f"attention_names has no role {role!r}; {near(role, _ROLES, most=6)}")
    fused = names.get("qkv") or ("" if "q" in names else "qkv")
    triple = tuple(names[role] for role in "qkv") if {"q", "k", "v"} <= names.keys() else ()
    out = next((found for found in (names.get("out"), *_OUT) if found and hasattr(module, found)), "")
    if fused and isinstance(getattr(module, fused, None), nn.Linear):
        parts = Parts(qkv=fused, out=out)
    else:
        separate = next((three for three in (triple, *_QKV) if three and _all_linear(module, three)), None)
        if separate is None:
            return None
        q, k, v = separate
        parts = Parts(q=q, k=k, v=v, out=out)
    keys = [key for key in (names.get("heads"), *_HEADS) if key]
    holders = (module, getattr(module, "config", None))
    heads = next((getattr(holder, key) for holder in holders for key in keys if hasattr(holder, key)), None)
    if not isinstance(heads, int):
        raise NotUnderstood(
            f"{name or 'it'} looks like attention and does not tell its number of heads: pass "
            'attention_names={"heads": "..."} with the name of the attribute, or leave it out of where'
        )
    first = cast(nn.Linear, getattr(module, parts.projections[0]))
    width = first.out_features // (3 if parts.qkv else 1)
    if heads < 1 or width % heads:
        raise NotUnderstood(f"{name or 'it'} has {heads} heads, which do not divide its width {width}")
    if parts.qkv and first.out_features != 3 * width:
        return None
    return replace(parts, heads=heads, width=width, arguments=_arguments(module))


def obstacle(module: nn.Module) -> str | None:
    """Why the inside of an attention module cannot be quantized, or ``None``: something acts on query and key."""
    for reason, attributes in _BETWEEN.items():
        if any(not isinstance(getattr(module, name, None), nn.Identity | None) for name in attributes):
            return reason
    if set(_ROTARY_ARGUMENTS) & set(_arguments(module)):
        return "a rotary embedding turns query and key"
    return None


def _arguments(module: nn.Module) -> tuple[str, ...]:
    taken = inspect.signature(module.forward).parameters.values()
    return tuple(a.name for a in taken if a.kind in (a.POSITIONAL_ONLY, a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY))


def _all_linear(module: nn.Module, names: tuple[str, ...]) -> bool:
    return all(isinstance(getattr(module, name, None), nn.Linear) for name in names)
