"""``weightsmith quantize``: quantize the weights of a Hugging Face model folder."""

import dataclasses
import functools
import hashlib
import json
import math
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
import tyro
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from weightsmith.core.bars import bars_on
from weightsmith.core.checkpoint import copy_other_files
from weightsmith.core.display import markup
from weightsmith.core.errors import UsageError, WeightsmithWarning, require, unknown
from weightsmith.core.files import check_target, folder_atomically, write_atomically
from weightsmith.lab.data.hub import switched_off
from weightsmith.lab.machine import peak_memory
from weightsmith.quantize.after_training.blocks import find_blocks
from weightsmith.quantize.after_training.states import moved
from weightsmith.quantize.after_training.targets import choose_targets
from weightsmith.quantize.after_training.verbs import adaround_, flexround_, round_to_nearest_
from weightsmith.quantize.formats import gptq
from weightsmith.quantize.formats.export import Format, load_quantized, save_quantized
from weightsmith.quantize.grid import Grid, QuantizedWeight
from weightsmith.quantize.report import BlockReport, Report
from weightsmith.tools.quantize.calibration import read_texts, tokenize
from weightsmith.tools.quantize.check import Check, Examples
from weightsmith.tools.quantize.partial import Partial
from weightsmith.tools.quantize.perplexity import Perplexity, perplexity
from weightsmith.tools.quantize.source import Source, weight_bytes

Method = Literal["flexround", "adaround", "rtn"]

REPORT = "quantization_report.json"
"""Name of the report in the output folder."""

_ITERATIONS = {"flexround": 5000, "adaround": 20_000, "rtn": 0}
_MOST_LAYERS = 10


