"""Do block-affine adapters start faster than LoRA and PiSSA, and do they end better?

A trained network is adapted to a task that has changed. Every method trains as many numbers as the others, as nearly as
its form allows. Panel A gives all of them one learning rate, as the paper does; panel B gives each the rate that its
own validation score prefers. A shared block collects the gradients of many blocks, so that one rate for all favours it.
"""

import copy
import math
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.adapt import BoneConfig, apply_bone_, trainable_parameters
from weightsmith.core.errors import UsageError, require
from weightsmith.experiments._questions import encode, exact_matches, find_questions, load_questions
from weightsmith.lab.claim import Arm, Chart, Claim, Experiment, Metric
from weightsmith.lab.data import check_data, load_images
from weightsmith.lab.images import Split
from weightsmith.lab.models import build_model, check_model
from weightsmith.lab.record import Recorder
from weightsmith.lab.sweep import best_of
from weightsmith.lab.train import evaluate, fit, seed_everything

_VALIDATION = 0.1  # share of the training questions that is held out


@dataclass(frozen=True, slots=True)
class Config:
    """What the experiment on adapters compares, and how."""

    task: Literal["images", "language"] = "images"
    """images: adapt a classifier to inverted, transposed images; language: train a model on questions and answers."""
    data: str = "digits"
    """Images: name, hub id or folder. Language: arithmetic, a folder with train.jsonl and test.jsonl, or a hub id."""
    model: str = "mlp"
    """Images: mlp, vit_tiny, ... Language: folder or hub id of a causal language model."""
    subset: str = ""
    """Language: configuration of the hub data set."""
    test_data: str = ""
    """Language: where the test questions come from; the data itself by default."""
    test_subset: str = ""
    """Language: configuration of that hub data set."""
    train_examples: int | None = None
    """Use the first so many training rows, validation included; all by default."""
    test_examples: int | None = None
    """Use the first so many test rows; all by default."""
    pretrain_epochs: int = 10
    """Images: passes over the upright images before adapting."""
    steps: int = 300
    """Optimiser steps of adapting."""
    early: int = 50
    """The step at which the start is compared."""
    curve: int = 10
    """Points of a learning curve, each a pass over the validation data."""
    batch_size: int = 32
    """Examples per step."""
    r: int = 16
    """Block size of the block forms; the LoRA forms get the rank that trains as many numbers as miss."""
    shared_lr: float = 1e-3
    """Panel A: the learning rate of all arms; one of lrs."""
    lrs: tuple[float, ...] = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
    """Panel B: what every arm is tried at."""
    pissa_iterations: int = 0
    """Iterations of the randomised decomposition that PiSSA starts from; 0 decomposes exactly."""
    length: int = 128
    """Language: tokens per row."""
    new_tokens: int = 0
    """Language: tokens generated per answer, for exact matches; 0 measures predicted answer tokens instead."""
    mixed_precision: str | None = None
    """no, fp16 or bf16."""


def arms(config: Config) -> list[Arm]:
    """LoRA and PiSSA as PEFT makes them, three block forms, and for classifiers all weights of the adapted layers."""
    adapters = [
        Arm("lora", "LoRA (PEFT), alpha = 2 × rank"),
        Arm("pissa", "PiSSA (PEFT), alpha = rank"),
        Arm("miss", f"MiSS, r = {config.r}"),
        Arm("col", f"Bone, col, r = {config.r}"),
        Arm("row", f"Bone, row, r = {config.r}"),
    ]
    return [Arm("full", "all weights of the adapted layers"), *adapters] if config.task == "images" else adapters


def claims(_: Config) -> list[Claim]:
    """A faster start at one rate; better at the end at one rate, and at the best rate of each."""
    curves = "shown as training loss curves"
    col, miss = "Llama2-7B, GSM8K %: LoRA 38.97, PiSSA 43.52, Bone 49.36", "Llama2-7B, GSM8K %: LoRA 40.75, MiSS 48.16"
    tuned = "one rate for all methods; rates were not tuned"
    start = "At one shared rate {} has a lower loss early on than {}"
    pairs = (("col", "lora"), ("col", "pissa"), ("miss", "lora"))
    names = {"col": "Bone (col)", "row": "Bone (row)", "miss": "MiSS", "lora": "LoRA", "pissa": "PiSSA"}
    found = [
        Claim(start.format(names[arm], names[rival]), "early_loss", arm, rival, "lower", paper=curves)
        for arm, rival in (*pairs, ("row", "lora"))
    ]
    for metric, when, papers in (
        ("shared_accuracy", "At one shared rate", (col, col, miss)),
        ("tuned_accuracy", "Each at its best rate,", (tuned,) * 3),
    ):
        for (arm, rival), paper in zip(pairs, papers, strict=True):
            text = f"{when} {names[arm]} ends better than {names[rival]}"
            found.append(Claim(text, metric, arm, rival, paper=paper))
    return found


