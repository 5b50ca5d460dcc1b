"""Does weighting checkpoints by their loss or step beat averaging them uniformly, and does either beat the last one?

One LoRA fine-tuning run per seed and learning-rate schedule is cut into checkpoints; every arm makes one model of them.
All arms of a seed see the same run, so that they differ in nothing but the merge.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils import parametrize

from weightsmith.average import average_state_dicts, ema, greedy_members, metric_weights, swa
from weightsmith.average.low_rank import best_of_rank, covariance_gap, stacked
from weightsmith.core.errors import UsageError, require
from weightsmith.experiments._questions import encode, exact_matches, find_questions, load_questions
from weightsmith.lab.claim import Arm, Chart, Claim, Experiment, Metric
from weightsmith.lab.data import check_data, load_images
from weightsmith.lab.models import build_model, check_model
from weightsmith.lab.record import Recorder
from weightsmith.lab.train import evaluate, seed_everything

State = dict[str, Tensor]
_VALIDATION = 0.1  # share of the training questions that is held out


@dataclass(frozen=True, slots=True)
class Config:
    """What the experiment on checkpoint merging compares, and how."""

    task: Literal["images", "language"] = "images"
    """images: pretrain on half of the classes, fine-tune on all; language: fine-tune on questions and answers."""
    data: str = "digits"
    """Images: name, hub id or folder. Language: arithmetic, a folder with train.jsonl and test.jsonl, or a hub id."""
    model: str = "mlp"
    """Images: mlp, vit_tiny, ... Language: folder or hub id of a causal language model."""
    train_examples: int | None = None
    """Use the first so many training rows, validation included; all by default."""
    test_examples: int | None = None
    """Use the first so many test rows; all by default."""
    pretrain_steps: int = 300
    """Images: optimiser steps on the lower half of the classes before fine-tuning."""
    label_noise: float = 0.3
    """Images: share of the fine-tuning labels that are drawn at random."""
    steps: int = 1000
    """Optimiser steps of fine-tuning."""
    save_every: int = 50
    """Steps between checkpoints."""
    batch_size: int = 16
    """Examples per step."""
    lr: float = 5e-3
    """Learning rate of AdamW."""
    rank: int = 8
    """Of the LoRA adapters, which are put on every linear layer but a language model's head."""
    alpha: float = 16.0
    """Their scaling is alpha / rank."""
    last: int = 10
    """How many checkpoints the merges take."""
    few: int = 4
    """How many the short uniform merge (LAWA) takes."""
    loss_penalty: float = 4.0
    """Penalty of the loss-weighted power merges."""
    linear_penalty: float = 0.7
    """Penalty of the loss-weighted linear merge."""
    steps_penalty: float = 1.0
    """Penalty of the step-weighted power merge."""
    ema_decay: float = 0.99
    """Per step, of the moving average kept during training."""
    length: int = 256
    """Language: tokens per row."""
    subset: str = ""
    """Language: configuration of the hub data set."""
    harder: str = ""
    """Language: a second set of test questions; accuracy is then 0.3 of the first and 0.7 of this one."""
    new_tokens: int = 0
    """Language: tokens generated per answer, for exact matches; 0 measures predicted answer tokens instead."""


def arms(config: Config) -> list[Arm]:
    """Single checkpoints, the usual averages, and the weighted ones in factor and in update space."""
    k = config.last
    return [
        Arm("last", "the last checkpoint"),
        Arm("best", f"the best of the last {k} on validation data"),
        Arm("lawa", f"uniform average of the factors of the last {config.few}"),
        Arm("uniform", f"uniform average of the factors of the last {k}"),
        Arm("loss", f"last {k}, factors, loss^-{config.loss_penalty:g}"),
        Arm("loss-linear", f"last {k}, factors, linear in the loss, penalty {config.linear_penalty:g}"),
        Arm("steps", f"last {k}, factors, step^{config.steps_penalty:g}"),
        Arm("uniform-exact", f"last {k}, uniform, exact average of the updates"),
        Arm("loss-exact", f"last {k}, loss^-{config.loss_penalty:g}, exact average of the updates"),
        Arm("uniform-svd", f"last {k}, uniform, best rank-{config.rank} approximation of the exact average"),
        Arm("greedy", f"greedy soup of the last {k}, by validation loss"),
        Arm("ema", f"moving average kept at every step, decay {config.ema_decay:g}"),
        Arm("swa", f"mean of every step since the first of the last {k}"),
    ]


