"""The published settings at toy size: a language model of a few thousand weights, trained through TRL."""

import dataclasses
import json

import pytest
import torch

pytest.importorskip("trl")

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from weightsmith.core.errors import UsageError
from weightsmith.experiments import dynamic_reward_weighting, language_policy, steer
from weightsmith.lab.job import Job
from weightsmith.lab.record import Recorder

TOY = {
    "steps": 2, "prompts": 2, "samples": 4, "mini_batches": 2, "micro_batch": 4, "max_tokens": 6, "test_prompts": 3,
    "test_samples": 2, "measure_prompts": 2, "measure_samples": 2, "measure_every": 1, "lr": 1e-2,
}  # fmt: skip


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    torch.manual_seed(0)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 2}
    Qwen2ForCausalLM(
        Qwen2Config(vocab_size=24, num_key_value_heads=1, bos_token_id=1, eos_token_id=1, pad_token_id=0, **shape)
    ).save_pretrained(folder / "model")
    words = {word: index for index, word in enumerate(["<pad>", "<eos>", *[f"w{i}" for i in range(22)]])}
    made = Tokenizer(models.WordLevel(words, unk_token="w0"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="<eos>").save_pretrained(
        folder / "model"
    )
    for split, count in (("train", 8), ("test", 3)):
        rows = [json.dumps({"question": f"w{i}", "answer": str(i)}) for i in range(count)]
        (folder / "data").mkdir(exist_ok=True)
        (folder / "data" / f"{split}.jsonl").write_text("\n".join(rows))
    return {"model": str(folder / "model"), "data": str(folder / "data")}


@pytest.fixture(autouse=True)
def words_as_tokens(monkeypatch):
    # for a Qwen2 model the automatic class would build another tokenizer than the folder's
    monkeypatch.setattr("transformers.AutoTokenizer.from_pretrained", PreTrainedTokenizerFast.from_pretrained)


def finished(module, arm, toy, folder, **changes):
    config = dataclasses.replace(module.EXPERIMENT.preset("paper"), **TOY | toy | changes)
    module.EXPERIMENT.check(config)
    job = Job(arm, 0, Recorder(), folder, torch.device("cpu"), start=module.EXPERIMENT.start(config, 0, folder))
    return module.EXPERIMENT.job(config, job), job, config


def words(texts):
    """A reward that this model can earn."""
    return [float("w3" in text or "w5" in text) for text in texts]


@pytest.mark.parametrize(
    ("module", "arm"),
    [(steer, "steer-exact"), (steer, "kl-cov"), (dynamic_reward_weighting, "gradient"),
     (dynamic_reward_weighting, "hypervolume")],
)  # fmt: skip
def test_the_paper_preset_trains_a_language_model(module, arm, toy, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(language_policy, "right", lambda completions, **_: words(completions))
    found, job, config = finished(module, arm, toy, tmp_path)
    assert set(found) == {metric.name for metric in module.EXPERIMENT.metrics(config)}
    assert [row["step"] for row in job.record.rows] == [0.0, 1.0, 2.0]
    assert not job.diverged
    assert not capsys.readouterr().out
    if module is steer:
        assert job.record.rows[0]["entropy"] != job.record.rows[-1]["entropy"]
    if arm == "gradient":
        assert found["weight_accuracy"] != pytest.approx(0.334, abs=1e-9)


def test_the_arm_before_trains_nothing(toy, tmp_path):
    found, job, _ = finished(steer, "before", toy, tmp_path)
    assert [row["step"] for row in job.record.rows] == [0.0]
    assert not list(tmp_path.glob("checkpoint-*"))
    assert found["entropy"] > 0


def test_lora_begins_with_what_supervised_steps_have_made_of_it_and_nothing_else_moves(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(language_policy, "right_number", lambda completions, **_: words(completions))
    started = {"rank": 2, "answers": "number", "warmup_steps": 2, "warmup_batch": 2, "warmup_lr": 1e-2}
    _, job, config = finished(steer, "steer", toy, tmp_path / "steer", **started)
    assert job.start
    assert all("lora_" in name for name in job.start)
    assert any(value.any() for name, value in job.start.items() if "lora_B" in name)
    plain, _, _ = finished(steer, "before", toy, tmp_path / "before", **started)
    again, _, _ = finished(steer, "before", toy, tmp_path / "again", **started)
    untaught, _, _ = finished(steer, "before", toy, tmp_path / "untaught", **started | {"warmup_steps": 0})
    assert plain["entropy"] == again["entropy"] != untaught["entropy"]
    assert steer.EXPERIMENT.facts(config)["model"].endswith("LoRA of rank 2")
    assert steer.EXPERIMENT.step_seconds(config) > 0


def test_a_killed_run_with_lora_goes_on_as_if_nothing_had_happened(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(language_policy, "right_number", lambda completions, **_: words(completions))
    started = {"rank": 2, "answers": "number", "warmup_steps": 1, "warmup_batch": 2, "steps": 3}
    whole, _, _ = finished(steer, "steer", toy, tmp_path / "whole", **started)
    finished(steer, "steer", toy, tmp_path / "cut", **started | {"steps": 1})
    resumed, _, _ = finished(steer, "steer", toy, tmp_path / "cut", **started)
    assert {name: str(value) for name, value in resumed.items()} == {name: str(value) for name, value in whole.items()}


def test_supervised_steps_without_worked_answers_are_refused(toy, tmp_path):
    with pytest.raises(UsageError, match="warmup_steps must be 0 for answers in boxes"):
        finished(steer, "grpo", toy, tmp_path, warmup_steps=1)


def test_what_the_paper_preset_needs_is_said_in_one_line():
    with pytest.raises(UsageError, match=r"needs trl, at the published size a GPU of 80 GB per job, and --data"):
        steer.EXPERIMENT.check(steer.EXPERIMENT.preset("paper"))


def test_batches_that_do_not_divide_are_refused(toy, tmp_path):
    with pytest.raises(UsageError, match="multiple of micro_batch"):
        finished(steer, "grpo", toy, tmp_path, micro_batch=3)


def test_too_little_data_is_refused(toy, tmp_path):
    with pytest.raises(UsageError, match="more than measure_prompts, 8, got 8"):
        finished(steer, "grpo", toy, tmp_path, measure_prompts=8)
