"""One entry for each thing that reads files of others: a valid folder, the file to change, the call.

A new parser brings its entry here (see CONTRIBUTING). An entry is a function that fills an empty folder and returns
an :class:`Entry`; the call may succeed or raise :class:`~weightsmith.core.errors.UsageError`, and nothing else.
"""

import contextlib
import io
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import rich.console
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from weightsmith.adapt import BoneConfig, apply_bone_, load_bone, save_bone
from weightsmith.average.adapters import open_adapters
from weightsmith.average.checkpoints import RunCheckpoint, checkpoint_losses
from weightsmith.average.sources import check_same_tensors, open_places
from weightsmith.average.stream import Mean
from weightsmith.continual import ContinualTuner, ForgettingMeter, InstructionRouter
from weightsmith.core import json_files
from weightsmith.core.checkpoint import Checkpoint, write_checkpoint
from weightsmith.core.display import markdown, markdown_link, markup, printable
from weightsmith.core.errors import UsageError
from weightsmith.core.json_stream import stream_json
from weightsmith.core.patterns import compile_pattern
from weightsmith.core.pickles import read_pickle, read_pickles
from weightsmith.lab import record as lab_record
from weightsmith.lab import report as lab_report
from weightsmith.lab.gallery import Picture, keep_gallery, read_gallery
from weightsmith.lab.report.receipt import read_receipt, write_receipt
from weightsmith.prune import load_sparse, save_sparse
from weightsmith.prune.sparse import sparse_masks
from weightsmith.quantize import Grid, load_quantized, round_to_nearest_, save_quantized
from weightsmith.quantize.grid import quantized_weights
from weightsmith.quantize.report import BlockReport
from weightsmith.search import EvolveOptions, Individual, SearchSpace, evolve, gan
from weightsmith.tools.quantize import calibration
from weightsmith.tools.quantize.partial import Partial
from weightsmith.tools.quantize.source import Source


@dataclass(frozen=True)
class Entry:
    """What to change, and what reads it.

    Attributes:
        file: The file to change.
        kind: How, see :func:`mutate.mutate`.
        read: The parser, with everything done that a user would do with the result.
        share: How many of the asked inputs it gets; less than 1 for what takes milliseconds.
    """

    file: Path
    kind: str
    read: Callable[[], object]
    share: float = 1.0


def json_object(folder: Path) -> Entry:
    file = folder / "index.json"
    file.write_text(
        json.dumps({"metadata": {"total_size": 12}, "weight_map": {"a": "x.safetensors", "b": "y"}, "n": [1, 2.5]})
    )
    shape = {"weight_map": {str: str}, "n?": ([float], None)}
    return Entry(file, "json", lambda: json_files.read_json(file, shape))


def routed_instructions(folder: Path) -> Entry:
    file = folder / "router.json"
    router = InstructionRouter()
    router.commit(1, ["Add the numbers", "Sum \u2028 them"])
    router.save(file)

    def read() -> None:
        other = InstructionRouter()
        other.load(file)
        if other.groups:
            other.assign(["Add the numbers"])

    return Entry(file, "json", read, share=0.1)


def continual_groups(folder: Path) -> Entry:
    tuner = ContinualTuner(nn.Linear(2, 1), folder=folder)
    with tuner.task(["Add the numbers"]):
        pass
    return Entry(folder / "continual.json", "json", lambda: ContinualTuner(nn.Linear(2, 1), folder=folder), share=0.02)


def forgetting_table(folder: Path) -> Entry:
    file = folder / "forgetting.csv"
    file.write_text('after,sums,"a, b"\n(before),1.5,nan\nsums,100.0,2e1\n', encoding="utf-8")
    return Entry(file, "text", lambda: str(ForgettingMeter({"sums": [0], "a, b": [0]}, path=file).report()), share=0.5)


def json_lines(folder: Path) -> Entry:
    file = folder / "rows.jsonl"
    file.write_text('{"text": "one \u2028 two"}\n\n{"text": "three", "n": 1}\n{"other": ["x"]}\n', encoding="utf-8")
    return Entry(file, "jsonl", lambda: list(json_files.read_jsonl(file, {"text?": str})))


