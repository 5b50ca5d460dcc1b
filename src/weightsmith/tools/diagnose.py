"""``weightsmith diagnose``: how far a model has moved between two checkpoints, layer by layer."""

import json
import warnings
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from weightsmith.core.checkpoint import Checkpoint
from weightsmith.core.display import markup
from weightsmith.core.errors import UsageError, WeightsmithWarning
from weightsmith.core.files import write_atomically
from weightsmith.core.load import load_object
from weightsmith.core.pickles import read_pickle
from weightsmith.diagnose import KernelOptions, LazinessProbe, LazinessReport, effective_rank, weight_change
from weightsmith.diagnose.options import Method, Reduce
from weightsmith.lab.tasks import TaskConfig, make_task
from weightsmith.lab.tasks.scoring import load_weights
from weightsmith.tools._measures import page, terminal

_console = Console()


def diagnose(
    before: tyro.conf.Positional[str],
    after: tyro.conf.Positional[str],
    /,
    *,
    data: str = "",
    task: str = "images",
    model: str = "",
    samples: int = 128,
    kernel_samples: int = 32,
    method: Method = "auto",
    reduce: Reduce = "full",
    budget_mb: float = 1000,
    probes: int = 512,
    params: tuple[str, ...] = (),
    layers: tuple[str, ...] = (),
    batch_dim: int = 0,
    rank: str = "participation",
    out: Path = Path("diagnose.html"),
    plan: bool = False,
    allow_pickle: bool = False,
) -> int:
    """Measure how far a model has moved between two checkpoints: lazily, or by learning features.

    With --data it prints the alignments of activity and of the tangent kernel; without, what the weights alone tell:
    their change and their effective ranks. A page with plots and a file with all numbers are written.

    Args:
        before: A checkpoint (.safetensors, a folder, or .pt with --allow-pickle), or module:function or
            file.py:function that returns the model.
        after: The same later in training.
        data: What the model is looked at on: a name (digits, mnist ...), a file, a folder or a hub id, as
            `weightsmith run` takes it, or file.py:function that returns the model's inputs.
        task: What kind of data: images, sentences, language, questions, or your own.
        model: Architecture of checkpoints: a name, a Hugging Face folder or id, module:function or file.py:function.
        samples: Inputs whose activity is compared.
        kernel_samples: The first of these whose tangent kernel is computed.
        method: How: by an explicit Jacobian, a contraction, or a sketch; by default what fits.
        reduce: The kernel of all outputs, its trace over outputs, or of one random combination per sample.
        budget_mb: Memory for kernels.
        probes: Directions of a sketch.
        params: Globs over names of parameters; by default all that are trained.
        layers: Globs over names of modules whose activity is compared; by default those with parameters.
        batch_dim: Dimension of the inputs that counts samples.
        rank: Which effective rank: participation, stable, nuclear, participation_s, entropy, numerical, eig, eig_sum.
        out: The page; the numbers go beside it, as .json.
        plan: Print how the kernel would be computed, with memory and time, and stop.
        allow_pickle: Also read .pt and .bin files; only plain tensors are read from them.
    """
    for name, value in (("samples", samples), ("kernel-samples", kernel_samples), ("budget-mb", budget_mb)):
        if value <= 0:
            raise UsageError(f"--{name} must be above 0, got {value}")
    _check_pickles((before, after), allow_pickle)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", WeightsmithWarning)  # the report names every entry that is not a number
        if not data:
            if plan:
                raise UsageError("--plan is about the tangent kernel, which needs --data")
            found = _weights_alone(before, after, params, rank)
        else:
            options = KernelOptions(method=method, reduce=reduce, budget=int(budget_mb * 1e6), probes=probes)
            first, second, inputs = _models(before, after, data, task, model, samples, batch_dim)
            probe = LazinessProbe(
                first, inputs, layers=layers or None, params=params or None, kernel=options,
                kernel_samples=kernel_samples, batch_dim=batch_dim, rank=rank,
            )  # fmt: skip
            _console.print(markup(f"kernel: {probe.plan(first)}"), soft_wrap=True, highlight=False)
            if plan:
                return 0
            found = probe.compare(probe.snapshot(first), second)
    terminal(found, _console)
    title = f"{_short(before)} and {_short(after)}"
    write_atomically(out, page(found, title))
    numbers = out.with_suffix(".json")
    write_atomically(numbers, json.dumps(_finite({"before": before, "after": after, **found.to_dict()}), indent=1))
    _console.print(f"\nReport: {markup(out.resolve())}", soft_wrap=True, highlight=False)
    _console.print(f"Numbers: {markup(numbers.resolve())}", soft_wrap=True, highlight=False)
    return 0


