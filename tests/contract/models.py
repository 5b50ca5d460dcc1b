"""The models that every technique must get on with: name -> (build, inputs)."""

from collections.abc import Callable

import torch
from torch import nn

from weightsmith.lab.models import build_model


class Tied(nn.Module):
    """A language model in miniature whose head shares its weight with the embedding."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(11, 6)
        self.body = nn.Linear(6, 6)
        self.head = nn.Linear(6, 11, bias=False)
        nn.init.normal_(self.embedding.weight, std=0.1)
        self.head.weight = self.embedding.weight

    def forward(self, x):
        return self.head(torch.relu(self.body(self.embedding(x))))


def frozen():
    model = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
    for parameter in model[0].parameters():
        parameter.requires_grad_(False)
    return model


class Logits(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return self.model(input_ids=x).logits


def llama():
    import transformers

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


def image(*shape):
    return lambda: torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def tokens(vocabulary):
    return lambda: torch.randint(vocabulary, (4, 7), generator=torch.Generator().manual_seed(1))


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[], torch.Tensor]]] = {
    "linear": (lambda: nn.Linear(6, 3), image(5, 6)),
    "conv-bn": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 2, 1)),
        image(4, 3, 8, 8),
    ),
    "conv-transpose": (lambda: nn.Sequential(nn.ConvTranspose2d(4, 6, 2), nn.GroupNorm(2, 6)), image(3, 4, 5, 5)),
    "depthwise": (
        lambda: nn.Sequential(nn.Conv2d(8, 8, 3, groups=8, padding=1), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 1)),
        image(3, 8, 5, 5),
    ),
    "embedding": (lambda: nn.Sequential(nn.Embedding(11, 6), nn.LayerNorm(6), nn.Linear(6, 3)), tokens(11)),
    "tied": (Tied, tokens(11)),
    "frozen": (frozen, image(5, 6)),
    "vit": (lambda: build_model("vit_tiny", channels=1, size=8, classes=10), image(2, 1, 8, 8)),
    "llama": (llama, tokens(17)),
}


def build(name, dtype=torch.float32):
    make, inputs = MODELS[name]
    torch.manual_seed(0)
    model, x = make().to(dtype), inputs()
    return model, x.to(dtype) if x.is_floating_point() else x
