"""Is there a winning ticket: does a pruned network, put back to its first weights, train as well as the dense one?

The dense network and the rounds of pruning are done once per seed; each control has the ticket's density and is trained
for as many steps. Any task will do; the paper's is to take noise, haze and rain off photographs.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.experiments.restored_pictures import keep_pictures
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric, Value
from weightsmith.lab.job import Job
from weightsmith.lab.task import Task
from weightsmith.lab.tasks import TrainConfig, make_task, shared_task
from weightsmith.lab.train import Fitted, Hook
from weightsmith.prune import MagnitudePruner, save_sparse
from weightsmith.prune.lottery import rounds_for
from weightsmith.prune.scoring import check_amount

_CLEAR = 1.0  # dB over the input from which on a network has learned to restore


@dataclass(frozen=True, slots=True)
class Config(TrainConfig):
    """What the experiment on lottery tickets compares, and how."""

    task: str = "restoration"
    """What to train on: restoration, images, sentences, language, questions, or your own."""
    steps: int | None = 250
    """Optimizer steps of every training, the dense one's and those of the rounds."""
    batch_size: int = 6
    """Examples per step."""
    lr: float = 2e-3
    """Learning rate of AdamW."""
    warmup: float = 20
    """Steps in which it rises, or epochs when epochs are given."""
    density: float = 0.25
    """Share of prunable weights that is left at the end."""
    amount: float = 0.5
    """Share of what is left that a round prunes."""
    scope: Literal["layerwise", "global"] = "layerwise"
    """What shares a threshold; the paper's global one empties layers when training is short."""
    rank_by: Literal["magnitude", "magnitude_normalized"] = "magnitude"
    """What is ranked."""


def arms(config: Config) -> list[Arm]:
    """The ticket, what it is compared with, and the controls that could explain it away."""
    found = [
        Arm("dense", "nothing pruned", "dense"),
        Arm("imp", "pruned round by round, rewound to its first weights", "ticket"),
        Arm("oneshot", "pruned once to the same density, rewound", "one shot"),
        Arm("fresh", "the ticket's mask with other first weights", "mask, fresh weights"),
        Arm("random", "a random mask of the same density per layer, first weights", "random mask"),
        Arm("finetuned", "the ticket's mask on the weights of the round before, trained on", "no rewinding"),
    ]
    if config.degradations:
        found.append(Arm("small", "a narrow dense network with as many parameters", "small dense"))
        found.append(Arm("input", "the degraded image as it is", "input"))
    return found


def claims(config: Config) -> list[Claim]:
    """As good as dense, and better than each control."""
    least, ticket = config.least, partial(Claim, metric="score", winner="imp")
    found = [
        ticket(
            text="The ticket is as good as the dense network", loser="dense", primary=True, margin=-least, worth=least,
            paper="10 % of the parameters keep the quality of deraining, dehazing and denoising",
        ),
        ticket(text="The ticket is better than its mask with fresh weights", loser="fresh", primary=True, worth=least),
        ticket(text="The ticket is better than pruning in one shot", loser="oneshot"),
        ticket(text="The ticket is better than a random mask", loser="random"),
        ticket(text="Rewinding is better than training on", loser="finetuned"),
    ]  # fmt: skip
    if config.degradations:
        found += [
            ticket(text="The ticket is better than a small dense network", loser="small"),
            Claim(
                text=f"The dense network improves its worst degradation by more than {_CLEAR:g} dB",
                metric="worst_gain", winner="dense", loser="input", gate=True, margin=_CLEAR,
            ),
        ]  # fmt: skip
    return found


def metrics(config: Config) -> list[Metric]:
    """Quality, and what is left of the network."""
    found = [
        config.score_metric(),
        Metric("density", "prunable kept %", None, ".1f", help="Share of prunable weights."),
        Metric("density_of_all", "all kept %", None, ".1f", help="Share of all parameters, of the dense network."),
        Metric("empty", "empty tensors", None, ".0f", help="Weights of which nothing is left."),
    ]
    if config.degradations:
        found.insert(
            1, Metric("worst_gain", "worst gain dB", "higher", ".2f", help="Over the input, worst degradation.")
        )
        found += [Metric(f"psnr_{kind}", f"PSNR, {kind}", "higher", ".2f") for kind in config.degradations]
    return found