METRICS = (
    Metric("early_loss", "A: early loss", "lower", ".3f", "Validation loss after the early steps, at the shared rate."),
    Metric("shared_loss", "A: test loss", "lower", ".3f", "At the end, at the shared rate."),
    Metric("shared_accuracy", "A: test accuracy %", "higher", ".2f", "At the end, at the shared rate."),
    Metric("tuned_loss", "B: test loss", "lower", ".3f", "At the end, at the rate chosen on validation data."),
    Metric(
        "tuned_accuracy", "B: test accuracy %", "higher", ".2f", "At the end, at the rate chosen on validation data."
    ),
    Metric("best_lr", "B: chosen rate", None, ".3g", "The rate with the best validation score."),
    Metric("first_gradient", "first gradient", None, ".3f", "L2 norm of the first batch's gradient of what trains."),
    Metric("parameters", "trained numbers", None, ".0f", "How many numbers train."),
    Metric("setup_ms", "set-up ms", "lower", ".1f", "Time to put the adapter on the model."),
    Metric("saved_mib", "kept MiB", "lower", ".2f", "What autograd keeps of a batch for the backward pass."),
    Metric("step_ms", "step ms", "lower", ".2f", "Median time of a training step."),
)

CHARTS = (
    Chart("Panel A: validation loss at one shared rate", "step", "loss", phase="shared", y_label="loss", log_y=True),
    Chart("Panel A: validation accuracy at one shared rate", "step", "accuracy", phase="shared", y_label="accuracy"),
    Chart(
        "Panel B: validation loss against the rate",
        "rate", "loss", "scatter", phase="sweep", x_label="learning rate", y_label="loss", log_x=True, log_y=True,
    ),
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Task:
    """What is adapted, and how well a model does.

    Attributes:
        build: Gives the trained model, before it is adapted.
        rows: How many training rows there are.
        loss: ``(model, rows (B,)) -> loss``.
        validate: Loss and accuracy in [0, 1] of a model on held-out data.
        test: The same on the test split.
    """

    build: Callable[[], nn.Module]
    rows: int
    loss: Callable[[nn.Module, Tensor], Tensor]
    validate: Callable[[nn.Module], dict[str, float]]
    test: Callable[[nn.Module], dict[str, float]]


def check(config: Config) -> None:
    """Refuse what cannot run, before any job starts."""
    if config.shared_lr not in config.lrs:
        raise UsageError(f"shared_lr must be one of lrs {config.lrs}, got {config.shared_lr}")
    if config.curve < 1:
        raise UsageError(f"curve must be at least 1, got {config.curve}")
    if not 1 <= config.early <= config.steps:
        raise UsageError(f"early must be between 1 and steps, {config.steps}, got {config.early}")
    require("peft", extra="hf", purpose="the arms LoRA and PiSSA")
    check_model(config.model)
    if config.task == "images":
        check_data(config.data)
    else:
        for name in {config.data, config.test_data} - {""}:
            find_questions(name)


def job(config: Config, arm: str, seed: int, record: Recorder) -> Mapping[str, float]:
    """Adapt one arm with one seed, at every rate of the sweep."""
    seed_everything(seed)
    task = _images(config, seed) if config.task == "images" else _language(config)
    metrics: dict[str, float] = {}

    def adapted() -> nn.Module:
        model = task.build()
        seed_everything(seed)
        start = time.perf_counter()
        model = _adapted(config, arm, model)
        metrics["setup_ms"] = 1e3 * (time.perf_counter() - start)
        return model

    def attempt(lr: float) -> tuple[float, dict[str, Tensor]]:
        shared, model = lr == config.shared_lr, adapted()
        rows = _train(config, task, model, lr, seed)
        for row in rows[1:]:
            record(row, phase="shared" if shared else "other rates", rate=lr)
        last = {name: rows[-1].get(name, math.nan) for name in ("loss", "accuracy")}
        record({**last, "rate": lr}, phase="sweep")
        if shared:
            tested = task.test(model)
            metrics.update(
                early_loss=next((row["loss"] for row in rows[1:] if row["step"] == config.early), math.nan),
                shared_loss=tested["loss"],
                shared_accuracy=100 * tested["accuracy"],
                parameters=trainable_parameters(model).trainable,
                **rows[0],
            )
        score = last["accuracy"] if config.task == "images" else -last["loss"]
        return score, {name: trained.detach().cpu() for name, trained in _trained(model)}

    best_lr, state = best_of(config.lrs, attempt)
    model = adapted()
    with torch.no_grad():
        for name, trained in _trained(model):
            trained.copy_(state[name])
    tested = task.test(model)
    return {**metrics, "best_lr": best_lr, "tuned_loss": tested["loss"], "tuned_accuracy": 100 * tested["accuracy"]}


def _adapted(config: Config, arm: str, model: nn.Module) -> nn.Module:
    layers = _targets(model)
    if arm in ("miss", "col", "row"):
        variant = cast(Literal["miss", "col", "row"], arm)
        return apply_bone_(model, BoneConfig(r=config.r, variant=variant, where=list(layers)))
    model.requires_grad_(False)
    if arm == "full":
        for layer in layers.values():
            layer.weight.requires_grad_(True)
        return model
    peft: Any = require("peft", extra="hf", purpose="the arms LoRA and PiSSA")
    out, both = (
        sum(sizes)
        for sizes in zip(*((m.out_features, m.in_features + m.out_features) for m in layers.values()), strict=True)
    )
    rank = max(1, round(config.r * out / both))
    start = f"pissa_niter_{config.pissa_iterations}" if config.pissa_iterations else "pissa"
    adapter = peft.LoraConfig(
        r=rank,
        lora_alpha=rank if arm == "pissa" else 2 * rank,
        target_modules=list(layers),
        init_lora_weights=start if arm == "pissa" else True,
    )
    return cast(nn.Module, peft.get_peft_model(model, adapter))


def _targets(model: nn.Module) -> dict[str, nn.Linear]:
    """Every linear layer but the last, which is the head."""
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return dict(list(layers.items())[:-1])


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad)


