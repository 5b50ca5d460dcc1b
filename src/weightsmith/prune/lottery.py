"""Iterative magnitude pruning: train, prune, rewind, and again; every round on disk, resumed after a kill.

Source: MIR-L, algorithm 1, and the authors' ``train.py``.
"""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, reason
from weightsmith.core.files import folder_atomically
from weightsmith.core.json_files import read_json
from weightsmith.prune.magnitude import MagnitudePruner
from weightsmith.prune.scoring import check_amount
from weightsmith.prune.sparse import load_sparse, save_sparse, sparse_masks

Train = Callable[[nn.Module, MagnitudePruner, int], object]
"""``(model, pruner, round) -> anything``: trains in place and attaches the pruner to its optimizer."""


@dataclass(frozen=True, slots=True)
class Round:
    """One round: its training and what it came to.

    Attributes:
        round: 0 for the dense network.
        density: Share of prunable weights that the round trained.
        density_of_all: Share of all parameters.
        metrics: What the evaluation gave.
        folder: Where its weights and masks are; ``None``: nowhere.
    """

    round: int
    density: float
    density_of_all: float
    metrics: dict[str, float]
    folder: Path | None = None


def rounds_for(target_density: float, amount: float) -> list[float]:
    """The shares to prune, round by round, that lead to a density; the last one is smaller.

    Args:
        target_density: Share of prunable weights that is left at the end, in (0, 1).
        amount: Share of what is left that a round prunes.

    Raises:
        UsageError: A share is out of range.
    """
    if not 0 < target_density < 1:
        raise UsageError(f"target_density must be a fraction between 0 and 1, got {target_density}")
    if not check_amount(amount):
        raise UsageError("amount must be above 0 to reach a density, got 0")
    count = math.ceil(math.log(target_density) / math.log(1 - amount) - 1e-9)
    return [amount] * (count - 1) + [1 - target_density / (1 - amount) ** (count - 1)]


def iterate(
    make: Callable[[], nn.Module],
    train: Train,
    evaluate: Callable[[nn.Module], Mapping[str, float]],
    *,
    rounds: int = 15,
    amount: float = 0.2,
    target_density: float | None = None,
    rewind_to: str = "init",
    out: Path | str | None = None,
    seed: int = 0,
    **options: Any,
) -> list[Round]:
    """Train a dense network, then prune it and train what is left from its first weights, round by round.

    The whole takes ``rounds + 1`` trainings. Each starts from a seed of its own, so that a resumed run ends as one that
    never stopped.

    Args:
        make: Makes the network; called after the seed is set.
        train: ``(model, pruner, round)``: trains in place, with ``pruner.attach(optimizer)`` and a new optimizer and
            schedule. For late rewinding it calls ``pruner.snapshot("epoch 3")`` in round 0.
        evaluate: ``model -> numbers by name``.
        rounds: How often to prune.
        amount: Share of the weights left that a round prunes.
        target_density: Instead of ``rounds``: prune until this share of prunable weights is left.
        rewind_to: ``"init"``, ``"last"`` (go on from the trained weights), or the label of a snapshot.
        out: A folder, for a folder per round; an earlier run there with the same settings is continued.
        seed: Of the first weights; round ``r`` trains after ``seed + r + 1`` is set.
        options: Of `MagnitudePruner`.

    Returns:
        The rounds, the dense one first.

    Raises:
        UsageError: A number is out of range, ``out`` is a file, or holds a run with other settings or of
            another network, or one whose files are damaged.
    """
    if isinstance(rounds, bool) or not isinstance(rounds, int) or rounds < 1:
        raise UsageError(f"rounds must be an integer of at least 1, got {rounds!r}")
    if target_density is None and not check_amount(amount):
        raise UsageError("amount must be above 0, got 0")
    shares = [amount] * rounds if target_density is None else rounds_for(target_density, amount)
    torch.manual_seed(seed)
    model = make()
    pruner = MagnitudePruner(model, **options)
    pruner.snapshot()
    settings = {
        "shares": shares, "rewind_to": rewind_to, "seed": seed, "options": _words(options),
        "first weights": pruner.digest()[:16],
    }  # fmt: skip
    folder = None if out is None else Path(out)
    if folder is not None and folder.exists() and not folder.is_dir():
        raise UsageError(f"out {str(folder)!r} must be a folder, and is a file")
    done: list[Round] = []
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
        done = _finished(folder, settings, len(shares) + 1)
        if done:
            _restore(done[-1], model, pruner)
    for number in range(len(done), len(shares) + 1):
        if number:
            pruner.prune_(shares[number - 1])
            pruner.rewind_(rewind_to)
        torch.manual_seed(seed + number + 1)
        train(model, pruner, number)
        pruner.apply_()
        report = pruner.report()
        metrics = {name: float(value) for name, value in evaluate(model).items()}
        place = None if folder is None else folder / f"round-{number:02d}"
        done.append(Round(number, report.density, report.density_of_all, metrics, place))
        if place is not None:
            _write(place, done[-1], settings, model, pruner)
    return done


def _words(options: Mapping[str, Any]) -> str:
    """Options as text that is the same in another process: a function by its name, not by its address."""
    named = {
        name: f"{value.__module__}.{value.__qualname__}" if hasattr(value, "__qualname__") else value
        for name, value in options.items()
    }
    return repr(sorted(named.items()))


def _write(place: Path, found: Round, settings: dict[str, Any], model: nn.Module, pruner: MagnitudePruner) -> None:
    state = pruner.state_dict()
    # "init" is made anew from the seed; others can be made by training only
    later = {
        f"{label}/{name}": tensor
        for label, snapshot in state["snapshots"].items()
        if label != "init"
        for name, tensor in snapshot.items()
    }
    with folder_atomically(place) as fresh:
        save_sparse(model, fresh / "model.safetensors", masks=pruner.masks)
        if later:
            save_file(later, fresh / "snapshots.safetensors")
        row = asdict(found) | {"folder": None, "settings": settings}
        (fresh / "round.json").write_text(json.dumps(row, indent=1))


def _finished(folder: Path, settings: dict[str, Any], most: int) -> list[Round]:
    found = []
    for number in range(most):
        place = folder / f"round-{number:02d}"
        if not (place / "round.json").is_file():
            break
        row = read_json(place / "round.json")
        for name, value in settings.items():
            if row.get("settings", {}).get(name) != value:
                was = row.get("settings", {}).get(name)
                raise UsageError(
                    f"out {str(folder)!r} holds a run with {name} {was}, not {value}: choose another folder"
                )
        found.append(Round(number, row["density"], row["density_of_all"], row["metrics"], place))
    return found


def _restore(last: Round, model: nn.Module, pruner: MagnitudePruner) -> None:
    assert last.folder is not None
    load_sparse(last.folder / "model.safetensors", model)
    masks = sparse_masks(last.folder / "model.safetensors")
    state = pruner.state_dict()
    pruner.load_state_dict(state | {"masks": state["masks"] | masks, "round": last.round})
    later = last.folder / "snapshots.safetensors"
    if later.is_file():
        snapshots: dict[str, dict[str, Tensor]] = {}
        try:
            held = load_file(later)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{later} is damaged or no safetensors file: {reason(error)}") from error
        for key, tensor in held.items():
            label, _, name = key.partition("/")
            snapshots.setdefault(label, {})[name] = tensor
        for label, snapshot in snapshots.items():
            pruner.load_snapshot(snapshot, label)
