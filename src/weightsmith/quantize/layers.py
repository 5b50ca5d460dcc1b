"""Which layers have a weight that can be put on a grid."""

from torch import nn

_TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *_TRANSPOSED)


def is_quantisable(_name: str, module: nn.Module) -> bool:
    """Whether a module is a linear layer, a convolution or GPT-2's ``Conv1D``."""
    return isinstance(module, _LAYERS) or _is_gpt2_conv(module)


def output_axis(module: nn.Module) -> int:
    """Where the output channels of a layer's weight are."""
    return 1 if isinstance(module, _TRANSPOSED) or _is_gpt2_conv(module) else 0


def output_head(model: nn.Module) -> nn.Module | None:
    """The output embedding of a Hugging Face language model."""
    get = getattr(model, "get_output_embeddings", None)
    return get() if callable(get) else None


def _is_gpt2_conv(module: nn.Module) -> bool:
    return type(module).__name__ == "Conv1D" and hasattr(module, "nf")
