"""The experiment on adapters: fair baselines, real presets, two tasks."""

import copy
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn
from weightsmith.experiments._questions import load_questions

from weightsmith.adapt import trainable_parameters
from weightsmith.core.errors import UsageError
from weightsmith.experiments import bone
from weightsmith.lab import report
from weightsmith.lab.record import Recorder, read_jobs
from weightsmith.lab.run import run

pytest.importorskip("peft")
TINY = dataclasses.replace(bone.EXPERIMENT.presets["smoke"], train_examples=200, test_examples=100, steps=20, early=10)
ARMS = [arm.name for arm in bone.arms(TINY)]


@pytest.fixture
def language(tmp_path, monkeypatch):
    """A tiny language model with its tokenizer, and tiny data sets under the names of the papers' ones."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers

    for name, question, answer in (("MetaMathQA", "query", "response"), ("gsm8k", "question", "answer")):
        (tmp_path / name).mkdir()
        rows = [json.dumps({question: f"What is {i} + 1?", answer: f"One more. #### {i + 1}"}) for i in range(16)]
        for split in ("train", "test") if name == "gsm8k" else ("train",):
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(rows))
    words = ["<pad>", "<unk>", "Question", "Answer", "What", "is", "One", "more", *":?.#+*()=", *map(str, range(20))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "llama")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    monkeypatch.setenv("WEIGHTSMITH_DATA", str(tmp_path))
    return {
        "model": str(tmp_path / "llama"),
        "steps": 4,
        "early": 2,
        "batch_size": 4,
        "r": 4,
        "length": 32,
        "lrs": (1e-3, 1e-2),
        "shared_lr": 1e-3,
    }


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_returns_every_metric_and_feeds_every_chart(arm):
    record = Recorder()
    metrics = bone.job(TINY, arm, 0, record)
    assert set(metrics) == {metric.name for metric in bone.METRICS}
    assert all(map(math.isfinite, metrics.values()))
    for chart in bone.CHARTS:
        assert any({chart.x, chart.y} <= row.keys() and row["phase"] == chart.phase for row in record.rows)


def test_a_job_is_a_pure_function_of_config_arm_and_seed_but_for_its_times():
    def measured(seed):
        metrics = bone.job(TINY, "pissa", seed, Recorder())
        return {name: value for name, value in metrics.items() if not name.endswith("_ms")}

    assert measured(0) == measured(0) != measured(1)


def test_arms_train_as_many_numbers_as_their_form_allows():
    model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU(), nn.Linear(128, 10))
    counts = {}
    for arm in ARMS:
        counts[arm] = trainable_parameters(bone._adapted(TINY, arm, copy.deepcopy(model))).trainable
    assert counts == {"full": 24576, "lora": 4032, "pissa": 4032, "miss": 4096, "col": 4096, "row": 3072}


def test_a_new_adapter_leaves_the_network_as_it_was():
    x = torch.randn(3, 64)
    for arm in ARMS:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 16))
        assert torch.allclose(bone._adapted(TINY, arm, model)(x), nn.Sequential(*model)(x), atol=1e-5)


@pytest.mark.parametrize("baseline", ["lora", "pissa"])
def test_the_baselines_are_the_papers(baseline):
    numbers = load_file(Path(__file__).parents[1] / "golden" / "bone.safetensors")
    golden = {key.split("/")[1]: value for key, value in numbers.items() if key.startswith(f"{baseline}/")}
    model = nn.Sequential(nn.Linear(24, 20, bias=False), nn.Linear(20, 4))
    model[0].weight.data = golden["W"].clone()
    config = dataclasses.replace(TINY, r=9)  # the rank is then 4
    layer = bone._adapted(config, baseline, model).base_model.model[0]
    assert layer.scaling["default"] == golden["scaling"].item()
    if baseline == "lora":
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = golden["A"], golden["B"]
    assert torch.allclose(layer.base_layer.weight, golden["W_base_after"], atol=1e-5)
    assert torch.allclose(layer.get_delta_weight("default"), golden["delta"], atol=1e-5)
    assert torch.allclose(layer(golden["x"]), golden["y"], atol=1e-5)


def test_a_rate_at_which_training_diverges_loses_the_sweep():
    metrics = bone.job(dataclasses.replace(TINY, lrs=(1e30, 1e-3)), "full", 0, Recorder())
    assert metrics["best_lr"] == 1e-3


def test_settings_that_contradict_each_other_are_refused():
    with pytest.raises(UsageError, match="shared_lr must be one of lrs"):
        bone.check(dataclasses.replace(TINY, shared_lr=1.0))
    with pytest.raises(UsageError, match="early must be between 1 and steps, 20, got 21"):
        bone.check(dataclasses.replace(TINY, early=21))


def test_the_paper_preset_is_real_code(language, tmp_path):
    paper = dataclasses.replace(bone.EXPERIMENT.presets["paper"], new_tokens=3, **language)
    done = run(bone.EXPERIMENT, paper, preset="paper", seeds=1, out=tmp_path / "runs", workers=1)
    assert not done.failures
    assert len(list(read_jobs(done.folder))) == len(bone.arms(paper))
    assert "inconclusive" in report.to_markdown(report.load(done.folder))


def test_sums_need_no_data_and_the_test_asks_for_others(language):
    config = bone.Config(task="language", data="arithmetic", train_examples=40, test_examples=8, **language)
    bone.check(config)
    assert math.isfinite(bone.job(config, "row", 0, Recorder())["tuned_loss"])
    train, test = (load_questions("arithmetic", split, None) for split in ("train", "test"))
    assert (len(train), len(test)) == (2000, 200)
    assert not {question for question, _ in train} & {question for question, _ in test}
    question, answer = train[0]
    assert eval(question[8:-1]) == int(answer.rpartition(" ")[2])


def test_questions_without_known_columns_are_refused(language, tmp_path):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "train.jsonl").write_text('{"text": "x"}')
    with pytest.raises(UsageError, match="has text"):
        load_questions("other", "train", None)
