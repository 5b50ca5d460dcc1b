"""Models from elsewhere: a function of the user's, or the Hugging Face hub."""

import importlib
import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from weightsmith.core.errors import UsageError, near, require
from weightsmith.lab.hub import check_hub, switched_off


class Logits(nn.Module):
    """A Hugging Face image classifier that returns its logits alone.

    Args:
        model: Takes ``pixel_values``.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Tensor:
        """Map ``(B, C, H, W)`` to logits ``(B, classes)``."""
        return self.model(pixel_values=x).logits


def find_function(name: str) -> Callable[..., object]:
    """Import what ``module:function`` names.

    Raises:
        UsageError: There is no such module or function.
    """
    module_name, _, function_name = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ModuleNotFoundError, ValueError) as error:
        missing = getattr(error, "name", None)
        if missing and not f"{module_name}.".startswith(f"{missing}."):
            raise  # the module is there, but something that it needs is not
        raise UsageError(f"model {name!r}: there is no module {module_name!r}; is its folder on PYTHONPATH?") from error
    function = getattr(module, function_name, None)
    if not callable(function):
        public = [known for known, value in vars(module).items() if callable(value) and not known.startswith("_")]
        raise UsageError(
            f"model {name!r}: {module_name} has no function {function_name!r}; {near(function_name, public)}"
        )
    return function


def from_function(name: str, **shape: int) -> nn.Module:
    """Call ``module:function`` with those of ``channels``, ``size`` and ``classes`` that it takes.

    Raises:
        UsageError: There is no such function, or it returns something else than a module.
    """
    function = find_function(name)
    parameters = inspect.signature(function).parameters
    if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        shape = {argument: value for argument, value in shape.items() if argument in parameters}
    model = function(**shape)
    if not isinstance(model, nn.Module):
        raise UsageError(f"model {name!r} must return a torch.nn.Module, got {type(model).__name__}")
    return model


def hugging_face_config(name: str) -> Any:
    """Read the configuration of a hub id or a folder.

    Raises:
        UsageError: There is no such model, or it cannot be reached.
        MissingExtra: ``transformers`` is not installed.
    """
    read = require("transformers", extra="hf", purpose=f"the model {name!r}").AutoConfig.from_pretrained
    if not Path(name).is_dir():
        mend = "give a folder that holds config.json, or set HF_HUB_OFFLINE=1 if it has been fetched before"
        check_hub("model", name, cached=lambda: read(name), mend=mend)
    try:
        return read(name)
    except (OSError, ValueError) as error:
        raise UsageError(f"model {name!r} has no configuration that transformers can read: {error}") from error


def from_hugging_face(name: str, *, channels: int, size: int, classes: int, pretrained: bool) -> Logits:
    """Build an image classifier from a hub id or a folder that holds ``config.json``.

    Args:
        name: ``"owner/name"`` or the folder.
        channels: Of the images; goes into the configuration where it has a place and nothing is pretrained.
        size: Of the images; likewise.
        classes: Number of logits; a pretrained head of another size is drawn anew.
        pretrained: Load the weights too; they must fit ``channels`` and ``size``.

    Raises:
        UsageError: There is no such model, it classifies no images, or it cannot be reached.
        MissingExtra: ``transformers`` is not installed.
    """
    config = hugging_face_config(name)
    from transformers import AutoModelForImageClassification
    from transformers.utils import logging as log

    config.num_labels = classes
    if not pretrained:
        for field, value in {"image_size": size, "num_channels": channels}.items():
            if hasattr(config, field):
                setattr(config, field, value)
    patch = getattr(config, "patch_size", 1)
    if isinstance(patch, int) and patch > size:
        raise UsageError(
            f"model {name!r} cuts patches of {patch} pixels, images have {size}: load them with a larger size"
        )
    try:
        if not pretrained:
            return Logits(AutoModelForImageClassification.from_config(config))
        with switched_off(log.is_progress_bar_enabled(), log.disable_progress_bar, log.enable_progress_bar):
            trained = AutoModelForImageClassification.from_pretrained(name, config=config, ignore_mismatched_sizes=True)
        return Logits(trained)
    except (OSError, ValueError) as error:  # a configuration of another kind of model, or no weights
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"model {name!r} cannot be built as an image classifier: {reason}") from error
