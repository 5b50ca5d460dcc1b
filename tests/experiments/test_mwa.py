import dataclasses
import json
import math

import pytest
import torch

from weightsmith.core.errors import UsageError
from weightsmith.experiments import _questions, mwa
from weightsmith.lab import report
from weightsmith.lab.record import Recorder, read_jobs
from weightsmith.lab.run import run

TINY = dataclasses.replace(
    mwa.EXPERIMENT.presets["smoke"], train_examples=200, test_examples=100, steps=24, save_every=4, last=4
)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Folders under the names of the paper preset: questions, harder questions, a language model with its tokenizer."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers

    rows = [{"question": f"What is {i} plus 1?", "answer": f"One more.\n#### {i + 1}"} for i in range(12)]
    for name in ("gsm8k", "GSM-Plus"):
        (tmp_path / name).mkdir()
        for split in ("train", "test") if name == "gsm8k" else ("test",):
            (tmp_path / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["<pad>", "<unk>", "Question", "Answer", "What", "is", "plus", "One", "more", *":?.#", *map(str, range(14))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Punctuation()])
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<pad>", unk_token="<unk>")
    tokenizer.save_pretrained(tmp_path / "llama")
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    monkeypatch.setenv("WEIGHTSMITH_DATA", str(tmp_path))
    return tmp_path


def shortened(preset, folder, **more):
    return dataclasses.replace(
        preset, model=str(folder / "llama"), steps=8, save_every=2, last=3, few=2, batch_size=4, rank=2, length=24,
        **{"new_tokens": 4, **more},
    )  # fmt: skip


def test_every_arm_returns_every_metric_and_feeds_its_charts():
    for arm in mwa.arms(TINY):
        record = Recorder()
        metrics = mwa.job(TINY, arm.name, 0, record)
        assert set(metrics) == {metric.name for metric in mwa.METRICS}
        assert all(map(math.isfinite, metrics.values()))
        for chart in mwa.CHARTS:
            if arm.name in chart.arms:
                assert any({chart.x, chart.y} <= row.keys() and row["phase"] == chart.phase for row in record.rows)


def test_a_job_does_not_depend_on_the_jobs_before_it():
    mwa._run.cache_clear()
    alone = mwa.job(TINY, "loss", 0, Recorder())
    mwa._run.cache_clear()
    for arm in ("uniform-exact", "greedy", "last"):
        mwa.job(TINY, arm, 0, Recorder())
    assert mwa.job(TINY, "loss", 0, Recorder()) == alone
    assert mwa.job(TINY, "loss", 1, Recorder()) != alone


def test_merging_leaves_the_model_as_it_was():
    done = mwa._run(TINY, 0, "constant")
    before = [layer.weight.clone() for layer in done.problem.targets]
    members, weights, mode = mwa._recipe(done, TINY, "uniform-exact")
    with mwa._merged(done.problem, TINY, [done.states[i] for i in members], weights, mode):
        assert not torch.equal(done.problem.targets[0].weight, before[0])
    assert all(torch.equal(layer.weight, kept) for layer, kept in zip(done.problem.targets, before, strict=True))


def test_an_exact_merge_of_one_checkpoint_is_that_checkpoint():
    done = mwa._run(TINY, 0, "constant")
    found = []
    for mode in ("factors", "exact", "svd"):
        with mwa._merged(done.problem, TINY, done.states[-1:], [1.0], mode):
            found.append(done.problem.test()["loss"])
    assert found == pytest.approx(found[:1] * 3, rel=1e-4)


def test_more_checkpoints_than_the_run_saves_are_refused():
    with pytest.raises(UsageError, match="steps / save_every = 6, got 2 and 7"):
        mwa.check(dataclasses.replace(TINY, last=7))


def test_the_paper_preset_is_real_code(stand_in, tmp_path):
    paper = shortened(mwa.EXPERIMENT.presets["paper"], stand_in)
    mwa.check(paper)
    for arm in ("last", "loss", "uniform-svd", "greedy", "swa"):
        metrics = mwa.job(paper, arm, 0, Recorder())
        assert all(map(math.isfinite, metrics.values()))


def test_a_run_of_the_language_task_ends_in_a_report(stand_in, tmp_path):
    config = shortened(mwa.EXPERIMENT.presets["paper"], stand_in, harder="", new_tokens=0)
    done = run(mwa.EXPERIMENT, config, preset="paper", seeds=1, out=tmp_path / "runs", workers=1)
    assert not done.failures
    assert len(list(read_jobs(done.folder))) == len(mwa.arms(config))
    assert "inconclusive" in report.to_markdown(report.load(done.folder))


@pytest.mark.parametrize(
    ("text", "number"),
    [("so 3 + 4 = 7.\n#### 1,234", 1234), ("it is 5, no, 6.50", 6.5), ("#### -2", -2), ("none", None), ("12.", 12)],
)
def test_the_final_number_of_an_answer(text, number):
    assert _questions.final_number(text) == number


def test_questions_that_cannot_be_used_say_so(stand_in):
    with pytest.raises(UsageError, match="neither a folder nor a hub id"):
        _questions.find_questions("nowhere")
    (stand_in / "other").mkdir()
    (stand_in / "other" / "train.jsonl").write_text('{"text": "x"}')
    with pytest.raises(UsageError, match="needs columns question and answer or query and response, has text"):
        _questions.load_questions("other", "train", None)


def test_only_answers_are_learnt(stand_in):
    transformers = pytest.importorskip("transformers")
    tokenizer = transformers.AutoTokenizer.from_pretrained(stand_in / "llama")
    encoded = _questions.encode(tokenizer, [("What is 1 plus 1?", "2"), ("What is " * 40, "2")], 24)
    assert len(encoded.inputs) == 1  # the other's answer did not fit
    learnt = encoded.labels[0] != -100
    assert tokenizer.decode(encoded.labels[0][learnt]).split() == ["2", "<pad>"]
    with pytest.raises(UsageError, match="length must leave room for answers, got 3"):
        _questions.encode(tokenizer, [("What is 1 plus 1?", "2")], 3)
