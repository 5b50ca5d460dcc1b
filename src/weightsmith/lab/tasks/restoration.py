"""Restore photographs: noise, haze and rain taken off by one network."""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError
from weightsmith.core.load import load_object
from weightsmith.core.modes import evaluating
from weightsmith.lab.data.degradations import DEGRADATIONS
from weightsmith.lab.data.photographs import Patches, load_photographs
from weightsmith.lab.experiment import Metric
from weightsmith.lab.models.promptir import PromptIR
from weightsmith.lab.task import Batch, Outcome, Split, Task, forward
from weightsmith.lab.tasks.code import code_of
from weightsmith.lab.tasks.config import TaskConfig
from weightsmith.lab.tasks.scoring import load_weights
from weightsmith.lab.train import evaluate

_PATCHES, _TEST_PATCHES, _SIDE, _SHOWN = 384, 96, 32, 128
_SMALL = {
    "num_blocks": (1, 1), "num_refinement": 1, "heads": (1, 2), "expansion": 2.0, "prompt_sizes": (8,),
    "prompt_length": 3,
}  # fmt: skip


def network(name: str) -> Callable[[], nn.Module]:
    """The model by its name: ``promptir``, ``promptir-WIDTH`` for a small one, or ``module:function``.

    Raises:
        UsageError: There is no such model.
    """
    kind, _, width = name.partition("-")
    if name == "promptir":
        return PromptIR
    if kind == "promptir" and width.isdecimal() and int(width) > 0 and int(width) % 2 == 0:
        return partial(PromptIR, int(width), **_SMALL)  # type: ignore[arg-type]
    if ":" in name:
        made: Callable[[], nn.Module] = load_object(name, "model")
        return made
    raise UsageError(f"model must be promptir, promptir-WIDTH with an even width, or module:function, got {name!r}")


def make(config: TaskConfig) -> Task:
    """Load the photographs and make the task."""
    photographs = load_photographs(config.data_name)
    side = config.size or _SIDE
    test_side = min([2 * side, *(min(image.shape[:2]) for image in photographs.test + photographs.validation)])
    count = config.test_examples or _TEST_PATCHES
    pairs = photographs.pairs
    train = Patches(
        photographs.train, config.train_examples or _PATCHES, side, draw_anew=True, pairs=pairs.get("train")
    )
    splits = {
        split: Patches(images, count, test_side, draw_anew=False, pairs=pairs.get(split))
        for split, images in (("validation", photographs.validation), ("test", photographs.test))
    }
    build = network(config.model_name)

    def measure(model: nn.Module, split: Split) -> Outcome:
        patches = splits[split] if split != "train" else train
        found = evaluate(model, patches, _scores, batch_size=32)
        kinds = torch.arange(len(patches)) % len(DEGRADATIONS)
        more = {
            f"{name}_{kind}": found.scores[name][kinds == number].mean().item()
            for number, kind in enumerate(DEGRADATIONS)
            for name in ("psnr", "gain")
        }
        return Outcome({**found.metrics, **more}, found.scores)

    return Task(
        build=lambda: load_weights(build(), config.checkpoint),
        train=train,
        losses=_losses,
        evaluate=measure,
        example=lambda: splits["validation"].__getitems__(range(min(3, count))),
        metric=Metric("psnr", "test PSNR dB", "higher", ".2f"),
        name=config.data_name,
        held_out=splits,
        fingerprint=photographs.fingerprint + code_of(config.model, config.checkpoint),
        facts={
            "data": f"{config.data_name}, patches of {side} x {side} pixels with noise, haze or rain"
            + (f" ({' and '.join(sorted(pairs['train']))} as published, in pairs)" if pairs else ""),
            "model": config.model_name,
        },
    )


@torch.no_grad()
def examples(task: Task, model: nn.Module) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """A large test patch with each degradation, to look at: degraded, restored and clean, ``(3, S, S)`` in [0, 1]."""
    test = task.held_out["test"]
    assert isinstance(test, Patches)
    side = min([_SHOWN, *(min(image.shape[:2]) for image in test.photographs)])
    patches = Patches(test.photographs, len(DEGRADATIONS), side, draw_anew=False, pairs=test.pairs)
    shown = patches.__getitems__(range(len(DEGRADATIONS)))
    assert shown.targets is not None
    with evaluating(model):
        device = next((parameter.device for parameter in model.parameters()), shown.inputs.device)
        restored = model(shown.inputs.to(device)).float().clamp(0, 1).cpu()
    rows = zip(shown.inputs, restored, shown.targets, strict=True)
    return dict(zip(DEGRADATIONS, rows, strict=True))


def _losses(model: nn.Module, batch: Batch) -> Tensor:
    assert batch.targets is not None
    losses: Tensor = (forward(model, batch) - batch.targets).abs().flatten(1).mean(1)
    return losses


def _scores(model: nn.Module, batch: Batch) -> dict[str, Tensor]:
    assert batch.targets is not None
    restored = forward(model, batch).float().clamp(0, 1)
    loss = (restored - batch.targets).abs().flatten(1).mean(1)
    after, before = psnr(restored, batch.targets), psnr(batch.inputs, batch.targets)
    return {"loss": loss, "psnr": after, "gain": after - before}


def psnr(images: Tensor, clean: Tensor) -> Tensor:
    """Peak signal-to-noise ratio in dB of each image, ``(B, C, H, W)`` in [0, 1] to ``(B,)``."""
    error = (images - clean).square().flatten(1).mean(1).clamp_min(1e-10)
    return -10 * error.log10()