def _check_pickles(names: tuple[str, str], allow_pickle: bool) -> None:
    for name in names:
        path = Path(name)
        if path.is_file() and path.suffix != ".safetensors" and not allow_pickle:
            raise UsageError(
                f"{name} is neither .safetensors nor a folder; if it is a pickle, --allow-pickle reads plain tensors "
                "from it"
            )


def _models(
    before: str, after: str, data: str, task: str, model: str, samples: int, batch_dim: int
) -> tuple[nn.Module, nn.Module, Any]:
    named = [":" in one and not Path(one).exists() for one in (before, after)]
    if not model and not any(named) and Path(before, "config.json").is_file():
        model = before
    if ":" in data and not Path(data).exists():
        inputs = load_object(data, "--data")
        inputs = inputs() if callable(inputs) else inputs

        def build() -> nn.Module:
            if ":" not in model:
                raise UsageError(f"with inputs of your own, --model must be module:function, got {model!r}")
            return _module(model, "--model")
    else:
        if not model and not all(named):
            raise UsageError(
                "--model names the architecture of a checkpoint: a name such as resnet18, or file.py:function"
            )
        made = make_task(replace(TaskConfig(), task=task, data=data, model=model))
        count = min(samples, len(made.train))
        inputs, build = made.train.__getitems__(list(range(count))).inputs, made.build
    found = [
        _module(one, "before" if index == 0 else "after") if named[index] else load_weights(build(), one)
        for index, one in enumerate((before, after))
    ]
    return found[0], found[1], _first(inputs, batch_dim, samples)


def _module(name: str, argument: str) -> nn.Module:
    made = load_object(name, argument)
    found = made() if callable(made) and not isinstance(made, nn.Module) else made
    if not isinstance(found, nn.Module):
        raise UsageError(f"{argument} {name!r} must be or return a torch.nn.Module, got {type(found).__name__}")
    return found


def _first(inputs: Any, batch_dim: int, samples: int) -> Any:
    """The first samples; tensors of another length than the first one (masks over positions) stay whole."""
    leaves, spec = tree_flatten(dict(inputs) if isinstance(inputs, Mapping) else inputs)
    lengths = [leaf.shape[batch_dim] for leaf in leaves if isinstance(leaf, Tensor) and leaf.dim() > batch_dim]

    def cut(leaf: Any) -> Any:
        counts = isinstance(leaf, Tensor) and leaf.dim() > batch_dim and leaf.shape[batch_dim] == lengths[0]
        return leaf.narrow(batch_dim, 0, min(samples, lengths[0])) if counts else leaf

    return tree_unflatten([cut(leaf) for leaf in leaves], spec)


def _weights_alone(before: str, after: str, params: tuple[str, ...], rank: str) -> LazinessReport:
    zero, one = _state(before, "before"), _state(after, "after")
    if params:
        from fnmatch import fnmatchcase

        zero, one = (
            {name: w for name, w in state.items() if any(fnmatchcase(name, glob) for glob in params)}
            for state in (zero, one)
        )
    if not zero:
        raise UsageError(f"{before} has no floating-point weights" + (f" that match {params}" if params else ""))
    total, relative = weight_change(zero, one), weight_change(zero, one, relative=True)
    square = rank.startswith("eig")
    return LazinessReport(
        weight_change=total,
        relative_weight_change=relative,
        weight_changes={
            name: (weight_change(w, one[name]), weight_change(w, one[name], relative=True)) for name, w in zero.items()
        },
        representation_alignment={}, centered_alignment={}, sign_similarity={}, kernel_alignment=float("nan"),
        kernel_alignment_error=float("nan"), per_layer={}, kernel_target_alignment=None,
        effective_rank={
            name: (float(effective_rank(w, rank)), float(effective_rank(one[name], rank)))
            for name, w in zero.items()
            if w.dim() >= 2 and w.numel() and (not square or w.shape[0] ** 2 == w.numel())
        },
        rank_kind=rank, samples=0, parameters=tuple(zero), plan=None,
    )  # fmt: skip


def _state(name: str, argument: str) -> dict[str, Tensor]:
    path = Path(name)
    if not path.exists():
        if ":" in name:
            return {key: w for key, w in _module(name, argument).state_dict().items() if w.is_floating_point()}
        raise UsageError(f"{argument} {name!r} is neither a file, a folder nor module:function")
    if path.is_dir() or path.suffix == ".safetensors":
        state: dict[str, Tensor] = dict(Checkpoint(path))
    else:
        state = read_pickle(path, allow_pickle=True)
    return {key: w for key, w in state.items() if w.is_floating_point() and w.element_size() > 1}


def _short(name: str) -> str:
    return Path(name).name or name


def _finite(value: Any) -> Any:
    """NaN is no JSON."""
    if isinstance(value, float):
        return value if torch.isfinite(torch.tensor(value)) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, list | tuple) else value