def claims(_: Config) -> list[Claim]:
    """Averaging helps, also after decay; weighting beats uniform and costs no accuracy; so does averaging updates."""
    gain = "up to 5 % higher task accuracy than the uniform merge"
    ours = "not in the paper"
    return [
        Claim("A uniform average beats the last checkpoint", "loss", "uniform", "last", "lower", paper="baseline"),
        Claim(
            "The loss-weighted average beats the last checkpoint",
            "accuracy", "loss", "last", paper="math score +5.05 % relative, best of all merges",
        ),
        Claim("Loss weights beat uniform ones", "loss", "loss", "uniform", "lower", paper=gain),
        Claim("Loss weights cost no accuracy (0.3 points)", "accuracy", "loss", "uniform", margin=-0.3, paper=gain),
        Claim("Linear loss weights beat uniform ones", "loss", "loss-linear", "uniform", "lower", paper=gain),
        Claim("Step weights beat uniform ones", "loss", "steps", "uniform", "lower", paper="better than uniform"),
        Claim("Averaging updates beats averaging factors", "loss", "uniform-exact", "uniform", "lower", paper=ours),
        Claim(
            "After the learning rate has decayed to 0, a uniform average still beats the last checkpoint",
            "cosine_loss", "uniform", "last", "lower", paper=ours,
        ),
    ]  # fmt: skip


METRICS = (
    Metric("loss", "test loss", "lower", ".4f", "On the test split, constant learning rate."),
    Metric("accuracy", "test accuracy %", "higher", ".2f", "On the test split, constant learning rate."),
    Metric("cosine_loss", "test loss, cosine", "lower", ".4f", "Learning rate decayed to 0 along a cosine."),
    Metric("cosine_accuracy", "test accuracy %, cosine", "higher", ".2f", "Learning rate decayed likewise."),
    Metric("gap", "covariance gap", None, ".3f", "Share of the average update that averaging factors loses, mean."),
    Metric("spread", "largest weight × n", None, ".2f", "1 for uniform weights over all that are merged."),
)

CHARTS = (
    Chart("Checkpoints of the run, constant rate", "step", "validation_loss", phase="constant", arms=("last",)),
    Chart("Checkpoints of the run, cosine", "step", "validation_loss", phase="cosine", arms=("last",)),
    Chart("Training loss since the checkpoint before", "step", "train_loss", phase="constant", arms=("last",)),
    Chart("What each checkpoint weighs", "step", "weight", phase="weights", arms=("loss", "loss-linear", "steps")),
)


class LowRank(nn.Module):
    """``W + (alpha / r) B A``, ``A (r, in)``, ``B (out, r)``; ``B`` begins at 0 (arXiv 2106.09685, section 4.1)."""

    def __init__(self, weight: Tensor, rank: int, alpha: float) -> None:
        super().__init__()
        out, into = weight.shape
        self.scale = alpha / rank
        self.a = nn.Parameter(nn.init.kaiming_uniform_(weight.new_empty(rank, into), a=math.sqrt(5)))
        self.b = nn.Parameter(weight.new_zeros(out, rank))

    def forward(self, weight: Tensor) -> Tensor:
        """Add the update to ``weight (out, in)``."""
        return weight + self.scale * self.b @ self.a


@dataclass(frozen=True, slots=True)
class Problem:
    """What is fine-tuned, and how well a state of it does.

    Attributes:
        model: The pretrained model.
        targets: Its linear layers that get an adapter.
        loss: ``generator -> loss`` of a random batch.
        validate: Loss and accuracy in [0, 1] on held-out data.
        test: The same on the test split.
    """

    model: nn.Module
    targets: list[nn.Linear]
    loss: Callable[[torch.Generator], Tensor]
    validate: Callable[[], dict[str, float]]
    test: Callable[[], dict[str, float]]


@dataclass(frozen=True, slots=True)
class Run:
    """One finished fine-tuning run.

    Attributes:
        problem: With the adapters taken off again.
        states: Factors of all adapters at each checkpoint.
        losses: Mean training loss since the checkpoint before.
        averages: Factors of the averages kept during training, by arm.
    """

    problem: Problem
    states: list[State]
    losses: list[float]
    averages: dict[str, State]


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    saved = config.steps // config.save_every
    if not 1 <= config.few <= config.last <= saved:
        raise UsageError(
            f"few and last must be at least 1, few at most last and last at most steps / save_every = {saved}, "
            f"got {config.few} and {config.last}"
        )
    check_model(config.model)
    if config.task == "images":
        check_data(config.data)
    else:
        for name in filter(None, (config.data, config.harder)):
            find_questions(name)


