"""FlexRound against AdaRound, AdaQuant and round-to-nearest, on one trained network per seed.

All methods share the grid, the calibration data and the number of steps; every method gets the same number of settings,
chosen by the error on held-out data. What is compared is the error of the network's output, since a small test set
cannot tell methods apart by accuracy at four bits.
"""

import math
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
from torch import nn

from weightsmith.core.errors import UsageError, require
from weightsmith.experiments.auto_round import PURPOSE, auto_round_, installed, report_left_out
from weightsmith.experiments.output_error import batches_of, relative_error
from weightsmith.lab.experiment import Arm, Chart, Claim, Experiment, Metric, Value
from weightsmith.lab.job import Job
from weightsmith.lab.sweep import sweep
from weightsmith.lab.task import Task
from weightsmith.lab.tasks import TrainConfig, shared_task
from weightsmith.lab.tasks.tokenized import is_causal_transformer, tokenizer_of
from weightsmith.quantize import Grid, LearningOptions, adaquant_, adaround_, flexround_, round_to_nearest_
from weightsmith.quantize.report import Report

_ALL_BITS = (4, 3, 2)
_PARTS: Mapping[str, Mapping[str, Any]] = {
    "flexround-fixed-step": {"learn_s1": False},
    "flexround-elements": {"use_s3": False, "use_s4": False},
}
Rounding = Callable[..., Report]


@dataclass(frozen=True, slots=True)
class Config(TrainConfig):
    """What the FlexRound experiment compares, and how."""

    DEFAULT_MODELS: ClassVar[Mapping[str, str]] = {
        **TrainConfig.DEFAULT_MODELS,
        "images": "weightsmith.experiments.flexround:small_cnn",
    }

    lr: float = 3e-3
    """Learning rate of AdamW for the network that is quantized; unused for a pretrained model or a checkpoint."""
    bits: tuple[int, ...] = (4, 3)
    """Bit widths of weights, of 4, 3 and 2."""
    granularity: Literal["channel", "tensor"] = "tensor"
    """Which weights share a step: the paper has one per tensor for convolutional networks."""
    search: Literal["minmax", "shrink"] | None = "shrink"
    """How the range of the grid is found."""
    blocks: str = "auto"
    """Which blocks are rounded together."""
    samples: int = 256
    """Calibration examples."""
    round_batch: int = 32
    """Calibration examples per step."""
    iterations: int = 300
    """Steps per block."""
    long: int = 4
    """The long AdaRound arm takes this many times the steps."""
    flexround_lrs: tuple[float, ...] = (5e-3, 1e-2, 2e-2, 4e-2)
    """Learning rates that FlexRound and its ablations are tried at."""
    adaquant_lrs: tuple[float, ...] = (3e-3, 1e-2, 3e-2, 1e-1)
    """Learning rates that AdaQuant is tried at."""
    adaround_lrs: tuple[float, ...] = (3e-2, 1e-1)
    """Learning rates that AdaRound is tried at, each with both penalties."""
    penalties: tuple[float, ...] = (0.01, 0.001)
    """Weights of AdaRound's regularizer."""
    ablations: bool = True
    """Also learn with the step fixed, and without factors per channel."""
    auto_round: bool = field(default_factory=installed)
    """Include the arm that rounds with auto-round: causal language models of Transformers alone. By default where it is
    installed."""
    auto_round_lrs: tuple[float, ...] = (0.5, 1.0, 2.0, 4.0)
    """Learning rates that auto-round is tried at, in units of its own, 1 / iterations."""
    held_out: int = 256
    """Validation examples that settings are chosen by."""

    @property
    def has_auto_round(self) -> bool:
        """Whether auto-round is an arm."""
        return self.auto_round and is_causal_transformer(self)


def arms(config: Config) -> list[Arm]:
    """Round-to-nearest, the learned roundings, and what FlexRound is without its parts."""
    tries = len(config.flexround_lrs)
    found = [
        Arm("rtn", "no learning", "round to nearest"),
        Arm("adaround", f"{config.iterations} steps, {_adaround_tries(config)} settings tried", "AdaRound"),
        Arm("adaround-long", f"{config.long * config.iterations} steps, as many settings", "AdaRound, long"),
        Arm("adaquant", f"{config.iterations} steps, {len(config.adaquant_lrs)} settings tried", "AdaQuant"),
        Arm("flexround", f"{config.iterations} steps, {tries} settings tried", "FlexRound"),
    ]
    if config.ablations:
        found += [
            Arm("flexround-fixed-step", "step s1 not learned", "FlexRound, fixed step"),
            Arm("flexround-elements", "factors per weight only (no s3, s4)", "FlexRound, no channel factors"),
        ]
    if config.has_auto_round:
        found.append(
            Arm(
                "auto-round",
                f"{config.iterations} steps, {len(config.auto_round_lrs)} settings tried, ranges of its own",
                "auto-round",
            )
        )
    return found


