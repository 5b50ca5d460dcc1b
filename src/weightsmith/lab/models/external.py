"""Models from elsewhere: a function of the user's, or the Hugging Face hub."""

import inspect
from pathlib import Path
from typing import Any

from torch import nn

from weightsmith.core.errors import UsageError, require
from weightsmith.core.load import load_object
from weightsmith.lab.data.hub import check_hub, switched_off


def from_function(name: str, **shape: int) -> nn.Module:
    """Call ``module:function`` or ``file.py:function`` with those of the task's numbers that it takes.

    Raises:
        UsageError: There is no such function, or it returns something else than a module.
    """
    function = load_object(name, "model")
    if not callable(function):
        raise UsageError(f"model {name!r} must be a function that returns a torch.nn.Module")
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
        fix = "give a folder that holds config.json, or set HF_HUB_OFFLINE=1 if it has been fetched before"
        check_hub("model", name, cached=lambda: read(name, trust_remote_code=False), fix=fix)
    try:
        return read(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"model {name!r} has no configuration that transformers can read: {error}") from error


def hub_revision(name: str) -> str:
    """The commit of what the hub's cache holds under an id, fetched if it is not there; ``""`` where it is not known.

    Raises:
        UsageError: There is no such model, or it cannot be reached.
        MissingExtra: ``transformers`` is not installed.
    """
    hugging_face_config(name)
    from huggingface_hub import try_to_load_from_cache

    found = try_to_load_from_cache(name, "config.json")
    return Path(found).parent.name if isinstance(found, str) else ""


def from_hugging_face(name: str, *, channels: int, size: int, classes: int, pretrained: bool) -> nn.Module:
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
            model: nn.Module = AutoModelForImageClassification.from_config(config, trust_remote_code=False)
            return model
        with switched_off(log.is_progress_bar_enabled(), log.disable_progress_bar, log.enable_progress_bar):
            model = AutoModelForImageClassification.from_pretrained(
                name, config=config, ignore_mismatched_sizes=True, trust_remote_code=False
            )
            return model
    except (OSError, ValueError) as error:  # a configuration of another kind of model, or no weights
        reason = str(error).strip().splitlines()[0]
        raise UsageError(f"model {name!r} cannot be built as an image classifier: {reason}") from error
