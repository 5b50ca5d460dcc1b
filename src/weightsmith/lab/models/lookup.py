"""``build_model``: every model that an experiment can name, behind one call."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

from torch import nn

from weightsmith.core.errors import UsageError, unknown
from weightsmith.lab.models.certified import cnn7, resnext_certified, small_cnn, wide_resnet8
from weightsmith.lab.models.convnet import convnet
from weightsmith.lab.models.external import from_function, from_hugging_face
from weightsmith.lab.models.mlp import mlp
from weightsmith.lab.models.resnet import resnet
from weightsmith.lab.models.vgg import vgg
from weightsmith.lab.models.vit import ViT

MODELS: dict[str, Callable[..., nn.Module]] = {
    "mlp": mlp,
    "convnet": convnet,
    "resnet20": partial(resnet, depths=(3, 3, 3), width=16, project=False),
    "resnet32": partial(resnet, depths=(5, 5, 5), width=16, project=False),
    "resnet18": partial(resnet, depths=(2, 2, 2, 2), width=64),
    "resnet34": partial(resnet, depths=(3, 4, 6, 3), width=64),
    "resnet50": partial(resnet, depths=(3, 4, 6, 3), width=64, expansion=4),
    "vgg16_bn": partial(vgg, depths=(2, 2, 3, 3, 3)),
    "vgg19_bn": partial(vgg, depths=(2, 2, 4, 4, 4)),
    "vit_tiny": ViT,
    "cnn7": cnn7,
    "cnn7_small": partial(cnn7, width=16, hidden=128),
    "small_cnn": small_cnn,
    "wide_resnet8": wide_resnet8,
    "resnext_certified": resnext_certified,
}
"""Our own architectures, by name."""


def build_model(name: str, *, channels: int, size: int, classes: int, pretrained: bool = False) -> nn.Module:
    """Build an image classifier, drawing its weights from torch's global generator.

    Args:
        name: One of ``MODELS``; ``"module:function"`` or ``"file.py:function"``, called with those of ``channels``,
            ``size`` and ``classes`` that it takes; a Hugging Face id ``"owner/name"``; a folder with ``config.json``.
        channels: Of the images.
        size: Height and width of the images, in pixels.
        classes: Number of logits.
        pretrained: Load trained weights; only Hugging Face models have any.

    Returns:
        A module that maps ``(B, channels, size, size)`` to logits ``(B, classes)``.

    Raises:
        UsageError: The name is unknown, or what it names is unavailable.
        MissingExtra: ``transformers`` is needed and not installed.
    """
    shape = {"channels": channels, "size": size, "classes": classes}
    if _is_hugging_face(name):
        return from_hugging_face(name, **shape, pretrained=pretrained)
    if pretrained:
        raise UsageError(
            f"pretrained must be False for {name!r}: only Hugging Face models have trained weights to load"
        )
    if ":" in name:
        return from_function(name, **shape)
    if name not in MODELS:
        raise unknown("model", name, MODELS)
    return MODELS[name](**shape)


def _is_hugging_face(name: str) -> bool:
    return name not in MODELS and (Path(name, "config.json").is_file() or ("/" in name and ":" not in name))
