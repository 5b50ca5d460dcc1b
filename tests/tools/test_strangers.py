"""Folders that somebody made to do harm, and the commands on them: nothing runs, nothing leaks, nothing is lost."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file

from weightsmith.cli import main
from weightsmith.core.errors import UsageError
from weightsmith.tools.merge import merge
from weightsmith.tools.quantize import quantize

QUIET = {"console": Console(quiet=True)}
RTN = {"method": "rtn", "format": "weightsmith", **QUIET}


class Malicious:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("trained") / "llama"
    torch.manual_seed(0)
    sizes = {"vocab_size": 32, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2, max_position_embeddings=16)).save_pretrained(folder)
    return folder


@pytest.fixture
def llama(trained, tmp_path):
    return shutil.copytree(trained, tmp_path / "llama")


def change(file, **values):
    file.write_text(json.dumps({**json.loads(file.read_text()), **values}))


def with_code(folder, proof):
    """Let a folder need code of its own, which leaves a proof when it runs."""
    change(folder / "config.json", model_type="own", architectures=["OwnForCausalLM"])
    change(
        folder / "config.json", auto_map={"AutoConfig": "own.OwnConfig", "AutoModelForCausalLM": "own.OwnForCausalLM"}
    )
    (folder / "own.py").write_text(
        f"import pathlib\npathlib.Path({str(proof)!r}).mkdir(exist_ok=True)\n"
        "from transformers import LlamaConfig, LlamaForCausalLM\n"
        "class OwnConfig(LlamaConfig):\n    model_type = 'own'\n"
        "class OwnForCausalLM(LlamaForCausalLM):\n    config_class = OwnConfig\n"
    )


def test_quantize_runs_no_code_from_the_folder_and_asks_nobody(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    with_code(llama, tmp_path / "proof")
    with pytest.raises(UsageError, match=r"needs Python code of its own .* \(--trust-remote-code\)"):
        quantize(llama, out=tmp_path / "out", **RTN)
    assert not (tmp_path / "proof").exists()
    assert not (tmp_path / "out").exists()


def test_quantize_runs_it_for_those_who_ask_for_it(llama, tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    with_code(llama, tmp_path / "proof")
    assert quantize(llama, out=tmp_path / "out", trust_remote_code=True, **RTN) == 0
    assert (tmp_path / "proof").exists()
    assert (tmp_path / "out" / "quantization_config.json").is_file()


def test_quantize_reads_bin_files_only_when_told_so_and_runs_nothing_in_them(llama, tmp_path):
    state = load_file(llama / "model.safetensors")
    (llama / "model.safetensors").unlink()
    torch.save(state, llama / "pytorch_model.bin")
    with pytest.raises(UsageError, match=r"allow_pickle=True \(--allow-pickle\)"):
        quantize(llama, out=tmp_path / "out", **RTN)
    assert quantize(llama, out=tmp_path / "out", allow_pickle=True, **RTN) == 0
    torch.save({**state, "x": Malicious(tmp_path / "proof")}, llama / "pytorch_model.bin")
    with pytest.raises(UsageError, match="cannot be read as plain tensors"):
        quantize(llama, out=tmp_path / "again", allow_pickle=True, **RTN)
    torch.save({**state, "x": torch.zeros(1).expand(2**40)}, llama / "pytorch_model.bin")
    with pytest.raises(UsageError, match="made to fill the memory"):
        quantize(llama, out=tmp_path / "again", allow_pickle=True, **RTN)
    assert not (tmp_path / "proof").exists()
    assert not (tmp_path / "again").exists()


def test_quantize_follows_no_index_out_of_the_folder(llama, tmp_path):
    (llama / "model.safetensors").rename(tmp_path / "elsewhere.safetensors")
    save_file({"a": torch.ones(1)}, llama / "other.safetensors")
    names = dict.fromkeys(load_file(tmp_path / "elsewhere.safetensors"), "../elsewhere.safetensors")
    (llama / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    with pytest.raises(UsageError, match="must be a plain file name"):
        quantize(llama, out=tmp_path / "out", **RTN)


@pytest.mark.parametrize(
    "architectures", [None, [], ["Gone"], ["pipeline"], ["AutoModel"], "LlamaForCausalLM", [3], [[]]]
)
def test_an_architecture_that_is_no_model_is_named(llama, tmp_path, architectures):
    change(llama / "config.json", architectures=architectures)
    with pytest.raises(UsageError, match=r"config\.json"):
        quantize(llama, out=tmp_path / "out", **RTN)


def test_a_damaged_tokenizer_and_calibration_are_one_line_each(llama, tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    with pytest.raises(UsageError, match=r"latin.jsonl, line 1, is not UTF-8"):
        quantize(llama, out=tmp_path / "out", calibration=tmp_path / "latin.jsonl", **RTN)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    with pytest.raises(UsageError, match=r"latin.txt is not UTF-8"):
        quantize(llama, out=tmp_path / "out", calibration=tmp_path / "latin.txt", **RTN)
    (tmp_path / "text.jsonl").write_text('{"text": "one two"}\n')
    (llama / "tokenizer.json").write_text("{")
    with pytest.raises(UsageError, match="AutoTokenizer cannot be loaded") as caught:
        quantize(llama, out=tmp_path / "out", calibration=tmp_path / "text.jsonl", **RTN)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"\xff" * 40, None])
def test_damaged_finished_blocks_say_what_to_remove(llama, tmp_path, monkeypatch, content):
    def full(*_, **__):
        raise OSError("No space left")

    with monkeypatch.context() as patch:
        patch.setattr("weightsmith.tools.quantize.command.save_quantized", full)
        with pytest.raises(OSError, match="No space"):
            quantize(llama, out=tmp_path / "out", **RTN)
    for file in (tmp_path / "out.partial").rglob("*.safetensors"):
        file.write_bytes(file.read_bytes()[:-9] if content is None else content)
    with pytest.raises(UsageError, match=r"is damaged: .*; remove .*out\.partial to quantize from the start"):
        quantize(llama, out=tmp_path / "out", **RTN)


def run_folder(at, count=2):
    for i in range(1, count + 1):
        folder = at / f"checkpoint-{i}"
        folder.mkdir(parents=True)
        save_file(
            {"a": torch.full((4,), float(i)), "b": torch.full((2,), float(i))},
            folder / "model.safetensors",
            {"format": "pt"},
        )
        (folder / "config.json").write_text("{}")
    return at


def test_merge_writes_the_index_of_what_it_wrote(tmp_path):
    run = run_folder(tmp_path / "run")
    for folder in run.iterdir():
        torch.save({"a": torch.ones(4), "b": torch.ones(2)}, folder / "pytorch_model.bin")
        names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert merge((run,), out=tmp_path / "out", scheme="uniform", last=2) == 0
    assert not list((tmp_path / "out").glob("*.index.json"))
    assert load_file(tmp_path / "out" / "model.safetensors")["a"][0] == 1.5


def test_merge_turns_sharded_pickles_into_shards_with_their_index(tmp_path):
    run = run_folder(tmp_path / "run")
    for folder in run.iterdir():
        state = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        names = {"a": "pytorch_model-00001-of-00002.bin", "b": "pytorch_model-00002-of-00002.bin"}
        for name, file in names.items():
            torch.save({name: state[name]}, folder / file)
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": names}))
    assert merge((run,), out=tmp_path / "out", scheme="uniform", last=2, allow_pickle=True) == 0
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index == {
        "metadata": {"total_size": 24},
        "weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"},
    }
    for name, file in index["weight_map"].items():
        assert load_file(tmp_path / "out" / file)[name][0] == 1.5


def test_merge_says_when_it_copies_through_a_link(tmp_path, capsys):
    run = run_folder(tmp_path / "run")
    (tmp_path / "secret").write_text("key")
    (run / "checkpoint-2" / "notes.txt").symlink_to(tmp_path / "secret")
    merge((run,), out=tmp_path / "out", scheme="uniform", last=2)
    assert re.search(r"note: .*notes\.txt is a link out of its folder, to .*secret", capsys.readouterr().out)


def test_names_with_markup_and_control_sequences_are_only_names(tmp_path, capsys):
    run = run_folder(tmp_path / "run")
    with pytest.raises(SystemExit) as done:
        main(["merge", str(run), "--out", str(tmp_path / "m[/q]\x1b[31m"), "--scheme", "uniform", "--last", "2"])
    assert done.value.code == 0
    shown = capsys.readouterr().out
    assert "m[/q]" in shown
    assert "\x1b" not in shown


@pytest.mark.parametrize(
    "log",
    [
        "{",
        "[]",
        '{"log_history": [{"loss": 1}]}',
        '{"log_history": [{"step": 1, "loss": "x"}]}',
        '{"log_history": [{"step": 1, "loss": 1' + "0" * 400 + "}]}",
        "[" * 10**5,
        '{"log_history": ' + "[" * 10**5,
    ],
)
def test_a_damaged_log_is_one_line(tmp_path, log):
    run = run_folder(tmp_path / "run")
    (run / "checkpoint-2" / "trainer_state.json").write_text(log)
    with pytest.raises(UsageError, match=r"trainer_state\.json") as caught:
        merge((run,), out=tmp_path / "out", last=2)
    assert "\n" not in str(caught.value)


def test_neither_command_writes_over_what_it_reads(llama, tmp_path):
    run = run_folder(tmp_path / "run")
    for out in (run, run / "checkpoint-1", tmp_path):
        with pytest.raises(UsageError, match="out must be neither in, around nor equal"):
            merge((run,), out=out, scheme="uniform", last=2, overwrite=True)
    (tmp_path / "text.jsonl").write_text("{}")
    (tmp_path / "quantization_report.json").write_text("{}")  # as if it had been written by the command
    for out in (llama, tmp_path):
        with pytest.raises(UsageError, match="out must be neither in, around nor equal"):
            quantize(llama, out=out, **RTN)


@pytest.mark.parametrize("command", ["merge", "show"])
def test_commands_work_with_an_ascii_terminal_and_without_a_home(tmp_path, command):
    run = run_folder(tmp_path / "run")
    state = {"log_history": [{"step": i, "loss": 1.0, "note": "é"} for i in (1, 2)]}
    (run / "checkpoint-2" / "trainer_state.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
    words = {"merge": ["merge", run, "--out", tmp_path / "é", "--last", "2"], "show": ["show", "adamp"]}[command]
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": os.environ.get("PYTHONPATH", ""), "LC_ALL": "C"}
    environment |= {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # else Python takes C for UTF-8
    call = [sys.executable, "-c", "from weightsmith.cli import main; main()", *map(str, words)]
    done = subprocess.run(call, env=environment, capture_output=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr.decode()
    assert command == "show" or (tmp_path / "é" / "model.safetensors").is_file()