def claims(config: Config) -> list[Claim]:
    """FlexRound keeps outputs closer than AdaRound; than round-to-nearest; at the fewest bits also by its parts."""
    fewest = min(config.bits)
    at_fewest = partial(Claim, metric=f"sqnr_w{fewest}", winner="flexround", worth=0.5)
    found = [
        Claim(
            text=f"FlexRound keeps the output closer than AdaRound at {bits} bits and equal steps",
            metric=f"sqnr_w{bits}", winner="flexround", loser="adaround", primary=True, worth=0.5,
            paper="better on every model of the paper",
        )
        for bits in config.bits[:2]
    ]  # fmt: skip
    found += [
        at_fewest(
            text=f"AdaRound keeps the output closer than round-to-nearest at {fewest} bits", winner="adaround",
            loser="rtn",
        ),
        at_fewest(
            text=f"FlexRound keeps the output closer at {fewest} bits than AdaRound with {config.long} times the steps",
            loser="adaround-long", paper="not in the paper",
        ),
    ]  # fmt: skip
    if config.has_auto_round:
        text = f"FlexRound keeps the output closer than auto-round at {fewest} bits and equal steps"
        found.append(at_fewest(text=text, loser="auto-round", paper="not in the paper"))
    if config.ablations:
        found += [
            at_fewest(
                text=f"Learning the step helps FlexRound at {fewest} bits", loser="flexround-fixed-step",
                paper="fixing s1 hurts",
            ),
            at_fewest(
                text=f"Factors per channel help FlexRound at {fewest} bits", loser="flexround-elements",
                paper="dropping s3 and s4 hurts",
            ),
        ]  # fmt: skip
    return found


def metrics(config: Config) -> list[Metric]:
    """The trained network's score, and error, score and cost of its quantized copies."""
    score = config.score_metric()
    found = [replace(score, name="full_score", label=f"{score.label}, full precision", better=None)]
    for bits in config.bits:
        found += [
            Metric(
                f"sqnr_w{bits}", f"SQNR W{bits}, dB", "higher", ".2f", help="||fp||² / ||q − fp||² of test outputs."
            ),
            replace(score, name=f"score_w{bits}", label=f"{score.label}, W{bits}"),
            Metric(f"moved_w{bits}", f"moved W{bits} %", None, ".1f", help="Codes that differ from round-to-nearest."),
            Metric(
                f"seconds_w{bits}", f"seconds W{bits}", "lower", ".1f", help="One rounding, chosen settings.", cost=True
            ),
        ]
    return found


CHARTS = tuple(
    Chart(
        title=f"Error of each block's output on calibration data, {bits} bits", x="block", y="block_error",
        phase=f"W{bits}", x_label="block", y_label="relative squared error", log_y=True,
    )
    for bits in _ALL_BITS
)  # fmt: skip


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    config.check()
    if not config.bits or not set(config.bits) <= set(_ALL_BITS):
        raise UsageError(f"bits must be some of {_ALL_BITS}, got {config.bits}")
    tries = {
        "flexround_lrs": len(config.flexround_lrs),
        "adaquant_lrs": len(config.adaquant_lrs),
        "adaround_lrs times penalties": _adaround_tries(config),
    }
    if config.has_auto_round:
        require("auto_round", extra="quantize", purpose=PURPOSE)
        tries["auto_round_lrs"] = len(config.auto_round_lrs)
    elif config.auto_round:
        report_left_out(config.model_name or config.task)
    if len(set(tries.values())) > 1:
        raise UsageError(
            f"{', '.join(tries)} must give every method the same number of settings, got "
            f"{', '.join(map(str, tries.values()))}"
        )


def _adaround_tries(config: Config) -> int:
    return len(config.adaround_lrs) * len(config.penalties)


def start(config: Config, seed: int, folder: Path) -> dict[str, Any]:
    """The trained network, and its score."""
    task = shared_task(config)
    model = config.network(task, seed)
    if not (config.pretrained or config.checkpoint):
        optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
        config.fit(model, optimizer, task, seed, validate="never", folder=folder)
    return {"weights": model.state_dict(), "score": config.score(task, model)}


def job(config: Config, job: Job) -> Mapping[str, Value]:
    """Quantize one network by one method at every bit width."""
    task = shared_task(config)
    generator = torch.Generator().manual_seed(job.seed)
    order = torch.randperm(len(task.train), generator=generator)[: config.samples]
    calibration = task.train.__getitems__(order).to(job.device).inputs
    trained = _fresh(config, job, task)
    found: dict[str, Value] = {"full_score": float(torch.as_tensor(job.start["score"]).double().mean())}
    for bits in config.bits:
        grid = Grid(bits, granularity=config.granularity, search=config.search)
        tries = _settings(config, job.arm)
        held_out = batches_of(task.held_out["validation"], config.held_out)

        def attempt(setting: float, _: int) -> tuple[float, tuple[nn.Module, Report]]:
            model = _fresh(config, job, task)
            report = tries[int(setting)](model, calibration, grid, seed=job.seed)  # noqa: B023
            error = relative_error(model, trained, held_out)  # noqa: B023
            job.record({"setting": setting, "held_out_error": error, "bits": bits}, phase="settings")  # noqa: B023
            return error, (model, report)

        model, report = sweep([float(index) for index in range(len(tries))], attempt, better="lower").best.result
        for index, block in enumerate(report.blocks):
            job.record({"block": index, "block_error": block.error or math.nan}, phase=f"W{bits}")
        error = relative_error(model, trained, batches_of(task.held_out["test"]))
        weights = sum(layer.numel for layer in report.layers)
        moved = sum(layer.moved * layer.numel for layer in report.layers)
        found |= {
            f"sqnr_w{bits}": -10 * math.log10(max(error, sys.float_info.min)),
            f"score_w{bits}": config.score(task, model),
            f"moved_w{bits}": 100 * moved / weights if weights else None,  # auto-round tells nothing about layers
            f"seconds_w{bits}": report.seconds,
        }
    return found