def json_stream(folder: Path) -> Entry:
    file = folder / "state.json"
    log = [{"step": i, "loss": 1.5 / (i + 1), "note": "]}"} for i in range(4)]
    file.write_text(json.dumps({"best": None, "log_history": log, "after": {"a": [1, 2]}}, indent=2))

    def read() -> None:
        whole: object = None
        with contextlib.suppress(UsageError):
            whole = json_files.read_json(file, {"log_history": [{"step": int}]})["log_history"]
        rows = list(stream_json(file, "log_history", {"step": int}))
        # what both readers take, they take for the same
        assert whole is None or json.dumps(rows) == json.dumps(whole)

    return Entry(file, "json", read)


def text(folder: Path) -> Entry:
    file = folder / "text.txt"
    file.write_text("caf\xe9 \u2028\r\nline\r", encoding="utf-8")
    return Entry(file, "bytes", lambda: json_files.read_text(file))


def _state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return {
        "a.weight": torch.randn(3, 4),
        "a.bias": torch.randn(3).half(),
        "n": torch.tensor(3),
        "e": torch.empty(0, 2),
    }


def _walk(checkpoint: Checkpoint) -> None:
    checkpoint.shapes()
    for _, tensor in checkpoint.items():
        tensor.float().sum()
    for place in checkpoint.stored().values():
        into = torch.empty(place.shape, dtype=place.dtype).view(-1)
        place.read(into)


def safetensors_index(folder: Path) -> Entry:
    write_checkpoint(_state(), folder / "model", max_shard_bytes=30)
    return Entry(folder / "model" / "model.safetensors.index.json", "json", lambda: _walk(Checkpoint(folder / "model")))


def safetensors_file(folder: Path) -> Entry:
    write_checkpoint(_state(), folder / "model")
    file = folder / "model" / "model.safetensors"
    return Entry(file, "safetensors", lambda: _walk(Checkpoint(file)))


def _pickle(folder: Path, zipped: bool) -> Entry:
    file = folder / "pytorch_model.bin"
    weight = torch.randn(3, 4)
    state = _state() | {"tied": weight, "again": weight, "t": weight.T, "wide": torch.zeros(1).expand(4)}
    torch.save(state, file, _use_new_zipfile_serialization=zipped)

    def read() -> None:
        for tensor in read_pickle(file, allow_pickle=True).values():
            tensor.reshape(-1)[:5].float().sum()

    return Entry(file, "bytes", read)


def pickle_file(folder: Path) -> Entry:
    return _pickle(folder, True)


def old_pickle_file(folder: Path) -> Entry:
    return _pickle(folder, False)


def pickle_index(folder: Path) -> Entry:
    torch.save({"a": torch.ones(2)}, folder / "pytorch_model-00001-of-00002.bin")
    torch.save({"b": torch.ones(2)}, folder / "pytorch_model-00002-of-00002.bin")
    file = folder / "pytorch_model.bin.index.json"
    names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
    file.write_text(json.dumps({"metadata": {"total_size": 16}, "weight_map": names}))
    return Entry(file, "json", lambda: read_pickles(folder, "pytorch_model", allow_pickle=True))


def trainer_log(folder: Path) -> Entry:
    saved = []
    for step in (10, 20):
        (folder / f"checkpoint-{step}").mkdir()
        saved.append(RunCheckpoint(folder / f"checkpoint-{step}", step, "model"))
    log = [{"step": s, "loss": 1 / s, "epoch": 0.5} for s in (5, 10, 15, 20)]
    log += [{"step": s, "eval_loss": 1 / s, "eval_accuracy": 0.5} for s in (10, 20)]
    file = folder / "checkpoint-20" / "trainer_state.json"
    file.write_text(json.dumps({"global_step": 20, "log_history": log}))

    def read() -> None:
        refusals = []
        for source in ("since_previous", "last", "eval", "eval:accuracy"):
            try:
                checkpoint_losses(saved, source)
            except UsageError as error:
                refusals.append(error)
        if refusals:
            raise refusals[0]

    return Entry(file, "json", read)