def quantize(
    model_dir: tyro.conf.Positional[Path],
    /,
    *,
    out: Path,
    method: Method = "flexround",
    bits: int = 4,
    granularity: str = "channel",
    symmetric: bool = False,
    search: Literal["minmax", "shrink", "search"] = "minmax",
    calibration: Path | None = None,
    samples: int | None = None,
    length: int | None = None,
    iterations: int | None = None,
    batch_size: int | None = None,
    lr: float = 1e-3,
    seed: int = 0,
    blocks: str = "auto",
    quick: bool = False,
    device: str | None = None,
    evaluate: Path | None = None,
    window: int = 2048,
    bos: bool = False,
    check: bool = False,
    format: Format = "auto",
    trust_remote_code: bool = False,
    allow_pickle: bool = False,
    console: tyro.conf.Suppress[Console | None] = None,
) -> int:
    """Quantize a model's weights to a few bits, block by block; transformers loads the result where the format allows.

    Memory: the current block in float32 with what its method learns (FlexRound: about 20 bytes per weight of the
    block), and two sets of activations (samples x length x width). At the end, the packed weights. With --evaluate, the
    logits of one window. Everything else is read from files. Finished blocks are kept in OUT.partial until the end
    (the size of the model and a byte per quantized weight). After a kill, the same command resumes from there.

    Args:
        model_dir: Folder with config.json and weights of a causal language model, a text encoder or an image model.
        out: Folder to write, atomically. A folder written by this command is replaced; any other is refused.
        method: How weights are rounded.
        bits: Bits per weight, 2 to 8.
        granularity: One scale per tensor, channel, or group:N (N neighboring inputs).
        symmetric: Signed codes without a zero-point.
        search: How the initial steps are found: minmax covers the largest weights; shrink (80 tries) and search (100
            times 2^bits tries, minutes to hours) clip them where that lowers the error of the weights.
        calibration: A .jsonl (field text, else all strings) or .txt file, or a folder of images. rtn needs none, but
            measures the error of block outputs only with it.
        samples: Sequences or images to calibrate with; 512, with --quick 32.
        length: Tokens per sequence; 1024, with --quick 256.
        iterations: Steps per block; flexround 5000, adaround 20000, with --quick 200.
        batch_size: Samples per step; 2 sequences or 32 images by default.
        lr: Learning rate.
        seed: Seed of everything random.
        blocks: auto, layers, whole, or module names separated by commas.
        quick: Few iterations and samples, for a first try.
        device: Device for the current block and for the evaluation. Default: CUDA if available.
        evaluate: A .jsonl or .txt file: report perplexity on it before and after (causal language models).
        window: Tokens per window of the evaluation, at most what the model takes.
        bos: Begin every window of the evaluation with the BOS token.
        check: Also compare outputs on two calibration samples: before, after, and of the folder loaded again; list the
            layers with the largest errors and, for causal language models, a greedy continuation before and after.
        format: compressed-tensors, gptq (2, 3, 4 or 8 bits), weightsmith, or auto: compressed-tensors where it can
            hold the result, else weightsmith.
        trust_remote_code: Run the Python files in the model's folder. They can execute any code.
        allow_pickle: Also read .bin files; only plain tensors are read from them.
        console: Console for the output.
    """
    started = time.perf_counter()
    console = console or Console()
    if method not in get_args(Method):
        raise unknown("method", method, get_args(Method))
    if format not in get_args(Format):
        raise unknown("format", format, get_args(Format))
    grid = Grid(bits, symmetric=symmetric, granularity=_granularity(granularity), search=search)
    if format == gptq.METHOD and bits not in gptq.BITS:
        raise UsageError(f"bits must be 2, 3, 4 or 8 for format='gptq', got {bits}: use another format")
    for name, value, least in (("samples", samples, 2), ("length", length, 1), ("batch_size", batch_size, 1)):
        if value is not None and value < least:
            raise UsageError(f"{name} must be at least {least}, got {value}")
    if iterations is not None and iterations < 0:
        raise UsageError(f"iterations must not be negative, got {iterations}")
    _check_out(out, [path for path in (model_dir, calibration, evaluate) if path is not None])
    if check and calibration is None:
        raise UsageError("check compares outputs on calibration data: pass calibration as well")
    if calibration is None and method != "rtn":
        raise UsageError(f"calibration is needed for method={method!r}: pass a .jsonl file, or a folder of images")
    require("transformers", extra="hf", purpose="quantizing a Hugging Face model")
    if format in ("auto", "compressed-tensors"):
        require(
            "compressed_tensors", extra="hf", purpose="the format that transformers loads (or --format weightsmith)"
        )
    source = Source(model_dir, trust_remote_code=trust_remote_code, allow_pickle=allow_pickle)
    size, tokens_each = samples or (32 if quick else 512), length or (256 if quick else 1024)
    inputs = None if calibration is None else source.inputs(calibration, size, tokens_each)
    place = _device(device)
    examples = None
    if check and inputs is not None:
        examples = Examples(inputs, source.tokenizer() if source.is_causal else None, place)
    judge = None if evaluate is None else _Judge(source, evaluate, window, bos, place)
    steps = (200 if quick and method != "rtn" else _ITERATIONS[method]) if iterations is None else iterations
    settings = {
        "method": method,
        "grid": dataclasses.asdict(grid),
        "calibration": calibration and calibration.name,
        "samples": len(inputs["pixel_values"] if isinstance(inputs, dict) else inputs or ()),
        "length": tokens_each,
        "iterations": steps,
        "batch_size": batch_size,
        "lr": lr,
        "seed": seed,
        "blocks": blocks,
    }
    partial = Partial(out, {**settings, "model": source.fingerprint(), "data": _fingerprint(inputs)})
    named = blocks.split(",") if "," in blocks else blocks
    options: dict[str, Any] = {"blocks": named, "batch_size": batch_size, "device": place}
    if method != "rtn":
        options |= {"iterations": steps, "lr": lr, "seed": seed}
    verb: Any = {"flexround": flexround_, "adaround": adaround_, "rtn": round_to_nearest_}[method]

    with _quiet(console), bars_on(console) as bars:
        before = judge and judge(source.load(), bars, "perplexity before")
        trained = None if examples is None else examples.run(source.load())
        model = source.load()  # again: what is above may have copied the former from its files to a device and back
        done, finished = partial.load()
        chosen = choose_targets(model, None)
        total = len(chosen) if inputs is None else len(find_blocks(model, options["blocks"], chosen, keep_others=False))
        bar = bars.add_task(f"{method}, {bits} bits", total=total)

        def on_block(name: str, weights: dict[str, QuantizedWeight], block: BlockReport) -> None:
            partial.keep_(model, name, weights, block)
            bars.update(bar, advance=1, description=f"{method}, {bits} bits: {name}")

        if inputs is None:
            report = verb(model, None, grid, on_block=on_block)
        else:
            report = verb(model, inputs, grid, on_block=on_block, done=done, **options)
        report = dataclasses.replace(report, blocks=tuple(finished.get(b.name, b) for b in report.blocks))
        with folder_atomically(out) as fresh:
            save_quantized(model, fresh, format)
            copy_other_files(source.folder, fresh)
            after = judge and judge(model, bars, "perplexity after")
            checked = None
            if examples is not None and trained is not None:
                checked = examples.compare(trained, examples.run(model), examples.run(load_quantized(fresh)))
            content = {
                "model": model_dir.name,
                "settings": settings,
                **report.facts(),
                "resumed_blocks": len(done),
                "bytes_before": source.nbytes,
                "bytes_after": weight_bytes(fresh),
                "perplexity_before": before and dataclasses.asdict(before),
                "perplexity_after": after and dataclasses.asdict(after),
                "check": checked and dataclasses.asdict(checked),
                "peak_memory_bytes": peak_memory(),
                "seconds": time.perf_counter() - started,
            }
            write_atomically(fresh / REPORT, json.dumps(content, indent=2) + "\n")
    partial.remove()
    console.print(*_tables(content, report), sep="\n")
    if checked is not None:
        console.print(*_findings(checked), sep="\n", markup=False)
    console.print(f"\n{markup(out.resolve())}", soft_wrap=True, highlight=False)
    return int(checked is not None and checked.reloaded > 0)


