"""What the toy models cannot show: the same verbs on language models and encoders that people use."""

import copy
import json
import subprocess
import sys

import pytest
import torch
from rich.console import Console
from torch.nn import functional as F

from weightsmith.adapt import BoneConfig, apply_bone_, save_bone
from weightsmith.quantize import Grid, flexround_, load_quantized, round_to_nearest_
from weightsmith.tools.quantize import REPORT, quantize

pytestmark = pytest.mark.models
transformers = pytest.importorskip("transformers")

FACT = (
    "Natural selection is the differential survival and reproduction of individuals due to differences in phenotype. "
    "It is a key mechanism of evolution."
)
TEXT = f"{FACT} Heritable traits become more or less common in a population over generations, as their bearers differ."
QUESTION = "What is the capital of France? Answer in one sentence."


@pytest.fixture(scope="module")
def smol(real_model):
    return real_model("SmolLM2-135M-Instruct")


@pytest.fixture(scope="module")
def language_model(smol):
    model = transformers.AutoModelForCausalLM.from_pretrained(smol, dtype="auto").eval()
    return model, transformers.AutoTokenizer.from_pretrained(smol)


def loss_of(model, tokens):
    with torch.no_grad():
        return model(input_ids=tokens, labels=tokens).loss.item()


def test_the_fetched_model_is_the_one_that_is_documented(language_model):
    model, tokenizer = language_model
    tokens = tokenizer(FACT, return_tensors="pt")["input_ids"]
    assert tokens.shape == (1, 24)
    assert loss_of(model, tokens) == pytest.approx(3.1771, abs=2e-3)


def test_flexround_brings_the_blocks_of_a_language_model_closer_than_rounding_to_nearest(language_model):
    model, tokenizer = language_model
    tokens = tokenizer(TEXT, return_tensors="pt")["input_ids"][0, :40].view(4, 10)
    where, grid = ["model.layers.0.*", "model.layers.1.*"], Grid(3, search="minmax")
    kept = {}
    for verb, options in ((round_to_nearest_, {}), (flexround_, {"iterations": 20, "lr": 1e-2})):
        rounded = copy.deepcopy(model)
        report = verb(rounded, tokens, grid, where=where, batch_size=2, **options)
        assert [block.name for block in report.blocks] == ["model.layers.0", "model.layers.1"]
        kept[report.method] = report.blocks[-1].error
    assert kept["flexround"] < 0.7 * kept["rtn"]


def test_an_eight_bit_folder_answers_a_question_in_a_fresh_process(smol, tmp_path):
    out = tmp_path / "int8"
    assert quantize(smol, out=out, method="rtn", bits=8, console=Console(quiet=True)) == 0
    code = f"""
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer
model, tokenizer = (kind.from_pretrained({str(out)!r}) for kind in (AutoModelForCausalLM, AutoTokenizer))
chat = tokenizer.apply_chat_template([{{"role": "user", "content": {QUESTION!r}}}], add_generation_prompt=True,
    return_tensors="pt", return_dict=True)
answer = model.generate(**chat, max_new_tokens=8, do_sample=False)[0, chat["input_ids"].shape[1]:]
print(tokenizer.decode(answer, skip_special_tokens=True))
assert not any(name.startswith("weightsmith") for name in sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.startswith("The capital of France is Paris.")
    report = json.loads((out / REPORT).read_text())
    assert len(report["blocks"]) == 210
    assert [left["why"] for left in report["left"]] == ["tied to lm_head.weight"]


def test_an_encoder_keeps_its_embeddings_on_four_bits(real_model, tmp_path):
    folder, out = real_model("all-MiniLM-L6-v2"), tmp_path / "int4"
    texts = tmp_path / "text.jsonl"
    texts.write_text("\n".join(json.dumps({"text": part}) for part in TEXT.split(". ") * 4))
    options = {"calibration": texts, "samples": 8, "iterations": 30, "batch_size": 4, "lr": 3e-3}
    quantize(folder, out=out, bits=4, **options, console=Console(quiet=True))
    tokens = transformers.AutoTokenizer.from_pretrained(folder)("Evolution has a mechanism.", return_tensors="pt")
    with torch.no_grad():
        before, after = (
            model(**tokens).last_hidden_state.mean(1)
            for model in (transformers.AutoModel.from_pretrained(folder), load_quantized(out))
        )
    assert F.cosine_similarity(before, after).item() > 0.95
    report = json.loads((out / REPORT).read_text())
    assert all(block["error"] <= block["error_rtn"] for block in report["blocks"])


@pytest.mark.parametrize(("variant", "saved"), [("row", "native"), ("miss", "peft")])
def test_an_adapter_learns_a_sentence_and_its_folder_loads(language_model, tmp_path, variant, saved):
    model, tokenizer = copy.deepcopy(language_model[0]), language_model[1]
    tokens = tokenizer(FACT, return_tensors="pt")["input_ids"]
    before = loss_of(model, tokens)
    apply_bone_(model, BoneConfig(r=64, variant=variant))
    assert loss_of(model, tokens) == before
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=3e-4, weight_decay=0.0)
    for _ in range(3):
        optimizer.zero_grad()
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
    learned = loss_of(model, tokens)
    assert learned < before - 0.5
    save_bone(model, tmp_path, format=saved)
    if saved == "peft":
        peft = pytest.importorskip("peft")
        fresh = peft.PeftModel.from_pretrained(copy.deepcopy(language_model[0]), tmp_path)
    else:
        from weightsmith.adapt import load_bone

        fresh = load_bone(copy.deepcopy(language_model[0]), tmp_path)
    assert loss_of(fresh, tokens) == pytest.approx(learned, abs=1e-4)
