"""``weightsmith suggest``."""

from pathlib import Path

import torch
import tyro
from rich.markup import escape
from rich.table import Table
from torch import nn

from weightsmith.cli.console import console, print_line
from weightsmith.core.errors import UsageError, require
from weightsmith.core.load import load_object
from weightsmith.experiments.suggest import suggest as judge
from weightsmith.lab.models.lookup import MODELS, build_model
from weightsmith.techniques import TECHNIQUES


def suggest(model: tyro.conf.Positional[str], /) -> int:
    """List which techniques apply to a model, to which layers, and why the others do not.

    Args:
        model: A Hugging Face folder or id, module:function or file.py:function that returns a model, or a name such as
            resnet18.
    """
    built = find_model(model)
    parameters = sum(parameter.numel() for parameter in built.parameters())
    print_line(f"{type(built).__name__}, {parameters:,} parameters")
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column(style="bold", no_wrap=True)
    table.add_column()
    for found in sorted(judge(built), key=lambda item: not item.applies):
        table.add_row("[green]✓[/]" if found.applies else "[dim]–[/]", found.slug, escape(found.text))
    console.print(table)
    announced = ", ".join(card.slug for card in TECHNIQUES if not card.available)
    print_line(f"\nNot in this version yet: {announced}", "dim")
    return 0


def find_model(name: str) -> nn.Module:
    """Build a model by name; of a Hugging Face model the architecture alone, without weights.

    Raises:
        UsageError: There is no such model.
    """
    if Path(name, "config.json").is_file() or ("/" in name and ":" not in name):
        transformers = require("transformers", extra="hf", purpose=f"the model {name!r}")
        from weightsmith.lab.models.external import hugging_face_config

        config = hugging_face_config(name)
        architecture = (getattr(config, "architectures", None) or [None])[0]
        kind = getattr(transformers, architecture, None) if architecture else None
        with torch.device("meta"):
            try:
                automatic = transformers.AutoModel
                model: nn.Module = kind(config) if kind else automatic.from_config(config, trust_remote_code=False)
                return model
            except (ValueError, RuntimeError, ImportError) as error:
                raise UsageError(f"model {name!r} cannot be built: {error}") from error
    if ":" in name:
        made = load_object(name, "model")
        found = made() if callable(made) and not isinstance(made, nn.Module) else made
        if not isinstance(found, nn.Module):
            raise UsageError(f"model {name!r} must be or return a torch.nn.Module, got {type(found).__name__}")
        return found
    if name in MODELS:
        return build_model(name, channels=3, size=32, classes=10)
    raise UsageError(
        f"model {name!r} is neither a Hugging Face folder or id, nor module:function, nor one of {', '.join(MODELS)}"
    )