def _adapters(folder: Path) -> Callable[[], None]:
    torch.manual_seed(0)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "rank_pattern": {"q": 2}}
    config |= {"alpha_pattern": {r"layer\.[0-9]+\.q": 8}, "use_rslora": False, "init_lora_weights": True}
    saved = []
    for step in (1, 2):
        at = folder / f"checkpoint-{step}"
        at.mkdir()
        state = {
            "base_model.model.layer.0.q.lora_A.weight": torch.randn(2, 5),
            "base_model.model.layer.0.q.lora_B.weight": torch.randn(6, 2),
        }
        save_file(state | {"base_model.model.score.weight": torch.randn(3)}, at / "adapter_model.safetensors")
        (at / "adapter_config.json").write_text(json.dumps(config))
        saved.append(RunCheckpoint(at, step, "adapter"))

    def read() -> None:
        for mode in ("svd", "factors"):
            mean = Mean([0.5, 0.5])
            places = [open_places(one) for one in saved]
            adapters, _ = open_adapters(saved, places, mode)
            free = [name for pair in adapters.pairs.values() for name in (pair.a, pair.b)] if mode == "svd" else []
            check_same_tensors(places, free=free)
            rank = adapters.rank(mode, None) if adapters.pairs else 0
            layout = adapters.layout(mode, rank, mean)
            list(adapters.pieces(layout, mode, rank, [0.5, 0.5], mean))
            json.dumps(adapters.merged_config(mode, rank))
            adapters.gaps([0.5, 0.5])

    return read


def adapter_config(folder: Path) -> Entry:
    read = _adapters(folder)
    return Entry(folder / "checkpoint-1" / "adapter_config.json", "json", read, 0.3)


def adapter_tensors(folder: Path) -> Entry:
    read = _adapters(folder)
    return Entry(folder / "checkpoint-1" / "adapter_model.safetensors", "safetensors", read, 0.3)


def _net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))


def _bone(folder: Path, name: str, kind: str, format: str, **config: object) -> Entry:
    save_bone(apply_bone_(_net(), BoneConfig(r=2, **config)), folder, format=format)
    return Entry(folder / name, kind, lambda: load_bone(_net(), folder)(torch.ones(1, 8)), 0.3)


def bone_config(folder: Path) -> Entry:
    return _bone(folder, "bone_config.json", "json", "native", where=["0", "2"], modules_to_save=("2",), variant="miss")


def bone_tensors(folder: Path) -> Entry:
    return _bone(folder, "bone.safetensors", "safetensors", "native", where=["0"], variant="free", tile=(2, 2))


def miss_config(folder: Path) -> Entry:
    return _bone(folder, "adapter_config.json", "json", "peft", where=["0"], variant="mini", mini_r=2)


def miss_tensors(folder: Path) -> Entry:
    return _bone(folder, "adapter_model.safetensors", "safetensors", "peft", where=["0"])


def _rounded(model: nn.Module, grid: Grid) -> nn.Module:
    round_to_nearest_(model, None, grid)
    return model


def _native(folder: Path, name: str, kind: str) -> Entry:
    save_quantized(_rounded(_net(), Grid(3, granularity=4)), folder / "q")
    return Entry(folder / "q" / name, kind, lambda: load_quantized(folder / "q", _net())(torch.ones(1, 8)), 0.3)


def native_config(folder: Path) -> Entry:
    return _native(folder, "quantization_config.json", "json")


def native_tensors(folder: Path) -> Entry:
    return _native(folder, "weights/model.safetensors", "safetensors")


def _llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=16))


def _foreign(folder: Path, name: str, kind: str, format: str) -> Entry:
    from weightsmith.quantize.formats import export

    save_quantized(_rounded(_llama(), Grid(4, granularity=32)), folder / "q", format)

    def read() -> None:
        export.read_folder(folder / "q")

    return Entry(folder / "q" / name, kind, read, 0.1)


def gptq_config(folder: Path) -> Entry:
    return _foreign(folder, "config.json", "json", "gptq")


def gptq_tensors(folder: Path) -> Entry:
    return _foreign(folder, "model.safetensors", "safetensors", "gptq")