def job(config: Config, arm: str, seed: int, record: Recorder) -> Mapping[str, float]:
    """Fine-tune with both schedules, merge as the arm says, and measure."""
    metrics: dict[str, float] = {}
    for schedule, prefix in (("constant", ""), ("cosine", "cosine_")):
        run = _run(config, seed, schedule)
        members, weights, mode = _recipe(run, config, arm)
        states = [run.states[index] for index in members]
        if arm in run.averages:
            states = [run.averages[arm]]
        with _merged(run.problem, config, states, weights, mode):
            found = run.problem.test()
        metrics |= {f"{prefix}loss": found["loss"], f"{prefix}accuracy": 100 * found["accuracy"]}
        if schedule == "constant":
            metrics |= {"gap": _gap(states, weights), "spread": max(weights) * len(weights)}
            for index, weight in zip(members, weights, strict=True):
                record({"step": (index + 1) * config.save_every, "weight": weight}, phase="weights")
        if arm == "last":
            for index, loss in enumerate(run.losses):
                row = {"step": (index + 1) * config.save_every, "train_loss": loss}
                record(row | _validated(run, config, [index]), phase=schedule)
    return metrics


def _recipe(run: Run, config: Config, arm: str) -> tuple[list[int], list[float], str]:
    """Which checkpoints, with which weights, averaged as what."""
    count = len(run.states)
    members = list(range(count - config.last, count))
    alone = [1.0]
    if arm in ("last", *run.averages):
        return [count - 1], alone, "factors"
    if arm == "best":
        return [min(members, key=lambda index: _validated(run, config, [index])["validation_loss"])], alone, "factors"
    if arm == "greedy":
        score = lambda chosen: -_validated(run, config, [members[index] for index in chosen])["validation_loss"]  # noqa: E731
        members = [members[index] for index in greedy_members(len(members), score)]
    if arm == "lawa":
        members = members[-config.few :]
    losses, steps = [run.losses[index] for index in members], [float(index + 1) for index in members]
    if arm in ("loss", "loss-exact"):
        weights = metric_weights(losses, "loss", "power", config.loss_penalty)
    elif arm == "loss-linear":
        weights = metric_weights(losses, "loss", "linear", config.linear_penalty)
    elif arm == "steps":
        weights = metric_weights(steps, "steps", "power", config.steps_penalty)
    else:
        weights = metric_weights(steps, "steps", "uniform")
    mode = {"uniform-exact": "exact", "loss-exact": "exact", "uniform-svd": "svd"}.get(arm, "factors")
    return members, weights.tolist(), mode


def _validated(run: Run, config: Config, members: Sequence[int]) -> dict[str, float]:
    states = [run.states[index] for index in members]
    with _merged(run.problem, config, states, [1 / len(states)] * len(states), "factors"):
        return {f"validation_{key}": value for key, value in run.problem.validate().items()}


class _merged:  # noqa: N801  (a context manager, used as a verb)
    """The problem's model with merged adapters in its weights, within the block."""

    def __init__(
        self, problem: Problem, config: Config, states: Sequence[State], weights: Sequence[float], mode: str
    ) -> None:
        scale = config.alpha / config.rank
        if mode == "factors":
            states, weights = [average_state_dicts(states, weights)], [1.0]
        self._kept = [(layer.weight, layer.weight.detach().clone()) for layer in problem.targets]
        self._updates = []
        for index in range(len(problem.targets)):
            factors = _factors(states, index)
            a, b = stacked(*factors, [scale * weight for weight in weights])
            if mode == "svd":
                a, b, _ = best_of_rank(a, b, config.rank)
            self._updates.append((a, b))

    @torch.no_grad()
    def __enter__(self) -> None:
        for (weight, _), (a, b) in zip(self._kept, self._updates, strict=True):
            weight.addmm_(b, a)

    @torch.no_grad()
    def __exit__(self, *_: object) -> None:
        for weight, before in self._kept:
            weight.copy_(before)


def _factors(states: Sequence[State], index: int) -> tuple[list[Tensor], list[Tensor]]:
    return [state[f"{index}.a"] for state in states], [state[f"{index}.b"] for state in states]


def _gap(states: Sequence[State], weights: Sequence[float]) -> float:
    layers = {int(name.partition(".")[0]) for name in states[0]}
    return sum(covariance_gap(*_factors(states, index), weights) for index in layers) / len(layers)


@lru_cache(maxsize=4)  # the arms of a seed that fall to one process share its runs
def _run(config: Config, seed: int, schedule: str) -> Run:
    seed_everything(seed)
    problem = _images(config, seed) if config.task == "images" else _language(config)
    for parameter in problem.model.parameters():
        parameter.requires_grad_(False)
    adapters = nn.ModuleList(LowRank(layer.weight, config.rank, config.alpha) for layer in problem.targets)
    for layer, adapter in zip(problem.targets, adapters, strict=True):
        parametrize.register_parametrization(layer, "weight", adapter)
    averages = {"ema": ema(adapters, config.ema_decay), "swa": swa(adapters)}
    optimizer = torch.optim.AdamW(adapters.parameters(), lr=config.lr, weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    states: list[State] = []
    losses: list[float] = []
    since = 0.0
    problem.model.train()
    for step in range(1, config.steps + 1):
        if schedule == "cosine":
            optimizer.param_groups[0]["lr"] = config.lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / config.steps))
        optimizer.zero_grad()
        loss = problem.loss(generator)
        loss.backward()
        optimizer.step()
        since += loss.item()
        averages["ema"].update_parameters(adapters)
        if step > config.steps - config.last * config.save_every:
            averages["swa"].update_parameters(adapters)
        if step % config.save_every == 0:
            states.append({name: tensor.detach().clone() for name, tensor in adapters.state_dict().items()})
            losses.append(since / config.save_every)
            since = 0.0
    for layer in problem.targets:
        parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    problem.model.eval()
    kept = {arm: {**average.module.state_dict()} for arm, average in averages.items()}
    return Run(problem, states, losses, kept)


