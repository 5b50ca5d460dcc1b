import dataclasses
import json
import math

import pytest
import torch

from weightsmith.core.errors import UsageError
from weightsmith.experiments import flexround
from weightsmith.lab.record import Recorder, read_jobs
from weightsmith.lab.run import run

SMOKE = dataclasses.replace(flexround.EXPERIMENT.presets["smoke"], train_examples=200, epochs=1, iterations=6)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Calibration and test text, and a language model with its tokenizer, under the names of the paper preset."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("datasets")
    from tokenizers import Tokenizer, models, pre_tokenizers

    rows = [{"text": f"the {i} of {i + 1} is a {i + 2}"} for i in range(12)]
    for name, split in (("c4", "train"), ("wikitext", "test")):
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{split}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    words = ["<unk>", "the", "of", "is", "a", *map(str, range(14))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>").save_pretrained(tmp_path / "llama")
    config = transformers.LlamaConfig(
        vocab_size=len(words), hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "llama")
    monkeypatch.setenv("WEIGHTSMITH_DATA", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("arm", [arm.name for arm in flexround.arms(SMOKE)])
def test_every_arm_returns_every_metric_and_feeds_its_chart(arm):
    record = Recorder()
    metrics = flexround.job(SMOKE, arm, 0, record)
    assert set(metrics) == {metric.name for metric in flexround.METRICS}
    measured = {name: value for name, value in metrics.items() if not name.endswith(("_w4", "_w2"))}
    assert all(map(math.isfinite, measured.values()))
    assert [row["block"] for row in record.rows if row["phase"] == "W3"] == list(range(6))
    if arm == "rtn":
        assert metrics["moved_w3"] == 0


def test_all_arms_of_a_seed_quantise_the_same_network():
    full = [flexround.job(SMOKE, arm, 1, Recorder())["full_loss"] for arm in ("rtn", "flexround")]
    assert full[0] == full[1]


def test_settings_are_tried_and_chosen_on_held_out_data():
    record = Recorder()
    flexround.job(dataclasses.replace(SMOKE, flexround_lrs=(1e-3, 1e-2)), "flexround", 0, record)
    assert len([row for row in record.rows if row["phase"] == "settings"]) == 2


def test_it_runs_as_an_experiment(tmp_path):
    finished = run(flexround.EXPERIMENT, SMOKE, seeds=2, out=tmp_path, workers=1)
    jobs = read_jobs(finished.folder)
    assert {job.arm for job in jobs} == {arm.name for arm in flexround.arms(SMOKE)}


@pytest.mark.parametrize("arm", ["rtn", "adaround", "flexround"])
def test_the_paper_preset_is_real_code(stand_in, arm):
    config = dataclasses.replace(
        flexround.EXPERIMENT.presets["paper"],
        model=str(stand_in / "llama"),
        bits=(3,),
        samples=6,
        length=8,
        iterations=3,
        long=1,
        evaluation_length=8,
        flexround_lrs=(1e-2,),
        adaround_lrs=(1e-2,),
        penalties=(0.01,),
    )
    flexround.check(config)
    torch.manual_seed(0)
    metrics = flexround.job(config, arm, 0, Recorder())
    assert metrics["sqnr_w3"] > 0
    assert 0 < metrics["full_loss"] < 10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bits": (5,)}, "bits must be some of"),
        ({"model": "resnet0"}, "resnet0"),
        ({"data": "didgits"}, "didgits"),
        ({"task": "language", "data": "nowhere"}, "'nowhere' is neither a folder nor a hub id"),
    ],
)
def test_what_cannot_run_is_refused_before_any_job(change, message):
    with pytest.raises(UsageError, match=message):
        flexround.check(dataclasses.replace(SMOKE, **change))


def test_too_little_text_is_refused(stand_in):
    config = dataclasses.replace(
        flexround.EXPERIMENT.presets["paper"], model=str(stand_in / "llama"), length=4096, samples=4
    )
    with pytest.raises(UsageError, match=r"data has .* tokens, and at least 3 windows of 4096"):
        flexround.job(config, "rtn", 0, Recorder())