def compressed_config(folder: Path) -> Entry:
    return _foreign(folder, "config.json", "json", "compressed-tensors")


def compressed_tensors(folder: Path) -> Entry:
    return _foreign(folder, "model.safetensors", "safetensors", "compressed-tensors")


def model_config(folder: Path) -> Entry:
    _llama().save_pretrained(folder)
    return Entry(folder / "config.json", "json", lambda: Source(folder), 0.05)


def calibration_texts(folder: Path) -> Entry:
    file = folder / "texts.jsonl"
    file.write_text('{"text": "one"}\n{"question": "a", "answer": "b", "n": 1}\n')
    return Entry(file, "jsonl", lambda: calibration.read_texts(file))


def _images(folder: Path, suffix: str) -> Entry:
    whole = Image.effect_noise((16, 16), 50)
    for index in range(2):
        buffer = io.BytesIO()
        whole.save(buffer, "PNG" if suffix == "png" else "JPEG")
        (folder / f"{index}.{suffix}").write_bytes(buffer.getvalue())

    def processor(images: Image.Image, return_tensors: str) -> dict[str, torch.Tensor]:
        return {"pixel_values": torch.tensor(images.resize((2, 2)).getpixel((0, 0))).float()[None]}

    return Entry(folder / f"1.{suffix}", "bytes", lambda: calibration.images(processor, folder, samples=2), 0.3)


def png_images(folder: Path) -> Entry:
    return _images(folder, "png")


def jpeg_images(folder: Path) -> Entry:
    return _images(folder, "jpg")


def partial_output(folder: Path) -> Entry:
    partial = Partial(folder / "out", {"bits": 3})
    model = _rounded(_net(), Grid(3))
    report = BlockReport("0", None, None, 0, "rtn", 0.1, ())
    partial.keep_(model, "0", quantized_weights(model), report)
    (file,) = partial.folder.glob("*.safetensors")
    return Entry(file, "safetensors", partial.load)


def pattern(folder: Path) -> Entry:
    file = folder / "pattern"
    file.write_text(r"^(.*\.)?layers\.(?:[0-9]{1,2}|x)\.(q|k|v)_proj?$|\bmlp\w+[^a-c\]]*?")
    names = ["model.layers.12.q_proj", "a" * 60, "mlp_up", ""]

    def read() -> None:
        matches = compile_pattern(file.read_bytes().decode("latin-1"), "here")
        list(map(matches, names))

    return Entry(file, "bytes", read)


def names_on_show(folder: Path) -> Entry:
    from rich.console import Console

    file = folder / "name"
    file.write_bytes("m[/q]\x1b[31m\x1b]8;;http://x\x07|[a](javascript:x) \u202e end\\".encode())
    console = Console(file=io.StringIO(), width=80)

    def read() -> None:
        name = file.read_bytes().decode("utf-8", "surrogateescape")
        shown = printable(name)
        assert not any(ord(c) < 32 or 127 <= ord(c) < 160 or "\ud800" <= c <= "\udfff" for c in shown)
        assert printable(shown) == shown
        console.print(f"[bold]{markup(name)}[/bold]")
        markdown(name).encode()
        link = markdown_link("x", name)
        assert link == "x" or not name.lower().lstrip().startswith(("javascript:", "data:"))

    return Entry(file, "bytes", read, 0.3)


def _lab_run(folder: Path) -> Path:
    run = {
        "slug": "demo", "preset": "smoke", "title": "A run", "question": "?",
        "arms": [{"name": "a", "text": "", "title": "A"}],
        "metrics": [{"name": "m", "label": "m", "better": "higher", "format": ".2f", "resolution": None, "help": ""}],
        "claims": [], "charts": [], "config": {"lr": 0.1}, "seeds": [0, 1], "plan": {"looks": [3, 5]},
        "task": {"name": "t", "rows": {"train": 3}, "facts": {"data": "d"}},
    }  # fmt: skip
    lab_record.write_run(folder, run)
    for seed in (0, 1):
        rows = [{"step": step, "loss": 0.5, "phase": "p"} for step in range(3)]
        scores = {"m": torch.ones(4)}
        lab_record.write_job(
            folder,
            lab_record.JobResult("a", seed, {"m": 1.0}, False, rows, scores, 1e9, 2.0, 100, 1, {"torch": "2"}, "cpu"),
        )
    return folder


