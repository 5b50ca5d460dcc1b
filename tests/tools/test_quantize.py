import json
import math
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from weightsmith.core.errors import UsageError
from weightsmith.quantize import Grid, round_to_nearest_
from weightsmith.quantize.export import load_quantized
from weightsmith.quantize.grid import quantized_weights
from weightsmith.tools import quantize as tool
from weightsmith.tools._perplexity import perplexity
from weightsmith.tools._source import Source
from weightsmith.tools.quantize import REPORT, quantize

WORDS = [f"w{index}" for index in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokeniser of 43 words, and texts to calibrate and evaluate with."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    root = tmp_path_factory.mktemp("model")
    vocabulary = {word: index for index, word in enumerate(["<unk>", "<s>", "</s>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(root / "llama")
    torch.manual_seed(0)
    shape = {"vocab_size": len(vocabulary), "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
    rest = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "bos_token_id": 1}
    LlamaForCausalLM(LlamaConfig(**shape, **rest, tie_word_embeddings=True)).save_pretrained(root / "llama")
    generator = torch.Generator().manual_seed(1)
    texts = [" ".join(WORDS[i] for i in torch.randint(40, (12,), generator=generator)) for _ in range(40)]
    (root / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    (root / "answers.jsonl").write_text("\n".join(json.dumps({"question": t[:20], "answer": t[20:]}) for t in texts))
    return root


QUIET = {"console": Console(quiet=True)}
needs_maps = pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux's list of mapped files")
SMALL = {"samples": 4, "length": 16, "iterations": 3, **QUIET}


def report_of(out):
    return json.loads((out / REPORT).read_text())


def test_the_command_writes_a_folder_that_generates_in_a_fresh_process(folder, tmp_path):
    out = tmp_path / "out"
    assert quantize(folder / "llama", out=out, calibration=folder / "text.jsonl", **SMALL) == 0
    code = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained({str(out)!r}) for kind in (AutoModelForCausalLM, AutoTokenizer))
print(model.generate(**tokenizer("w1 w2", return_tensors="pt"), max_new_tokens=4, do_sample=False).tolist())
assert not any(name.startswith("weightsmith") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    loaded = load_quantized(out)
    prompt = {"input_ids": torch.tensor([[4, 5]]), "attention_mask": torch.ones(1, 2, dtype=torch.long)}
    assert json.loads(done.stdout) == loaded.generate(**prompt, max_new_tokens=4, do_sample=False).tolist()


@pytest.mark.parametrize("method", ["rtn", "flexround", "adaround"])
def test_the_report_has_errors_sizes_and_perplexities(folder, tmp_path, method):
    out = tmp_path / "out"
    data = {"calibration": folder / "text.jsonl", "evaluate": folder / "answers.jsonl", "window": 32}
    quantize(folder / "llama", out=out, method=method, bits=3, **data, **SMALL)
    report = report_of(out)
    assert [block["name"] for block in report["blocks"]] == [f"model.layers.{index}" for index in range(3)]
    assert all(block["error"] <= block["error_rtn"] for block in report["blocks"])
    assert all(len(block["layers"]) == 7 for block in report["blocks"])
    assert report["bytes_after"] < report["bytes_before"]
    assert report["perplexity_before"]["tokens"] == report["perplexity_after"]["tokens"] > 0
    assert set(report["not_quantised"]) == {"model.embed_tokens", "lm_head"}
    assert "tied" in report["not_quantised"]["lm_head"]
    assert not (tmp_path / "out.partial").exists()


def test_the_table_tells_what_happened(folder, tmp_path):
    console = Console(record=True, width=160, quiet=False, file=open(tmp_path / "log", "w"))  # noqa: SIM115, PTH123
    data = {"calibration": folder / "text.jsonl", "evaluate": folder / "text.jsonl"}
    quantize(folder / "llama", out=tmp_path / "out", method="rtn", **data, **(SMALL | {"console": console}))
    text = console.export_text()
    for wanted in ("model.layers.2", "lm_head (tied weight)", "token-weighted mean", "windows of 64", "no BOS", "MB →"):
        assert wanted in text


def test_round_to_nearest_needs_no_calibration(folder, tmp_path):
    quantize(folder / "llama", out=tmp_path / "out", method="rtn", granularity="group:16", **QUIET)
    assert {weight.granularity for weight in quantized_weights(load_quantized(tmp_path / "out")).values()} == {16}
    assert report_of(tmp_path / "out")["blocks"][0]["error"] is None


def test_the_command_writes_gptq_folders_with_the_same_weights(folder, tmp_path):
    arguments = {"method": "rtn", "granularity": "group:16", **QUIET}
    for format in ("gptq", "weightsmith"):
        quantize(folder / "llama", out=tmp_path / format, format=format, **arguments)
    assert json.loads((tmp_path / "gptq" / "config.json").read_text())["quantization_config"]["quant_method"] == "gptq"
    assert (tmp_path / "gptq" / "tokenizer.json").is_file()
    expected = load_quantized(tmp_path / "weightsmith").state_dict()
    loaded = load_quantized(tmp_path / "gptq").state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in expected.items())


def test_a_killed_run_goes_on_from_its_last_finished_block_and_ends_alike(folder, tmp_path, monkeypatch):
    out, arguments = tmp_path / "out", {"method": "flexround", "calibration": folder / "text.jsonl", **SMALL}
    quantize(folder / "llama", out=tmp_path / "unbroken", **arguments)
    keep = tool.Partial.keep_
    kept = []

    def keep_two(self, model, name, *rest):
        if len(kept) == 2:
            raise KeyboardInterrupt
        kept.append(name)
        keep(self, model, name, *rest)

    with monkeypatch.context() as patch:
        patch.setattr(tool.Partial, "keep_", keep_two)
        with pytest.raises(KeyboardInterrupt):
            quantize(folder / "llama", out=out, **arguments)
    assert not out.exists()
    assert len(list((tmp_path / "out.partial").rglob("*.safetensors"))) == 2

    quantize(folder / "llama", out=out, **arguments)
    resumed, unbroken = report_of(out), report_of(tmp_path / "unbroken")
    assert (resumed["resumed_blocks"], unbroken["resumed_blocks"]) == (2, 0)
    pick = ("name", "error", "error_rtn", "iterations", "kept", "layers")
    assert [[b[key] for key in pick] for b in resumed["blocks"]] == [
        [b[key] for key in pick] for b in unbroken["blocks"]
    ]
    one, other = (quantized_weights(load_quantized(path)) for path in (out, tmp_path / "unbroken"))
    assert all(torch.equal(one[name].codes, other[name].codes) for name in other)


@needs_maps
def test_finished_blocks_are_read_from_files_and_leave_memory_to_the_next(tmp_path):
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    partial, seen = tool.Partial(tmp_path / "out", {}), {}

    def on_block(name, weights, block):
        seen[name] = (model.get_parameter(f"{name}.weight").detach().clone(), weights[f"{name}.weight"])
        partial.keep_(model, name, weights, block)

    round_to_nearest_(model, None, Grid(4), on_block=on_block)
    for name, quantized in quantized_weights(model).items():
        value, codes = seen[name.removesuffix(".weight")]
        assert torch.equal(model.get_parameter(name), value)
        assert torch.equal(quantized.codes, codes.codes)
        assert is_view_of_a_file(model.get_parameter(name), below=tmp_path)
        assert is_view_of_a_file(quantized.codes, below=tmp_path)


@needs_maps
def test_weights_are_read_from_the_models_own_file_each_by_itself(folder):
    model = Source(folder / "llama").load()
    weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
    assert all(is_view_of_a_file(weight, below=folder) for weight in weights)
    assert all(weight.untyped_storage().nbytes() == weight.nbytes for weight in weights)


def is_view_of_a_file(tensor, below):
    for line in Path("/proc/self/maps").read_text().splitlines():
        start, end = (int(bound, 16) for bound in line.split()[0].split("-"))
        if start <= tensor.data_ptr() < end:
            return str(below) in line
    return False


def test_the_device_can_be_named(folder, tmp_path):
    arguments = {"method": "flexround", "calibration": folder / "text.jsonl", **SMALL}
    for device in (None, "cpu"):
        quantize(folder / "llama", out=tmp_path / str(device), device=device, **arguments)
    one, other = (load_quantized(tmp_path / device).state_dict() for device in ("None", "cpu"))
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


def test_other_settings_do_not_take_finished_blocks_over(folder, tmp_path, monkeypatch):
    arguments = {"method": "flexround", "calibration": folder / "text.jsonl", **SMALL}
    with monkeypatch.context() as patch:
        patch.setattr(tool, "save_quantized", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            quantize(folder / "llama", out=tmp_path / "out", **arguments)
    quantize(folder / "llama", out=tmp_path / "out", **arguments, bits=3)
    assert report_of(tmp_path / "out")["resumed_blocks"] == 0


def test_a_full_disk_leaves_the_old_folder_and_the_finished_blocks(folder, tmp_path, monkeypatch):
    out, arguments = tmp_path / "out", {"method": "rtn", "calibration": folder / "text.jsonl", **SMALL}
    quantize(folder / "llama", out=out, **arguments)
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        patch.setattr(tool, "save_quantized", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left on device")))
        with pytest.raises(OSError, match="No space"):
            quantize(folder / "llama", out=out, **arguments, bits=3)
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    quantize(folder / "llama", out=out, **arguments, bits=3)
    assert report_of(out)["resumed_blocks"] == 3


BAD = [
    ({"method": "gptq"}, "method 'gptq' is not known"),
    ({"bits": 1}, "bits must be between 2 and 8, got 1"),
    ({"granularity": "row"}, "granularity must be tensor, channel or group:N"),
    ({"granularity": "group:0"}, "group size"),
    ({"granularity": "group:7", "method": "rtn"}, "does not divide"),
    ({"device": "meta"}, "device 'meta' is not there"),
    ({"device": "gpu"}, "device 'gpu' is not there"),
    ({"format": "gguf"}, "format 'gguf' is not known"),
    ({"format": "gptq", "bits": 5}, "bits must be 2, 3, 4 or 8 for format='gptq', got 5"),
    ({"calibration": None}, "calibration is needed for method='flexround'"),
    ({"calibration": "text.csv"}, r"existing \.jsonl or \.txt file"),
    ({"calibration": "missing.jsonl"}, r"existing \.jsonl or \.txt file"),
    ({"calibration": "llama"}, r"existing \.jsonl or \.txt file"),
    ({"calibration": "damaged.jsonl"}, "line 2, is damaged or not JSON"),
    ({"calibration": "list.jsonl"}, "must be an object"),
    ({"calibration": "empty.jsonl"}, "holds no text"),
    ({"length": 64, "calibration": "short.txt"}, "at least 2 are needed"),
    ({"samples": 1}, "samples must be at least 2"),
    ({"length": 0}, "length must be at least 1"),
    ({"evaluate": "empty.jsonl"}, "holds no text"),
    ({"window": 1, "evaluate": "text.jsonl"}, "window must be at least 2"),
    ({"blocks": "model.layer"}, "which the model does not have"),
    ({"iterations": -1}, "iterations must not be negative"),
]


@pytest.mark.parametrize(("change", "message"), BAD, ids=[str(change) for change, _ in BAD])
def test_wrong_arguments_are_named_before_anything_is_written(folder, tmp_path, change, message):
    (folder / "text.csv").write_text("a,b")
    (folder / "damaged.jsonl").write_text('{"text": "w1"}\n{')
    (folder / "list.jsonl").write_text("[1]")
    (folder / "empty.jsonl").write_text("")
    (folder / "short.txt").write_text(" ".join(WORDS))
    files = {key: folder / change[key] for key in ("calibration", "evaluate") if isinstance(change.get(key), str)}
    arguments = {"method": "flexround", "calibration": folder / "text.jsonl", **SMALL, **change, **files}
    with pytest.raises(UsageError, match=message):
        quantize(folder / "llama", out=tmp_path / "out", **arguments)
    assert not list(tmp_path.iterdir())


def test_the_model_folder_must_hold_a_trained_model(folder, tmp_path):
    with pytest.raises(UsageError, match=r"no config\.json"):
        quantize(tmp_path / "nowhere", out=tmp_path / "out", method="rtn", **QUIET)
    quantize(folder / "llama", out=tmp_path / "out", method="rtn", **QUIET)
    with pytest.raises(UsageError, match="quantized already"):
        quantize(tmp_path / "out", out=tmp_path / "again", method="rtn", **QUIET)


def test_out_must_not_be_somebody_elses_folder(folder, tmp_path):
    with pytest.raises(UsageError, match="neither in, around nor equal to what is read"):
        quantize(folder / "llama", out=folder / "llama", method="rtn", **QUIET)
    (tmp_path / "thesis.tex").write_text("years")
    with pytest.raises(UsageError, match="not written by this command"):
        quantize(folder / "llama", out=tmp_path, method="rtn", **QUIET)


def test_a_text_encoder_is_calibrated_with_sentences_of_unequal_length(folder, tmp_path):
    from transformers import AutoTokenizer, BertConfig, BertModel

    AutoTokenizer.from_pretrained(folder / "llama").save_pretrained(tmp_path / "bert")
    shape = {"vocab_size": 43, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    BertModel(BertConfig(**shape, num_attention_heads=2)).save_pretrained(tmp_path / "bert")
    (tmp_path / "text.jsonl").write_text("\n".join(json.dumps({"text": " ".join(WORDS[:n])}) for n in range(3, 9)))
    data = {"calibration": tmp_path / "text.jsonl", "method": "flexround"}
    quantize(tmp_path / "bert", out=tmp_path / "out", **data, **SMALL)
    assert len(quantized_weights(load_quantized(tmp_path / "out"))) == 12
    with pytest.raises(UsageError, match="only causal language models"):
        quantize(tmp_path / "bert", out=tmp_path / "out", **data, evaluate=tmp_path / "text.jsonl", **SMALL)


def test_an_image_model_is_calibrated_with_a_folder_of_images(folder, tmp_path):
    pillow = pytest.importorskip("PIL.Image")
    from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification, ViTImageProcessor

    ViTImageProcessor(size={"height": 8, "width": 8}).save_pretrained(tmp_path / "vit")
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2}
    ViTForImageClassification(ViTConfig(**shape, image_size=8, patch_size=4)).save_pretrained(tmp_path / "vit")
    (tmp_path / "images" / "cat").mkdir(parents=True)
    data = {"calibration": tmp_path / "images", "method": "flexround"}
    with pytest.raises(UsageError, match="holds 0 images"):
        quantize(tmp_path / "vit", out=tmp_path / "out", **data, **SMALL)
    for index in range(4):
        pillow.new("RGB", (10, 12), (index * 60, 20, 99)).save(tmp_path / "images" / "cat" / f"{index}.png")
    quantize(tmp_path / "vit", out=tmp_path / "out", **data, **SMALL)
    report = report_of(tmp_path / "out")
    assert Counter(report["not_quantised"].values()) == {"outside of the blocks": 2}
    loaded = load_quantized(tmp_path / "out")
    assert len(quantized_weights(loaded)) == 12
    pixels = torch.rand(2, 3, 8, 8)
    by_transformers = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(by_transformers(pixels).logits, loaded(pixels).logits)
    with pytest.raises(UsageError, match="must be a folder of images"):
        quantize(tmp_path / "vit", out=tmp_path / "out", method="rtn", calibration=folder / "text.jsonl", **SMALL)


@pytest.mark.parametrize("bos", [False, True])
def test_perplexity_counts_every_predicted_token_alike(folder, bos):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = (kind.from_pretrained(folder / "llama") for kind in (AutoModelForCausalLM, AutoTokenizer))
    tokens = torch.arange(3, 18)
    found = perplexity(model, tokenizer, tokens, window=6, bos=bos, after_window=lambda: None)
    losses = []
    for start in (0, 6, 12):
        part = tokens[start : start + 6].tolist()
        ids = torch.tensor([1, *part] if bos else part)
        logits = model(input_ids=ids[None]).logits[0]
        losses += [F.cross_entropy(logits[i], ids[i + 1]).item() for i in range(len(ids) - 1)]
    assert found.value == pytest.approx(math.exp(sum(losses) / len(losses)), rel=1e-5)
    assert (found.tokens, found.bos, found.window) == (len(losses), bos, 6)
