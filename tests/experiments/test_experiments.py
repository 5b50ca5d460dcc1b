"""The first experiments: their mechanics are true, their presets are real code, and they run on many processes."""

import dataclasses
import io
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pytest
import torch

from weightsmith.core.errors import UsageError
from weightsmith.experiments import adamp, weight_compander
from weightsmith.lab import report
from weightsmith.lab.record import Recorder, read_jobs
from weightsmith.lab.run import run

TINY_ADAMP = dataclasses.replace(adamp.EXPERIMENT.presets["smoke"], train_examples=200, epochs=1)
TINY_COMPANDER = dataclasses.replace(weight_compander.EXPERIMENT.presets["smoke"], train_examples=200, epochs=1)
BOTH = pytest.mark.parametrize(
    ("experiment", "config"), [(adamp.EXPERIMENT, TINY_ADAMP), (weight_compander.EXPERIMENT, TINY_COMPANDER)]
)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """A folder with tiny data sets in the hub's layout under the names of the papers' data sets."""
    datasets = pytest.importorskip("datasets")
    image = pytest.importorskip("PIL.Image")
    rng = np.random.default_rng(0)

    def picture(size):
        buffer = io.BytesIO()
        image.fromarray(rng.integers(0, 255, (size, size, 3), dtype=np.uint8)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    for name, column, label, size in (("cifar100", "img", "fine_label", 32), ("imagenet", "image", "label", 80)):
        features = datasets.Features(
            {column: datasets.Image(), label: datasets.ClassLabel(names=["cat", "dog", "owl"])}
        )
        for split, rows in (("train", 24), ("test", 12)):
            table = {column: [picture(size) for _ in range(rows)], label: [i % 3 for i in range(rows)]}
            (tmp_path / name).mkdir(exist_ok=True)
            datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / name / f"{split}.parquet")
    monkeypatch.setenv("WEIGHTSMITH_DATA", str(tmp_path))
    monkeypatch.setenv("WEIGHTSMITH_CACHE", str(tmp_path / "cache"))


@BOTH
def test_a_job_is_a_pure_function_of_config_arm_and_seed(experiment, config):
    arm = experiment.arms(config)[1].name
    first, second = Recorder(), Recorder()
    assert experiment.job(config, arm, 0, first) == experiment.job(config, arm, 0, second)
    assert first.rows == second.rows
    assert experiment.job(config, arm, 1, Recorder()) != experiment.job(config, arm, 0, Recorder())


@BOTH
def test_every_arm_returns_every_metric_and_feeds_every_chart(experiment, config):
    for arm in experiment.arms(config):
        record = Recorder()
        metrics = experiment.job(config, arm.name, 0, record)
        assert set(metrics) == {metric.name for metric in experiment.metrics}
        for chart in experiment.charts:
            assert any({chart.x, chart.y} <= row.keys() and row["phase"] == chart.phase for row in record.rows)


@BOTH
@pytest.mark.slow
def test_the_paper_preset_is_real_code(experiment, config, stand_in, tmp_path):
    shorter = {"epochs": 1, "batch_size": 8, "mixed_precision": None}
    if experiment is adamp.EXPERIMENT:
        shorter |= {"sgd_lrs": (0.1,), "adam_lrs": (0.001,), "without_decay": False}
    else:
        shorter |= {"scales": (1.0,), "milestones": (0.5,)}
    paper = dataclasses.replace(experiment.presets["paper"], **shorter)
    done = run(experiment, paper, preset="paper", seeds=1, out=tmp_path / "runs", workers=2)
    assert not done.failures
    assert len(list(read_jobs(done.folder))) == len(experiment.arms(paper))
    assert "inconclusive" in report.to_markdown(report.load(done.folder))


@pytest.mark.parametrize(
    ("momentum", "nesterov", "project_buffer", "norm", "steps"),
    [(0.9, False, True, 1.57, 27), (0.9, True, False, 1.34, 14), (0.99, True, False, 1.37, 15)],
)
def test_the_plane_problem_gives_the_known_figures(momentum, nesterov, project_buffer, norm, steps, monkeypatch):
    # start angle 2.6, learning rate 0.1, 400 steps: reference figures of the authors' package
    from weightsmith.optim import SGDP

    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(0.6, dtype=torch.float64))
    make = lambda params, lr: SGDP(params, lr, momentum, nesterov=nesterov, project_buffer=project_buffer)  # noqa: E731
    found = adamp._plane(make, 0, Recorder())
    assert found == (pytest.approx(norm, abs=0.006), steps)


@pytest.mark.parametrize(("momentum", "norm", "steps"), [(0.0, 1.09, 57), (0.9, 6.03, 56), (0.99, 59.6, 154)])
def test_plain_momentum_inflates_the_norm_in_the_plane(momentum, norm, steps, monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda *_, **__: torch.tensor(0.6, dtype=torch.float64))
    found = adamp._plane(partial(torch.optim.SGD, momentum=momentum), 0, Recorder())
    assert found == (pytest.approx(norm, rel=0.005), steps)


def test_a_reference_rate_outside_the_sweep_is_refused():
    with pytest.raises(UsageError, match="adam_reference_lr must be one of adam_lrs"):
        adamp.check(dataclasses.replace(TINY_ADAMP, adam_reference_lr=1.0))


def test_the_arms_own_rate_must_be_among_the_scales():
    with pytest.raises(UsageError, match="scales must contain 1"):
        weight_compander.check(dataclasses.replace(TINY_COMPANDER, scales=(2.0,)))


def test_a_rate_at_which_training_diverges_loses_the_sweep():
    config = dataclasses.replace(TINY_ADAMP, sgd_lrs=(1e30, 0.1), model="mlp")
    metrics = adamp.job(config, "sgd", 0, Recorder())
    assert metrics["best_lr"] == 0.1


def test_two_processes_train_an_experiment_to_the_same_weights(tmp_path):
    script = f"""
import dataclasses, sys, torch
from pathlib import Path
from weightsmith.experiments.adamp import EXPERIMENT
from weightsmith.lab.run import run
config = dataclasses.replace(EXPERIMENT.presets["smoke"], train_examples=200, epochs=2, model="mlp")
done = run(EXPERIMENT, config, seeds=1, out=Path({str(tmp_path)!r}) / sys.argv[1], workers=1)
assert not done.failures, done.failures
"""
    (tmp_path / "experiment.py").write_text(script)
    # accelerate's own launcher starts one process only when told to stay on the CPU
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    on_cpu = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    subprocess.run([*launch, tmp_path / "experiment.py", "two"], check=True, timeout=300, env=on_cpu)
    subprocess.run([sys.executable, tmp_path / "experiment.py", "one"], check=True, timeout=300, env=on_cpu)
    one, two = (
        {job.arm: job.metrics for job in read_jobs(next((tmp_path / n / "adamp").iterdir()))} for n in ("one", "two")
    )
    assert one.keys() == two.keys()
    for arm in one:
        assert two[arm] == pytest.approx(one[arm], rel=1e-3, abs=1e-4)