CHARTS = (
    Chart(
        title="Score of the ticket, round by round", x="density", y="round_score", phase="rounds", x_label="density %",
        y_label="validation score", log_x=True,
    ),
    Chart(title="Training loss", x="step", y="train_loss", phase="final", y_label="training loss"),
)  # fmt: skip


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    config.check("lr")
    rounds_for(config.density, check_amount(config.amount))


def _pruner(config: Config, model: nn.Module, seed: int) -> MagnitudePruner:
    found = MagnitudePruner(model, scope=config.scope, score=config.rank_by, seed=seed)
    found.snapshot()
    return found


def _fit(
    config: Config, task: Task, model: nn.Module, pruner: MagnitudePruner | None, seed: int, folder: Path, **more: Any
) -> Fitted:
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    hooks = [Hook(after_step=partial(_mask, pruner))] if pruner is not None else []
    return config.fit(model, optimizer, task, seed, hooks=hooks, folder=folder, warmup=config.warmup, **more)


def _mask(pruner: MagnitudePruner) -> None:
    pruner.apply_()


def start(config: Config, seed: int, folder: Path) -> dict[str, Any]:
    """Train the dense network, and prune, rewind and train it round by round."""
    task = shared_task(config)
    model = config.network(task, seed)
    pruner = _pruner(config, model, seed)
    fitted = _fit(config, task, model, pruner, seed, folder / "dense", validate="never")
    dense, rows, diverged = _copied(model), [_row(config, task, model, pruner, 0)], fitted.diverged
    shares = rounds_for(config.density, config.amount)
    for number, share in enumerate(shares, 1):
        trained = _copied(model)
        pruner.prune_(share)
        pruner.rewind_()
        if number < len(shares):  # the last ticket is trained by its arm
            fitted = _fit(config, task, model, pruner, seed + number, folder / f"round-{number}", validate="never")
            diverged = diverged or fitted.diverged
            rows.append(_row(config, task, model, pruner, number))
    return {
        "dense": dense,
        "trained": trained,
        "masks": {name: mask.to(torch.uint8) for name, mask in pruner.masks.items()},
        "rows": rows,
        "diverged": diverged,
    }


def _copied(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().clone() for name, tensor in model.state_dict().items()}


def _row(config: Config, task: Task, model: nn.Module, pruner: MagnitudePruner, number: int) -> dict[str, float]:
    score = config.score(task, model, "validation")
    value = score.mean().item() if isinstance(score, Tensor) else float(score)
    return {"round": float(number), "density": 100 * pruner.report().density, "round_score": value}


def job(config: Config, job: Job) -> Mapping[str, Value]:
    """Train one arm at the ticket's density."""
    task = shared_task(config)
    begin: dict[str, Any] = job.start
    job.diverged = bool(begin["diverged"])
    dense = config.network(task, job.seed).to(job.device)
    total = sum(parameter.numel() for parameter in dense.parameters())
    if job.arm == "input":
        keep_pictures(job, task, nn.Identity(), "degraded", order=0, clean=True)
        return _measured(config, task, nn.Identity(), None, total)
    if job.arm == "small":
        return _small(config, job, task, dense, total)
    model = dense
    pruner = _pruner(config, model, job.seed)
    last = len(rounds_for(config.density, config.amount))
    if job.arm == "dense":
        model.load_state_dict(begin["dense"])
        _keep(config, job, task, model, "restored, dense", order=1)
        return _measured(config, task, model, pruner, total)
    if job.arm == "oneshot":
        model.load_state_dict(begin["dense"])
        pruner.prune_(1 - config.density)
        pruner.rewind_()
    else:
        for name, mask in begin["masks"].items():
            pruner.masks[name].copy_(mask.bool())
        if job.arm == "imp":
            for row in begin["rows"]:
                job.record(row, phase="rounds")
            pruner.rewind_()
        elif job.arm == "fresh":
            pruner.load_snapshot(config.network(task, job.seed + 1_000_003).state_dict(), "fresh")
            pruner.rewind_("fresh")
        elif job.arm == "random":
            pruner.rewind_()
            pruner.shuffle_()
            pruner.rewind_()
        else:
            model.load_state_dict(begin["trained"])
            pruner.apply_()
    record = partial(job.record, phase="final")
    fitted = _fit(config, task, model, pruner, job.seed + last, job.folder, validate="last", record=record)
    job.diverged = job.diverged or fitted.diverged
    if job.arm == "imp":
        _keep(config, job, task, model, "restored, ticket", order=2, masks=pruner.masks)
    return _measured(config, task, model, pruner, total)


