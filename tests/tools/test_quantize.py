import json
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn
from torch.nn import functional as F

from weightsmith.core.errors import UsageError
from weightsmith.quantize import Grid, round_to_nearest_
from weightsmith.quantize.formats.export import load_quantized
from weightsmith.quantize.grid import quantized_weights
from weightsmith.tools.quantize import REPORT, quantize
from weightsmith.tools.quantize import command as tool
from weightsmith.tools.quantize.perplexity import perplexity
from weightsmith.tools.quantize.source import Source

WORDS = [f"w{index}" for index in range(40)]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny Llama with a tokenizer of 43 words, and texts to calibrate and evaluate with."""
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
    assert [(one["name"], one["why"]) for one in report["left"]] == [
        ("model.embed_tokens.weight", "tied to lm_head.weight")
    ]
    assert not (tmp_path / "out.partial").exists()


def test_the_table_tells_what_happened(folder, tmp_path):
    console = Console(record=True, width=160, quiet=False, file=open(tmp_path / "log", "w"))  # noqa: SIM115, PTH123
    data = {"calibration": folder / "text.jsonl", "evaluate": folder / "text.jsonl"}
    quantize(folder / "llama", out=tmp_path / "out", method="rtn", **data, **(SMALL | {"console": console}))
    text = console.export_text()
    for wanted in (
        "model.layers.2",
        "(tied to lm_head.weight)",
        "token-weighted mean",
        "windows of 64",
        "no BOS",
        "MB →",
    ):
        assert wanted in text


@pytest.mark.parametrize("format", ["auto", "weightsmith", "gptq"])
def test_the_check_compares_outputs_before_after_and_of_the_folder(folder, tmp_path, format):
    console = Console(record=True, width=160, file=open(tmp_path / "log", "w"))  # noqa: SIM115, PTH123
    data = {"calibration": folder / "text.jsonl", "granularity": "group:16", "format": format, "check": True}
    assert quantize(folder / "llama", out=tmp_path / "out", **data, **(SMALL | {"console": console})) == 0
    check = report_of(tmp_path / "out")["check"]
    assert check["reloaded"] == 0
    assert 0 < check["error"] < 1
    assert 0 < check["agreement"] <= 1
    assert len(check["layers"]) == 21
    assert check["layers"] == sorted(check["layers"], key=lambda layer: -layer["error"])
    assert all(0 < layer["error"] < 1 for layer in check["layers"])
    assert (len(check["prompt"].split()), len(check["text_before"].split())) == (8, 24)
    text = console.export_text()
    for wanted in (
        "largest output error first",
        "of positions",
        "the folder's outputs equal",
        check["text_after"][:60],
    ):
        assert wanted in text


def test_a_folder_that_computes_something_else_fails_the_check(folder, tmp_path, monkeypatch):
    load = tool.load_quantized

    def other(path):
        model = load(path)
        model.model.norm.weight.data += 0.1
        return model

    monkeypatch.setattr(tool, "load_quantized", other)
    data = {"calibration": folder / "text.jsonl", "method": "rtn", "check": True}
    assert quantize(folder / "llama", out=tmp_path / "out", **data, **SMALL) == 1
    assert report_of(tmp_path / "out")["check"]["reloaded"] > 0


def test_experts_and_what_is_left_are_named_by_the_command(folder, tmp_path):
    from transformers import AutoTokenizer, MixtralConfig, MixtralForCausalLM

    shape = {"vocab_size": 43, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    rest = {"num_attention_heads": 2, "num_key_value_heads": 1, "num_local_experts": 4}
    MixtralForCausalLM(MixtralConfig(**shape, **rest)).save_pretrained(tmp_path / "mixtral")
    AutoTokenizer.from_pretrained(folder / "llama").save_pretrained(tmp_path / "mixtral")
    console = Console(record=True, width=300, file=open(tmp_path / "log", "w"))  # noqa: SIM115, PTH123
    data = {"calibration": folder / "text.jsonl", "check": True}
    quantize(tmp_path / "mixtral", out=tmp_path / "out", **data, **(SMALL | {"console": console}))
    report = report_of(tmp_path / "out")
    assert report["check"]["reloaded"] == 0
    quantized = sum(layer["numel"] for block in report["blocks"] for layer in block["layers"])
    assert quantized / (quantized + sum(left["numel"] for left in report["left"])) > 0.8
    text = console.export_text()
    assert "lm_head.weight" in text
    assert "model.layers.1.mlp.gate.weight" in text
    assert "of all parameters" in text


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


def test_a_killed_run_goes_on_from_its_last_finished_block_and_ends_equal(folder, tmp_path, monkeypatch):
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
    ({"device": "meta"}, "device 'meta' is unavailable"),
    ({"device": "gpu"}, "device 'gpu' is unavailable"),
    ({"format": "gguf"}, "format 'gguf' is not known"),
    ({"format": "gptq", "bits": 5}, "bits must be 2, 3, 4 or 8 for format='gptq', got 5"),
    ({"calibration": None}, "calibration is needed for method='flexround'"),
    ({"calibration": None, "method": "rtn", "check": True}, "check compares outputs on calibration data"),
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


def test_a_checkpoint_around_the_weights_is_not_taken_for_them(folder, tmp_path, capfd):
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(folder / "llama")
    model.config.save_pretrained(tmp_path / "llama")
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, tmp_path / "llama" / "pytorch_model.bin")
    capfd.readouterr()
    with pytest.raises(UsageError, match=r"must hold tensors by name, got OrderedDict under 'state_dict'"):
        quantize(tmp_path / "llama", out=tmp_path / "out", method="rtn", allow_pickle=True, **QUIET)
    assert not (tmp_path / "out").exists()
    assert capfd.readouterr() == ("", "")


def test_out_must_not_be_or_lie_below_a_file(folder, tmp_path):
    (tmp_path / "notes").write_text("mine")
    for out in (tmp_path / "notes", tmp_path / "notes" / "out"):
        with pytest.raises(UsageError, match="notes is a file; name a new folder"):
            quantize(folder / "llama", out=out, method="rtn", **QUIET)
    assert (tmp_path / "notes").read_text() == "mine"


@pytest.mark.filterwarnings("default::weightsmith.core.errors.WeightsmithWarning")
def test_warnings_are_a_line_each_without_source(folder, tmp_path):
    console = Console(record=True, width=300, file=open(tmp_path / "log", "w"))  # noqa: SIM115, PTH123
    data = {"calibration": folder / "text.jsonl", "lr": 1.0, "samples": 4, "length": 16, "iterations": 20}
    quantize(folder / "llama", out=tmp_path / "out", **data, console=console)
    lines = [line for line in console.export_text().splitlines() if "exp(" in line]
    assert lines
    assert all(line.startswith("warning: ") and "factors lie beyond" in line for line in lines)


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
    (tmp_path / "vit" / "preprocessor_config.json").rename(tmp_path / "kept.json")
    with pytest.raises(UsageError, match="holds no image processor"):
        quantize(tmp_path / "vit", out=tmp_path / "out", **data, **SMALL)
    (tmp_path / "kept.json").rename(tmp_path / "vit" / "preprocessor_config.json")
    for index in range(4):
        pillow.new("RGB", (10, 12), (index * 60, 20, 99)).save(tmp_path / "images" / "cat" / f"{index}.png")
    quantize(tmp_path / "vit", out=tmp_path / "out", **data, **SMALL)
    report = report_of(tmp_path / "out")
    reasons = {one["name"]: one["why"] for one in report["left"]}
    outside = "not chosen, or outside of the blocks"
    assert reasons.pop("classifier.weight") == outside
    assert reasons.pop("vit.embeddings.patch_embeddings.projection.weight") == outside
    assert set(reasons.values()) == {"a parameter of ViTEmbeddings, whose weights are not known"}
    loaded = load_quantized(tmp_path / "out")
    assert len(quantized_weights(loaded)) == 12
    pixels = torch.rand(2, 3, 8, 8)
    by_transformers = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    assert torch.equal(by_transformers(pixels).logits, loaded(pixels).logits)
    with pytest.raises(UsageError, match="must be a folder of images"):
        quantize(tmp_path / "vit", out=tmp_path / "out", method="rtn", calibration=folder / "text.jsonl", **SMALL)


@pytest.mark.parametrize("bos", [False, True])
def test_perplexity_counts_every_predicted_token_equally(folder, bos):
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


@pytest.mark.parametrize(("bos", "window"), [(False, 64), (True, 63)])
def test_a_window_with_its_bos_is_no_longer_than_what_the_model_takes(folder, bos, window):
    from weightsmith.tools.quantize.command import _Judge
    from weightsmith.tools.quantize.source import Source

    assert _Judge(Source(folder / "llama"), folder / "text.jsonl", 2048, bos, None).window == window
