import dataclasses
import logging

import pytest
import torch

from weightsmith.core.errors import MissingExtra, UsageError
from weightsmith.experiments import flexround
from weightsmith.experiments.auto_round import auto_round_, installed
from weightsmith.lab.fingerprint import config_digest
from weightsmith.lab.record import read_jobs
from weightsmith.lab.run import run
from weightsmith.lab.tasks import make_task
from weightsmith.lab.tasks.tokenized import tokenizer_of
from weightsmith.quantize import Grid

EXPERIMENT = flexround.EXPERIMENT


@pytest.fixture
def config(tiny_language_model, tmp_path):
    """Of a language model that auto-round takes."""
    (tmp_path / "text.txt").write_text("".join(f"{n} plus {n} is {2 * n}. " for n in range(400)))
    return dataclasses.replace(
        EXPERIMENT.preset("smoke"), task="language", data=str(tmp_path / "text.txt"), model=tiny_language_model,
        length=24, samples=16, round_batch=4, iterations=4, train_examples=60, test_examples=8, epochs=1,
        granularity="channel", search="minmax", auto_round=True,
    )  # fmt: skip


def names(config):
    return [arm.name for arm in EXPERIMENT.arms(config)]


def losers(config):
    return [claim.loser for claim in EXPERIMENT.claims(config)]


def test_auto_round_is_an_arm_for_language_models_of_transformers_alone(config):
    assert "auto-round" in names(config)
    assert "auto-round" in losers(config)
    for changes in ({"task": "images", "model": ""}, {"model": "transformer"}, {"auto_round": False}):
        other = dataclasses.replace(config, **changes)
        assert "auto-round" not in names(other)
        assert "auto-round" not in losers(other)


def test_whether_it_is_an_arm_belongs_to_the_configuration(config):
    assert flexround.Config().auto_round == installed()
    assert config_digest(config) != config_digest(dataclasses.replace(config, auto_round=False))


@pytest.mark.skipif(installed(), reason="auto-round is installed")
def test_asked_for_and_not_installed_it_is_refused_with_what_to_do(config):
    with pytest.raises(MissingExtra, match=r'--no-auto-round leaves it out: pip install "weightsmith\[quantize\]"'):
        EXPERIMENT.check(config)


def test_asked_for_where_it_cannot_round_it_is_left_out_in_one_line(caplog):
    with caplog.at_level(logging.WARNING):
        EXPERIMENT.check(flexround.Config(auto_round=True))
    (line,) = caplog.messages
    assert line.startswith("left out: auto-round, which rounds causal language models")


def test_it_gets_as_many_settings_as_the_others(config):
    pytest.importorskip("auto_round")
    with pytest.raises(UsageError, match="auto_round_lrs must give every method the same number of settings"):
        EXPERIMENT.check(dataclasses.replace(config, auto_round_lrs=(1.0, 2.0)))


def test_it_puts_the_weights_of_blocks_on_a_grid_the_same_way_each_time(config):
    pytest.importorskip("auto_round")
    task = make_task(config)
    given = {"tokenizer": tokenizer_of(config), "iterations": 3, "batch_size": 4}
    found = []
    for _ in range(2):
        model = config.network(task, 0)
        calibration = task.train.__getitems__(range(16)).inputs
        report = auto_round_(model, calibration, Grid(3, search="minmax"), seed=0, **given)
        assert report.model is model
        assert not model.training
        found.append({name: value.clone() for name, value in model.state_dict().items()})
    name = "model.layers.0.mlp.up_proj.weight"
    assert all(len(row.unique()) <= 8 for row in found[0][name])
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


def test_layers_that_it_leaves_as_they_were_are_no_win(config):
    pytest.importorskip("auto_round")
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"vocab_size": 48, "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=2)).eval()
    calibration = {"input_ids": torch.randint(3, 48, (8, 12))}
    with pytest.raises(
        UsageError, match=r"auto-round left 7 of 7 layers as they were, the first is model.layers.0.self"
    ):
        auto_round_(model, calibration, Grid(3), tokenizer=tokenizer_of(config), iterations=1, batch_size=4, seed=0)


def test_its_arm_is_measured_beside_the_others(config, tmp_path):
    pytest.importorskip("auto_round")
    done = run(EXPERIMENT, config, seeds=1, arms=["rtn", "auto-round"], out=tmp_path, workers=1)
    assert [failure.error for failure in done.failures] == []
    by_arm = {job.arm: job.metrics for job in read_jobs(done.folder)}
    assert by_arm["rtn"]["sqnr_w3"] - 1 < by_arm["auto-round"]["sqnr_w3"] < 60  # in full precision: above 3000
    assert "moved_w3" not in by_arm["auto-round"]