def _keep(
    config: Config, job: Job, task: Task, model: nn.Module, caption: str, *, order: int,
    masks: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Keep pictures and weights of a network that restores; ``weightsmith restore`` reads them."""
    if config.degradations:
        keep_pictures(job, task, model, caption, order=order)
        save_sparse(model, job.keep / "model.safetensors", masks=masks)


def _small(config: Config, job: Job, task: Task, dense: nn.Module, total: int) -> Mapping[str, Value]:
    """A dense network of the ticket's size: the width that comes closest to as many parameters."""
    kept = total * _measured_density(config, dense)
    widths = range(2, int(config.model_name.partition("-")[2] or 48) + 1, 2)

    def numel(width: int) -> int:
        return sum(p.numel() for p in make_task(replace(config, model=f"promptir-{width}")).build().parameters())

    width = min(widths, key=lambda width: abs(numel(width) - kept))
    model = config.network(make_task(replace(config, model=f"promptir-{width}")), job.seed).to(job.device)
    record = partial(job.record, phase="final")
    fitted = _fit(config, task, model, None, job.seed, job.folder, validate="last", record=record)
    job.diverged = job.diverged or fitted.diverged
    return _measured(config, task, model, None, total)


def _measured_density(config: Config, model: nn.Module) -> float:
    """Share of all parameters that the ticket keeps."""
    tensors = MagnitudePruner(model).report().tensors
    total = sum(tensor.numel for tensor in tensors)
    return sum(tensor.numel * (config.density if tensor.prunable else 1) for tensor in tensors) / total


def _measured(
    config: Config, task: Task, model: nn.Module, pruner: MagnitudePruner | None, total: int
) -> Mapping[str, Value]:
    outcome = task.evaluate(model, "test")
    scale = 100.0 if config.in_points else 1.0
    found: dict[str, Value] = {"score": outcome.value(task.metric.name, scale)}
    if pruner is not None:
        report = pruner.report()
        found |= {
            "density": 100 * report.density,
            "density_of_all": 100 * report.density_of_all,
            "empty": float(len(report.empty)),
        }
    else:
        own = sum(parameter.numel() for parameter in model.parameters())
        found |= {"density": None, "density_of_all": 100 * own / total, "empty": None}
    if config.degradations:
        gains = [outcome.metrics[f"gain_{kind}"] for kind in config.degradations]
        found["worst_gain"] = math.nan if any(map(math.isnan, gains)) else min(gains)
        found |= {f"psnr_{kind}": outcome.metrics[f"psnr_{kind}"] for kind in config.degradations}
    return found


def steps(config: Config, arm: str) -> int:
    """Training steps of a job, a share of those that are done once per seed with it."""
    rounds = len(rounds_for(config.density, config.amount))
    own = 0 if arm in ("dense", "input") else 1
    return round(config.total_steps(shared_task(config)) * (own + rounds / len(arms(config))))


EXPERIMENT = Experiment(
    slug="mir-l",
    title="Winning tickets: pruned networks put back to their first weights",
    question=(
        "Train a network, remove its smallest weights, put the others back to their first values, train again, and so "
        "on. Does what is left reach the dense network, and does it need just these first weights?"
    ),
    presets={
        "smoke": Config(
            task="images", model="mlp", train_examples=300, steps=60, batch_size=32, density=0.25, amount=0.5, warmup=5
        ),
        "laptop": Config(),
        "long": Config(model="promptir-16", size=24, steps=800, batch_size=9, lr=3e-3),
        "paper": Config(
            model="promptir", size=64, steps=None, epochs=120, batch_size=8, lr=2e-4, warmup=15, density=0.8**15,
            amount=0.2, scope="global",
        ),
    },
    arms=arms,
    claims=claims,
    metrics=metrics,
    job=job,
    start=start,
    task=shared_task,
    steps=steps,
    charts=CHARTS,
    check=check,
    reading=(
        "Every round is a training of its own: the whole costs as many trainings as there are rounds, and one more. "
        "Short training says little about tickets: where photographs are restored, a gate demands that the dense "
        "network has clearly learned each of the tasks before any claim is judged. Networks do not get faster by zeros."
    ),
)  # fmt: skip
