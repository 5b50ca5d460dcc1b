import pytest
import torch
from torch import nn


@pytest.fixture
def net():
    """Two linear layers and a head, in evaluation mode."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 12), nn.Tanh(), nn.Linear(12, 3)).eval()


@pytest.fixture
def x():
    return torch.randn(5, 8, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def shake():
    """Give every trained tensor of a model values as if it had been trained."""

    def shake(model, size=0.1, seed=2):
        generator = torch.Generator().manual_seed(seed)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = size * torch.randn(parameter.shape, generator=generator).to(parameter)
        return model

    return shake


@pytest.fixture
def llama():
    """A tiny language model whose head is tied to its embedding."""
    transformers = pytest.importorskip("transformers")

    def build(tie=True):
        torch.manual_seed(0)
        config = transformers.LlamaConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            num_key_value_heads=1,
            max_position_embeddings=16,
            tie_word_embeddings=tie,
        )
        return transformers.LlamaForCausalLM(config).eval()

    return build