def _images(config: Config, seed: int) -> Problem:
    data = load_images(config.data, train_examples=config.train_examples, test_examples=config.test_examples)
    model = build_model(config.model, channels=data.channels, size=data.size, classes=data.classes)
    generator = torch.Generator().manual_seed(seed)
    labels = data.train.labels.clone()
    known = (labels < data.classes / 2).nonzero().flatten()
    pretrain = torch.optim.AdamW(model.parameters(), lr=1e-3)

    def batch_loss(rows: Tensor, targets: Tensor, draw: torch.Generator) -> Tensor:
        chosen = rows[torch.randint(len(rows), (config.batch_size,), generator=draw)]
        x, _ = data.train.__getitems__(chosen)
        return F.cross_entropy(model(x), targets[chosen])

    for _ in range(config.pretrain_steps):
        pretrain.zero_grad()
        batch_loss(known, labels, generator).backward()
        pretrain.step()
    noisy = torch.rand(len(labels), generator=generator) < config.label_noise
    targets = torch.where(noisy, torch.randint(data.classes, (len(labels),), generator=generator), labels)
    return Problem(
        model,
        [module for module in model.modules() if isinstance(module, nn.Linear)],
        partial(batch_loss, torch.arange(len(labels)), targets),
        partial(evaluate, model, data.validation),
        partial(evaluate, model, data.test),
    )


def _language(config: Config) -> Problem:
    transformers: Any = require("transformers", extra="hf", purpose="the language task")
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
    model = transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype)
    model.to("cuda" if torch.cuda.is_available() else "cpu")
    train = load_questions(config.data, "train", config.train_examples, config.subset)
    test = [load_questions(config.data, "test", config.test_examples, config.subset)]
    if config.harder:
        test.append(load_questions(config.harder, "test", config.test_examples))
    cut = max(1, round(_VALIDATION * len(train)))
    held_out, kept, tested = (encode(tokenizer, rows, config.length) for rows in (train[:cut], train[cut:], test[0]))
    shares = (0.3, 0.7) if config.harder else (1.0,)

    def test_model() -> dict[str, float]:
        found = tested.measure(model, config.batch_size)
        if config.new_tokens:
            answer = partial(
                exact_matches, model, tokenizer, new_tokens=config.new_tokens, batch_size=4 * config.batch_size
            )
            found["accuracy"] = sum(share * answer(rows) for share, rows in zip(shares, test, strict=True))
        return found

    return Problem(
        model,
        [m for m in model.modules() if isinstance(m, nn.Linear) and m is not model.get_output_embeddings()],
        lambda draw: kept.loss(model, torch.randint(len(kept.inputs), (config.batch_size,), generator=draw)),
        lambda: held_out.measure(model, config.batch_size),
        test_model,
    )


EXPERIMENT = Experiment(
    slug="mwa",
    title="Merging the checkpoints of one run: weighted, uniform, or just the last",
    question=(
        "A run leaves checkpoints and a log. Is a model averaged from them better than the last one, and do weights "
        "from the log beat equal ones?"
    ),
    presets={
        "smoke": Config(train_examples=400, pretrain_steps=50, steps=60, save_every=10, last=4, few=2),
        "laptop": Config(),
        "paper": Config(
            task="language",
            data="openai/gsm8k",
            subset="main",
            harder="qintongli/GSM-Plus",
            model="meta-llama/Llama-3.1-8B",
            steps=2000,
            save_every=100,
            lr=2e-4,
            rank=16,
            alpha=32.0,
            length=512,
            new_tokens=256,
        ),
    },
    arms=arms,
    claims=claims,
    metrics=METRICS,
    charts=CHARTS,
    job=job,
    check=check,
    reading=(
        "The paper publishes no formula for its weights, so the weighted arms are members of a family of our own; its "
        "model, ranks and intervals are not known either, and the paper preset is a setting of that kind. All arms of "
        "a seed merge the same run. Averaging pays while the learning rate is high, because each checkpoint is noisy; "
        "after decay to zero little is left to average out. Compare the gain of weighting over uniform with that of "
        "averaging updates instead of factors before you tune a penalty."
    ),
)