def _granularity(text: str) -> Any:
    kind, colon, size = text.partition(":")
    if kind == "group" and size.isdecimal():
        return int(size)
    if kind in ("tensor", "channel") and not colon:
        return kind
    raise UsageError(f"granularity must be tensor, channel or group:N such as group:128, got {text!r}")


def _device(name: str | None) -> torch.device | None:
    if name is None:
        return torch.device("cuda") if torch.cuda.is_available() else None
    try:
        torch.ones(1, device=name).cpu()
        return torch.device(name)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise UsageError(f"device {name!r} is unavailable: {str(error).splitlines()[0]}") from error


def _check_out(out: Path, sources: list[Path]) -> None:
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise UsageError(f"out={out} cannot be a folder: {path} is a file; name a new folder")
    check_target(out, sources)
    if out.exists() and not (out.is_dir() and (not any(out.iterdir()) or (out / REPORT).is_file())):
        raise UsageError(f"out={out} exists and was not written by this command: name a new folder")


def _fingerprint(inputs: Any) -> str:
    tensors = inputs.values() if isinstance(inputs, dict) else inputs or ()
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(f"{tuple(tensor.shape)}".encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


class _Judge:
    """Perplexity on a text; invalid arguments fail in the constructor."""

    def __init__(self, source: Source, path: Path, window: int, bos: bool, device: torch.device | None) -> None:
        if not source.is_causal:
            raise UsageError("evaluate measures perplexity, which only causal language models have: leave it out")
        if window < 2:
            raise UsageError(f"window must be at least 2, got {window}")
        self.tokenizer = source.tokenizer()
        if bos and self.tokenizer.bos_token_id is None:
            raise UsageError("bos=True, but the tokenizer has no BOS token")
        self.tokens = tokenize(self.tokenizer, read_texts(path))
        self.window, self.bos, self.device = min(window, source.longest - bos), bos, device  # BOS takes a place
        if len(self.tokens) < 2:
            raise UsageError(f"evaluate={path} holds fewer than 2 tokens")

    def __call__(self, model: Any, bars: Progress, title: str) -> Perplexity:
        step = functools.partial(bars.advance, bars.add_task(title, total=math.ceil(len(self.tokens) / self.window)))
        with moved(model, self.device):
            return perplexity(model, self.tokenizer, self.tokens, window=self.window, bos=self.bos, after_window=step)


@contextmanager
def _quiet(console: Console) -> Iterator[None]:
    """No bars and reports of others, and our warnings as a line each instead of with a line of source."""
    from transformers.utils import logging

    def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
        if issubclass(category, WeightsmithWarning):
            console.print(f"warning: {message}", markup=False, soft_wrap=True)

    shown, verbosity = logging.is_progress_bar_enabled(), logging.get_verbosity()
    with switched_off(shown, logging.disable_progress_bar, logging.enable_progress_bar), warnings.catch_warnings():
        warnings.showwarning = show
        logging.set_verbosity_error()
        try:
            yield
        finally:
            logging.set_verbosity(verbosity)


def _tables(content: dict[str, Any], report: Report) -> Iterator[Table | str]:
    if any(block.error is not None for block in report.blocks):
        yield _table(
            ("block", "output error, rtn", report.method, "kept", "time"),
            [(b.name, _number(b.error_rtn), _number(b.error), b.kept, f"{b.seconds:.1f} s") for b in report.blocks],
        )
    layers = sorted(report.layers, key=lambda layer: layer.weight_error, reverse=True)[:_MOST_LAYERS]
    yield _table(
        ("weight, largest error first", "weight error, rtn", report.method, "codes moved", "bits"),
        [(w.name, _number(w.weight_error_rtn), _number(w.weight_error), f"{w.moved:.1%}", str(w.bits)) for w in layers],
    )
    if len(report.layers) > len(layers):
        yield f"... and {len(report.layers) - len(layers)} more in {REPORT}"
    before, after = content["bytes_before"], content["bytes_after"]
    yield f"\nsize        {before / 1e6:.1f} MB → {after / 1e6:.1f} MB ({before / after:.2f} times smaller)"
    if content["perplexity_before"]:
        old, new = content["perplexity_before"], content["perplexity_after"]
        bos = "with BOS" if new["bos"] else "no BOS"
        how = f"{new['tokens']} tokens of {new['tokenizer']}, windows of {new['window']}, {bos}, token-weighted mean"
        yield f"perplexity  {old['value']:.4f} → {new['value']:.4f} ({how})"
    if report.left:
        named = [f"{left.name} {left.share:.1%} ({left.why})" for left in report.left[:_MOST_LAYERS]]
        more = f", and {len(report.left) - len(named)} more in {REPORT}" if len(report.left) > len(named) else ""
        yield f"as it was   {sum(left.share for left in report.left):.1%} of all parameters: {', '.join(named)}{more}"
    if report.unseen:
        first = ", ".join(report.unseen[:_MOST_LAYERS]) + ", ..." * (len(report.unseen) > _MOST_LAYERS)
        yield f"unseen      {len(report.unseen)} layers or experts that no sample reached, rounded to nearest: {first}"
    memory = f"peak memory {content['peak_memory_bytes'] / 1e9:.2f} GB, mapped files included"
    yield f"took        {content['seconds']:.0f} s, {memory}"


def _findings(check: Check) -> Iterator[Table | str]:
    yield _table(
        ("layer, largest output error first", "output error"),
        [(layer.name, _number(layer.error)) for layer in check.layers[:_MOST_LAYERS]],
    )
    same = "" if check.agreement is None else f", the largest logit is the same at {check.agreement:.1%} of positions"
    yield f"\noutputs     relative squared error {_number(check.error)} after rounding{same}"
    if check.reloaded:
        yield f"reloaded    DIFFERENT: the folder's outputs are up to {_number(check.reloaded)} from those in memory"
    else:
        yield "reloaded    the folder's outputs equal those in memory"
    if check.prompt is not None:
        yield f"prompt      {check.prompt!r}\nbefore      {check.text_before!r}\nafter       {check.text_after!r}"


def _table(headings: tuple[str, ...], rows: list[tuple[str, ...]]) -> Table:
    table = Table(box=None, pad_edge=False)
    for index, heading in enumerate(headings):
        table.add_column(heading, justify="right" if index else "left")
    for row in rows:
        table.add_row(*row)
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
