"""The models that every technique is tried on: ``name: (build, inputs)``."""

import importlib.util
from collections.abc import Callable

import torch
from torch import Tensor, nn

from weightsmith.core.errors import require, unknown
from weightsmith.lab.models import build_model

NO_MODEL = "-"
"""Stands for a model in checks that need none."""


class Tied(nn.Module):
    """A language model in miniature whose head shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(B, T)`` to logits ``(B, T, 11)``."""
        logits: Tensor = self.head(torch.relu(self.body(self.embedding(x))))
        return logits


class EmptyShard(nn.Module):
    """Two layers side by side, of which one has no rows: so a shard looks on a rank that got nothing of a layer."""

    def __init__(self) -> None:
        super().__init__()
        self.some, self.none = nn.Linear(6, 4), nn.Linear(6, 4)
        self.none.weight = nn.Parameter(self.none.weight.detach()[:0].clone())
        self.none.bias = nn.Parameter(torch.zeros(0))
        self.none.out_features = 0

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, 6)`` to ``(B, 4)``."""
        return torch.cat([self.some(x), self.none(x)], dim=-1)


class Logits(nn.Module):
    """A model of transformers, reduced to its logits."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Map tokens ``(B, T)`` to logits ``(B, T, V)``."""
        logits: Tensor = self.model(input_ids=x).logits
        return logits


def _frozen() -> nn.Module:
    first = nn.Linear(6, 8).requires_grad_(False)
    return nn.Sequential(first, nn.ReLU(), nn.Linear(8, 3))


def _llama() -> nn.Module:
    transformers = require("transformers", extra="hf", purpose="the model llama")
    config = transformers.LlamaConfig(
        vocab_size=17,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        use_cache=False,
    )
    return Logits(transformers.LlamaForCausalLM(config))


def _image(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def _tokens(vocabulary: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(vocabulary, (4, 7), generator=torch.Generator().manual_seed(1))


_Made = tuple[Callable[[], nn.Module], Callable[[], Tensor]]

MODELS: dict[str, _Made] = {
    "linear": (lambda: nn.Linear(6, 3), _image(5, 6)),
    "conv-bn": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        _image(4, 3, 8, 8),
    ),
    "conv-transpose": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2), nn.GroupNorm(2, 6)), _image(3, 4, 5, 5)),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)),
        _image(3, 8, 5, 5),
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 3)), _tokens(11)),
    "tied": (Tied, _tokens(11)),
    "frozen": (_frozen, _image(5, 6)),
    "vit": (lambda: build_model("vit_tiny", channels=1, size=8, classes=10), _image(2, 1, 8, 8)),
    "llama": (_llama, _tokens(17)),
}
"""Architectures that differ in what a technique may trip over. ``llama`` needs transformers."""

EMPTY_SHARD: _Made = (EmptyShard, _image(5, 6))


def available() -> tuple[str, ...]:
    """Names of the models that can be built with what is installed."""
    return tuple(name for name in MODELS if name != "llama" or importlib.util.find_spec("transformers"))


def build(name: str, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """Build a model and inputs for it; the same at every call.

    Raises:
        UsageError: There is no model of this name.
        MissingExtra: It needs a package that is not installed.
    """
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return construct(MODELS[name], dtype)


def construct(made: _Made, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, Tensor]:
    """Build from a seed of its own."""
    make, inputs = made
    torch.manual_seed(0)
    model, x = make().to(dtype), inputs()
    return model, x.to(dtype) if x.is_floating_point() else x