def _lab_report(folder: Path) -> None:
    report = lab_report.load(folder)
    lab_report.to_markdown(report).encode()
    console = rich.console.Console(file=io.StringIO(), width=100)
    console.print(lab_report.to_terminal(report))


def lab_run_description(folder: Path) -> Entry:
    return Entry(_lab_run(folder) / "run.json", "json", lambda: _lab_report(folder), 0.2)


def lab_job_result(folder: Path) -> Entry:
    return Entry(_lab_run(folder) / "a" / "seed-1" / "result.json", "json", lambda: _lab_report(folder), 0.2)


def lab_job_rows(folder: Path) -> Entry:
    return Entry(_lab_run(folder) / "a" / "seed-1" / "metrics.jsonl", "jsonl", lambda: _lab_report(folder), 0.2)


def lab_job_scores(folder: Path) -> Entry:
    file = _lab_run(folder) / "a" / "seed-1" / "scores.safetensors"
    return Entry(file, "bytes", lambda: _lab_report(folder), 0.2)


def lab_receipt(folder: Path) -> Entry:
    file = folder / "receipt.json"
    write_receipt(lab_report.load(_lab_run(folder)), "weightsmith run demo", file)
    return Entry(file, "json", lambda: read_receipt(file), 0.5)


def search_state(folder: Path) -> Entry:
    def evaluate(model: object, individual: Individual) -> dict[str, float]:
        return {"error": float(individual.genotype[0][0])}

    def read() -> None:
        torch.manual_seed(0)
        space, options = SearchSpace.of(a=4, b=4), EvolveOptions(4, 2)
        evolve(space, evaluate, {"error": "min"}, model=nn.Linear(2, 2), options=options, folder=folder)

    read()
    return Entry(folder / "search.pt", "bytes", read, 0.3)


def gan_training(folder: Path) -> Entry:
    sizes, images = {"channels": 2, "image_channels": 1}, torch.zeros(4, 1, 8, 8, dtype=torch.uint8)
    shallow = ((3, 0, 3, 0, 2, -1, -1),) * 3

    def read() -> None:
        torch.manual_seed(0)
        pair = gan.Generator("G*", bottom=1, latent=6, **sizes), gan.Discriminator(shallow, **sizes)
        gan.train_gan(*pair, images, gan.TrainOptions(steps=1, dis_batch=2, gen_batch=2), folder=folder)

    read()
    return Entry(folder / "gan.pt", "bytes", read, 0.1)


def lab_gallery(folder: Path) -> Entry:
    kept = _lab_run(folder) / "a" / "seed-1"
    keep_gallery(kept, [Picture.of(torch.zeros(1, 3, 2, 2), "Rain", "restored")])
    return Entry(kept / "gallery.json", "json", lambda: read_gallery([kept]), 0.5)


def sparse_tensors(folder: Path) -> Entry:
    file = save_sparse({"w": torch.eye(9), "b": torch.ones(3)}, folder / "m.safetensors")

    def read() -> None:
        masks = sparse_masks(file)
        assert masks.keys() <= load_sparse(file).keys()

    return Entry(file, "safetensors", read)


PARSERS = [
    json_object,
    json_lines,
    json_stream,
    text,
    safetensors_index,
    safetensors_file,
    pickle_file,
    old_pickle_file,
    pickle_index,
    trainer_log,
    adapter_config,
    adapter_tensors,
    bone_config,
    bone_tensors,
    miss_config,
    miss_tensors,
    native_config,
    native_tensors,
    gptq_config,
    gptq_tensors,
    compressed_config,
    compressed_tensors,
    model_config,
    calibration_texts,
    png_images,
    jpeg_images,
    partial_output,
    pattern,
    names_on_show,
    lab_run_description,
    lab_job_result,
    lab_job_rows,
    lab_job_scores,
    lab_receipt,
    lab_gallery,
    sparse_tensors,
    routed_instructions,
    continual_groups,
    forgetting_table,
    search_state,
    gan_training,
]
