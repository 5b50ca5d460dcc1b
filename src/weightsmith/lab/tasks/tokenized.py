"""Rows of tokens as batches, and the text models that read them: Hugging Face folders or ids, or small ones of ours."""

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, require, unknown
from weightsmith.lab.data.hub import switched_off
from weightsmith.lab.data.tokens import Bytes, Words, pad_of
from weightsmith.lab.identity import tensors_digest
from weightsmith.lab.models.external import from_function, hugging_face_config
from weightsmith.lab.models.text import Bag, TextTransformer
from weightsmith.lab.task import Batch
from weightsmith.lab.tasks.config import TaskConfig
from weightsmith.lab.tasks.scoring import load_weights

IGNORED = -100  # a target that no loss counts


class Rows:
    """Rows of tokens of one split; see `weightsmith.lab.task.Batches`.

    Batches are as wide as their longest row.

    Args:
        inputs: ``(N, T)``, padded on the right.
        targets: ``(N,)`` classes, or ``(N, T)`` tokens to predict, ``IGNORED`` where none is.
        lengths: ``(N,)``, tokens per row without padding.
        mask: Give an attention mask too.
    """

    seed = 0
    slow = False

    def __init__(self, inputs: Tensor, targets: Tensor, lengths: Tensor, *, mask: bool) -> None:
        self.inputs, self.targets, self.lengths, self.mask = inputs, targets, lengths, mask

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitems__(self, indices: Sequence[int] | Tensor) -> Batch:
        """Read a batch."""
        at = torch.as_tensor(indices, dtype=torch.int64)
        width = int(self.lengths[at].max()) if len(at) else 0
        inputs = {"input_ids": self.inputs[at, :width]}
        if self.mask:
            inputs["attention_mask"] = (torch.arange(width) < self.lengths[at, None]).long()
        targets = self.targets[at] if self.targets.dim() == 1 else self.targets[at, :width]
        return Batch(inputs, targets, at)


def is_hugging_face(name: str) -> bool:
    """Whether a model is a Hugging Face folder or id."""
    return Path(name, "config.json").is_file() or (
        "/" in name and ":" not in name and name not in ("bag", "transformer")
    )


def is_causal_transformer(config: TaskConfig) -> bool:
    """Whether the model of a configuration is a causal language model of Transformers."""
    return config.task in ("language", "questions") and is_hugging_face(config.model_name)


def content_digest(splits: Mapping[str, Rows]) -> str:
    """Changes with any token or target."""
    return tensors_digest(
        {f"{split} {part}": getattr(rows, part) for split, rows in splits.items() for part in ("inputs", "targets")}
    )


def tokenizer_of(config: TaskConfig, ours: Bytes | Words | None = None) -> Any:
    """The tokenizer of a Hugging Face model; ``ours`` for every other model.

    Raises:
        UsageError: The model has none, or takes fewer tokens than ``config.length``.
    """
    name = config.model_name
    if not is_hugging_face(name):
        return ours
    transformers: Any = require("transformers", extra="hf", purpose=f"the model {name!r}")
    most = getattr(hugging_face_config(name), "max_position_embeddings", None)
    if most is not None and config.length > most:
        raise UsageError(f"length must be at most {most}, what model {name!r} takes, got {config.length}")
    try:
        return transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(f"model {name!r} has no tokenizer: {str(error).strip().splitlines()[0]}") from error


def build_text_model(config: TaskConfig, tokenizer: Any, *, classes: int | None) -> nn.Module:
    """Build a classifier of ``classes``, or a causal language model, from torch's global generator.

    Raises:
        UsageError: The name is not known, or what it names is of another kind.
    """
    name, length = config.model_name, config.length
    if is_hugging_face(name):
        return load_weights(_hugging_face(config, tokenizer, classes), config.checkpoint)
    shape = {"vocabulary": tokenizer.vocabulary, "length": length, "pad": tokenizer.pad_token_id}
    if ":" in name:
        model = from_function(name, **shape, **({} if classes is None else {"classes": classes}))
    elif name == "transformer":
        model = TextTransformer(**shape, classes=classes)
    elif name == "bag" and classes is not None:
        model = Bag(vocabulary=tokenizer.vocabulary, pad=tokenizer.pad_token_id, classes=classes)
    else:
        known = ["transformer", "module:function", "a Hugging Face folder or id"]
        raise unknown("model", name, (["bag"] if classes is not None else []) + known)
    if config.pretrained:
        raise UsageError(
            f"pretrained must be False for {name!r}: only Hugging Face models have trained weights to load"
        )
    return load_weights(model, config.checkpoint)


def _hugging_face(config: TaskConfig, tokenizer: Any, classes: int | None) -> nn.Module:
    import transformers
    from transformers.utils import logging as log

    name, settings = config.model_name, hugging_face_config(config.model_name)
    auto = transformers.AutoModelForCausalLM if classes is None else transformers.AutoModelForSequenceClassification
    if classes is not None:
        settings.num_labels = classes
    if hasattr(settings, "use_cache"):
        settings.use_cache = False
    try:
        if not config.pretrained:
            model = auto.from_config(settings, trust_remote_code=False)
        else:
            with switched_off(log.is_progress_bar_enabled(), log.disable_progress_bar, log.enable_progress_bar):
                model = auto.from_pretrained(
                    name, config=settings, ignore_mismatched_sizes=True, dtype=torch.float32, trust_remote_code=False
                )
    except (OSError, ValueError) as error:
        kind = "language model" if classes is None else "text classifier"
        raise UsageError(f"model {name!r} cannot be built as a {kind}: {str(error).strip().splitlines()[0]}") from error
    if classes is not None:  # a classifier on the last token looks for the first that fills the row
        model.config.pad_token_id = pad_of(tokenizer)
    if "input_ids" not in inspect.signature(model.forward).parameters:
        raise UsageError(f"model {name!r} does not take input_ids")
    made: nn.Module = model
    return made
