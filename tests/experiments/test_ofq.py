import dataclasses
import io

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightsmith.core.errors import UsageError
from weightsmith.experiments.ofq import EXPERIMENT, Taught, check, job
from weightsmith.lab import report
from weightsmith.lab.record import Recorder, read_jobs
from weightsmith.lab.run import run
from weightsmith.quantize.distillation import distillation_loss

TINY = dataclasses.replace(EXPERIMENT.presets["smoke"], train_examples=100, pretrain_epochs=1)
ARMS = [arm.name for arm in EXPERIMENT.arms(TINY)]


@pytest.mark.parametrize("arm", ARMS)
def test_every_arm_returns_every_metric(arm):
    record = Recorder()
    metrics = job(TINY, arm, 0, record)
    assert set(metrics) == {metric.name for metric in EXPERIMENT.metrics}
    assert 0 <= metrics["accuracy"] <= 100
    if arm not in ("fp", "ptq"):
        assert all(value == value for value in metrics.values())
        for chart in EXPERIMENT.charts:
            assert any({chart.x, chart.y} <= row.keys() and row["phase"] == chart.phase for row in record.rows)


def test_a_job_is_a_pure_function_of_config_arm_and_seed():
    first, second = Recorder(), Recorder()
    assert job(TINY, "statsq-qkr-cga", 0, first) == job(TINY, "statsq-qkr-cga", 0, second)
    assert first.rows == second.rows


def test_all_arms_start_from_the_same_network():
    starts = {job(TINY, arm, 1, Recorder())["start_accuracy"] for arm in ("fp", "lsq", "statsq-qkr")}
    assert len(starts) == 1


def test_a_taught_student_has_the_gradients_of_the_distillation_loss():
    student, teacher = nn.Linear(4, 3), nn.Linear(4, 3)
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    taught = Taught(student, teacher)
    F.cross_entropy(taught.train()(x), y).backward()
    found = student.weight.grad.clone()
    student.zero_grad()
    distillation_loss(student(x), teacher(x), y).backward()
    assert torch.allclose(found, student.weight.grad)
    assert torch.equal(taught.eval()(x), student(x))
    assert not any("teacher" in name for name in taught.state_dict())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mixed_precision": "fp16"}, "mixed_precision must be"),
        ({"epochs": 0}, "must be at least 1"),
        ({"model": "vit_tyni"}, "did you mean .vit_tiny"),
    ],
)
def test_what_cannot_run_is_refused_at_once(change, message):
    with pytest.raises(UsageError, match=message):
        check(dataclasses.replace(TINY, **change))


@pytest.mark.slow
def test_the_paper_preset_is_real_code(tmp_path, monkeypatch):
    datasets, image = pytest.importorskip("datasets"), pytest.importorskip("PIL.Image")
    transformers = pytest.importorskip("transformers")
    rng = np.random.default_rng(0)

    def picture():
        buffer = io.BytesIO()
        image.fromarray(rng.integers(0, 255, (32, 32, 3), dtype=np.uint8)).save(buffer, "PNG")
        return {"bytes": buffer.getvalue(), "path": None}

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["cat", "dog", "owl"])})
    for split, rows in (("train", 24), ("test", 12)):
        table = {"image": [picture() for _ in range(rows)], "label": [i % 3 for i in range(rows)]}
        (tmp_path / "imagenet").mkdir(exist_ok=True)
        datasets.Dataset.from_dict(table, features=features).to_parquet(tmp_path / "imagenet" / f"{split}.parquet")
    monkeypatch.setenv("WEIGHTSMITH_DATA", str(tmp_path))
    monkeypatch.setenv("WEIGHTSMITH_CACHE", str(tmp_path / "cache"))
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}
    config = transformers.DeiTConfig(**shape, image_size=32, patch_size=8, num_labels=3)
    transformers.DeiTForImageClassificationWithTeacher(config).save_pretrained(tmp_path / "deit")

    shorter = {"model": str(tmp_path / "deit"), "epochs": 2, "anneal_epochs": 1, "batch_size": 8, "warmup_epochs": 1}
    paper = dataclasses.replace(EXPERIMENT.presets["paper"], **shorter)
    done = run(
        EXPERIMENT, paper, preset="paper", seeds=1, out=tmp_path / "runs", workers=1
    )  # workers that live on would look for an earlier test's data
    assert not done.failures, done.failures
    assert len(list(read_jobs(done.folder))) == len(ARMS)
    assert "inconclusive" in report.to_markdown(report.load(done.folder))