def _fresh(config: Config, job: Job, task: Task) -> nn.Module:
    model = config.network(task, job.seed)
    model.load_state_dict(job.start["weights"])
    return model.to(job.device).eval()


def _settings(config: Config, arm: str) -> list[Rounding]:
    """Every setting that an arm is tried with, as ``(model, calibration, grid, seed=) -> report``."""
    if arm == "rtn":
        nearest = partial(round_to_nearest_, blocks=config.blocks, batch_size=config.round_batch, measured_batches=None)
        return [lambda model, calibration, grid, **_: nearest(model, calibration, grid)]
    if arm == "auto-round":
        by_auto_round = partial(
            auto_round_, tokenizer=tokenizer_of(config), iterations=config.iterations, batch_size=config.round_batch
        )
        return [partial(by_auto_round, rate=rate) for rate in config.auto_round_lrs]
    verb, tries = {
        "adaround": (adaround_, [{"lr": lr, "penalty": p} for lr in config.adaround_lrs for p in config.penalties]),
        "adaquant": (adaquant_, [{"lr": lr} for lr in config.adaquant_lrs]),
        "flexround": (flexround_, [{"lr": lr} for lr in config.flexround_lrs]),
    }[arm.partition("-")[0]]
    learned: Rounding = partial(
        verb, blocks=config.blocks, batch_size=config.round_batch, options=LearningOptions(measured_batches=None),
        iterations=config.iterations * (config.long if arm == "adaround-long" else 1), **_PARTS.get(arm, {}),
    )  # fmt: skip
    return [partial(learned, **setting) for setting in tries]


def small_cnn(*, channels: int, size: int, classes: int) -> nn.Sequential:
    """Four convolutions, one of them depthwise and one 1 x 1, and two linear layers; each block is one layer."""

    def conv(inputs: int, outputs: int, kernel: int, *more: nn.Module, groups: int = 1) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups), nn.ReLU(), *more)

    side = size // 4
    return nn.Sequential(
        conv(channels, 16, 3),
        conv(16, 16, 3, groups=16),
        conv(16, 32, 1, nn.MaxPool2d(2)),
        conv(32, 32, 3, nn.MaxPool2d(2)),
        nn.Sequential(nn.Flatten(), nn.Linear(32 * side**2, 64), nn.ReLU()),
        nn.Sequential(nn.Linear(64, classes), nn.Identity()),
    )


def steps(config: Config, _: str) -> int:
    """Training steps of a job: none; rounding takes ``iterations`` steps per block, setting and bit width."""
    return config.iterations * len(config.bits) * len(config.flexround_lrs)


EXPERIMENT = Experiment(
    slug="flexround",
    title="FlexRound against AdaRound and round-to-nearest",
    question=(
        "At equal bit width, grid, calibration data and number of steps: does division by learned factors keep a "
        "network's output closer to what it was than a learned choice between floor and ceiling?"
    ),
    presets={
        "smoke": Config(
            train_examples=400, epochs=2, bits=(3,), samples=64, iterations=20, long=2, flexround_lrs=(5e-3,),
            adaquant_lrs=(1e-2,), adaround_lrs=(3e-3,), penalties=(0.01,), auto_round_lrs=(1.0,),
        ),
        "laptop": Config(),
        "paper": Config(
            task="language", data="allenai/c4", subset="en", model="meta-llama/Llama-2-7b-hf", pretrained=True,
            bits=(4, 3), granularity="channel", search="minmax", samples=512, round_batch=2, iterations=5000,
            length=2048, flexround_lrs=(3e-3, 2.5e-3), adaquant_lrs=(3e-3, 1e-2), adaround_lrs=(3e-3, 1e-2),
            penalties=(0.01,), auto_round_lrs=(1.0, 2.0), ablations=False,
        ),
    },
    arms=arms,
    claims=claims,
    metrics=metrics,
    charts=CHARTS,
    start=start,
    job=job,
    task=shared_task,
    steps=steps,
    check=check,
    reading=(
        "Accuracy on a small test set cannot tell methods apart at 4 bits: one image of digits is 0.28 points. The "
        "claims are therefore about the error of the output, as a ratio in decibels: 3 dB is half of the error. "
        "Settings are chosen per arm, seed and bit width by the error on held-out data, with the same number of tries "
        "for every method; the long arm shows what AdaRound gains from more steps. Whatever the optimization does, a "
        "block keeps round-to-nearest when nothing better was found."
    ),
)  # fmt: skip
