"""Rounding by auto-round, what people use today for language models, as a rival of `weightsmith.quantize.flexround_`.

SignRound (arXiv 2309.05516) learns ``w_hat = s * (clamp(round(w / s + v) + z) - z)`` with ``v`` in ``[-1/2, 1/2]`` and
both ends of the range, by the sign of the gradient and at a rate that falls linearly.
"""

import logging
import time
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Any

from torch import Tensor, nn

from weightsmith.core.errors import UsageError, require
from weightsmith.lab.identity import tensors_digest
from weightsmith.quantize import Grid
from weightsmith.quantize.after_training.targets import choose_targets
from weightsmith.quantize.report import Report, count_bytes

PURPOSE = "the arm auto-round; --no-auto-round leaves it out"


def installed() -> bool:
    """Whether auto-round can be imported."""
    return find_spec("auto_round") is not None


def report_left_out(model: str) -> None:
    """Say in one line why the arm is left out although it was asked for."""
    logging.getLogger(__name__).warning(
        "left out: auto-round, which rounds causal language models of Transformers alone, not %s", model
    )


def auto_round_(
    model: nn.Module,
    calibration: Mapping[str, Tensor],
    grid: Grid,
    *,
    tokenizer: Any,
    iterations: int,
    batch_size: int,
    seed: int,
    rate: float = 1.0,
) -> Report:
    """Round the blocks of a causal language model by auto-round's own loop, in the precision of the model.

    Args:
        model: Of Transformers; changed in place.
        calibration: ``input_ids`` ``(N, T)``, and ``attention_mask`` where rows are padded.
        grid: Bits, symmetry and granularity; auto-round finds the range itself, beginning with ``"minmax"``.
        tokenizer: The model's.
        iterations: Steps for each block.
        batch_size: Rows per step.
        seed: Draws the rows of each step.
        rate: Learning rate, in units of its own default ``1 / iterations``.

    Returns:
        The model and how long it took; auto-round tells nothing about single layers.

    Raises:
        MissingExtra: auto-round is not installed.
        UsageError: It left layers as they were that our methods round: a comparison would favor it.
    """
    package = require("auto_round", extra="quantize", purpose=PURPOSE)
    rows = {name: values.split(batch_size) for name, values in calibration.items()}
    batches = [dict(zip(rows, parts, strict=True)) for parts in zip(*rows.values(), strict=True)]
    count, length = calibration["input_ids"].shape
    group = {"channel": -1, "tensor": 0}.get(str(grid.granularity), grid.granularity)
    scheme = {"bits": grid.bits, "group_size": group, "sym": grid.symmetric, "data_type": "int", "act_bits": 16}
    targets = choose_targets(model, None)
    trained = {name: tensors_digest({name: target.weight}) for name, target in targets.items()}
    started = time.perf_counter()
    package.AutoRound(
        model,
        tokenizer,
        scheme=scheme,
        dataset=batches,
        iters=iterations,
        lr=rate / iterations,
        seqlen=length,
        nsamples=count,
        batch_size=batch_size,
        seed=seed,
        device_map=str(calibration["input_ids"].device),
        amp=False,
        enable_torch_compile=False,
    ).quantize()
    seconds = time.perf_counter() - started
    now = choose_targets(model, None)
    if left := [name for name in trained if name in now and tensors_digest({name: now[name].weight}) == trained[name]]:
        raise UsageError(
            f"auto-round left {len(left)} of {len(trained)} layers as they were, the first is {left[0]} of shape "
            f"{tuple(now[left[0]].weight.shape)}: it rounds matrices whose sides are multiples of 32; "
            "--no-auto-round leaves the arm out"
        )
    before, after = count_bytes(model, {})
    return Report(model.eval(), "auto-round", grid, (), seconds, before, after)