def _train(config: Config, task: Task, model: nn.Module, lr: float, seed: int) -> list[dict[str, float]]:
    """Train what requires a gradient by AdamW along a cosine; the first row tells of the start and of the cost."""
    AcceleratorState._reset_state()  # an earlier run in this process may have had another precision
    accelerator = Accelerator(mixed_precision=config.mixed_precision)
    optimizer = torch.optim.AdamW([parameter for _, parameter in _trained(model)], lr=lr, weight_decay=0.0)
    wrapped, stepper = accelerator.prepare(model, optimizer)
    generator = torch.Generator().manual_seed(seed)
    batches = torch.randint(task.rows, (config.steps, config.batch_size), generator=generator)
    rows = [_start(task, model, batches[0])]
    often, times = max(1, config.steps // config.curve), []
    for step, batch in enumerate(batches, start=1):
        for group in optimizer.param_groups:
            group["lr"] = lr * 0.5 * (1 + math.cos(math.pi * (step - 1) / config.steps))
        wrapped.train()
        start = time.perf_counter()
        stepper.zero_grad()
        loss = task.loss(wrapped, batch[accelerator.process_index :: accelerator.num_processes])
        accelerator.backward(loss)
        stepper.step()
        times.append(time.perf_counter() - start)
        if not math.isfinite(loss.item()):
            rows.append({"step": step})  # a row without a score loses the sweep
            break
        if step % often == 0 or step in (config.early, config.steps):
            model.eval()
            rows.append({"step": step, **task.validate(model)})
    rows[0]["step_ms"] = 1e3 * statistics.median(times)
    return rows


def _start(task: Task, model: nn.Module, batch: Tensor) -> dict[str, float]:
    """How large the first gradient is, and what autograd keeps for it besides the model itself."""
    own = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = task.loss(model, batch)
    gradients = torch.autograd.grad(loss, [parameter for _, parameter in _trained(model)])
    norm = torch.stack([gradient.float().norm() for gradient in gradients]).norm().item()
    return {"first_gradient": norm, "saved_mib": sum(kept.values()) / 2**20}


def _images(config: Config, seed: int) -> Task:
    data = load_images(config.data, train_examples=config.train_examples, test_examples=config.test_examples)
    trained = build_model(config.model, channels=data.channels, size=data.size, classes=data.classes)
    optimizer = torch.optim.AdamW(trained.parameters(), lr=1e-3)
    fit(trained, optimizer, data, epochs=config.pretrain_epochs, batch_size=32, seed=seed, evaluate_each_epoch=False)
    mean, std = (torch.tensor(numbers).view(-1, 1, 1) for numbers in (data.mean, data.std))

    def turned(x: Tensor) -> Tensor:
        # 1 - pixel, in units of the normalised images
        return ((1 - 2 * mean.to(x)) / std.to(x) - x).mT

    def loss(model: nn.Module, rows: Tensor) -> Tensor:
        x, y = data.train.__getitems__(rows)
        device = next(model.parameters()).device
        return F.cross_entropy(model(turned(x.to(device))), y.to(device))

    def measure(split: Split, model: nn.Module) -> dict[str, float]:
        return evaluate(_Turned(model, turned), split)

    return Task(
        lambda: copy.deepcopy(trained),
        len(data.train),
        loss,
        partial(measure, data.validation),
        partial(measure, data.test),
    )


class _Turned(nn.Module):
    """A classifier of turned images."""

    def __init__(self, model: nn.Module, turn: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.model, self.turn = model, turn

    def forward(self, x: Tensor) -> Tensor:
        return self.model(self.turn(x))


def _language(config: Config) -> Task:
    transformers: Any = require("transformers", extra="hf", purpose="the language task")
    tokenizer = transformers.AutoTokenizer.from_pretrained(config.model)
    device = "cuda" if torch.cuda.is_available() else "cpu"

    def build() -> nn.Module:
        dtype = torch.bfloat16 if torch.cuda.is_available() else torch.float32
        return cast(nn.Module, transformers.AutoModelForCausalLM.from_pretrained(config.model, dtype=dtype).to(device))

    rows = load_questions(config.data, "train", config.train_examples, config.subset)
    tested_on = load_questions(config.test_data or config.data, "test", config.test_examples, config.test_subset)
    cut = max(1, round(_VALIDATION * len(rows)))
    held_out, kept, test = (encode(tokenizer, some, config.length) for some in (rows[:cut], rows[cut:], tested_on))

    def measure(model: nn.Module) -> dict[str, float]:
        found = test.measure(model, config.batch_size)
        if config.new_tokens:
            found["accuracy"] = exact_matches(
                model, tokenizer, tested_on, new_tokens=config.new_tokens, batch_size=4 * config.batch_size
            )
        return found

    return Task(build, len(kept.inputs), kept.loss, lambda model: held_out.measure(model, config.batch_size), measure)


EXPERIMENT = Experiment(
    slug="bone",
    title="Bone and MiSS against LoRA and PiSSA",
    question=(
        "At equal numbers of trained parameters: do block-affine adapters learn faster than LoRA and PiSSA at the same "
        "rate, and is anything left of that when each method has its own?"
    ),
    presets={
        "smoke": Config(train_examples=400, pretrain_epochs=3, steps=60, early=20, lrs=(1e-3, 1e-2)),
        "laptop": Config(),
        "paper": Config(
            task="language",
            data="meta-math/MetaMathQA",
            test_data="openai/gsm8k",
            test_subset="main",
            model="meta-llama/Llama-2-7b-hf",
            steps=6170,
            early=500,
            batch_size=64,
            r=64,
            shared_lr=2e-5,
            lrs=(2e-5, 1e-4, 5e-4),
            pissa_iterations=4,
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
        "Look at both panels. The gradient of a block that many parts of a weight share is several times that of "
        "LoRA's factors at the start (column 'first gradient'), so that one learning rate for all is a larger step for "
        "the block forms: panel A favours them, and so does the paper, which tunes no rate. Panel B tries every arm at "
        "every rate and keeps the one that held-out data prefers; the test split is used for that one alone. A best "
        "rate at the edge of the sweep means that the sweep should be wider. Times and memory are of this machine."
    ),
)
