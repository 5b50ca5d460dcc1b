"""Wrong labels made on purpose, and the arms that differ from the others in what they train on."""

import dataclasses

import pytest
import torch

from weightsmith.core.errors import UsageError
from weightsmith.experiments.label_noise import auc, corrupt, labels_of, redrawn
from weightsmith.experiments.meta_rescaling import EXPERIMENT
from weightsmith.experiments.noisy_training import add_dropout_
from weightsmith.lab import progress
from weightsmith.lab.job import Job
from weightsmith.lab.record import JobResult, Recorder, read_jobs
from weightsmith.lab.run import run
from weightsmith.lab.tasks import shared_task
from weightsmith.lab.train import fit
from weightsmith.reweight import MetaRescaler

SMALL = {"train_examples": 160, "test_examples": 40, "epochs": 2, "batch_size": 16, "trusted": 8}


def config(**changes):
    return dataclasses.replace(EXPERIMENT.preset("smoke"), **(SMALL | changes))


def test_noise_has_its_rate_and_its_form():
    labels = torch.arange(4000) % 4
    generator = torch.Generator().manual_seed(0)
    symmetric = corrupt(labels, "symmetric", 0.4, generator)
    wrong = symmetric != labels
    assert wrong.float().mean().item() == pytest.approx(0.4, abs=0.03)
    assert torch.bincount((symmetric - labels)[wrong] % 4).tolist()[1:] == pytest.approx([533] * 3, rel=0.15)
    pair = corrupt(labels, "pair", 0.2, generator)
    assert set(((pair - labels) % 4).tolist()) == {0, 1}
    assert torch.equal(corrupt(labels, "none", 0.4, generator), labels)


def test_instance_noise_takes_the_hardest_for_what_they_look_like():
    p = torch.tensor([[0.9, 0.1, 0.0], [0.5, 0.1, 0.4], [0.2, 0.7, 0.1], [0.0, 0.3, 0.7]])
    found = corrupt(torch.tensor([0, 0, 0, 2]), "instance", 0.5, torch.Generator(), p)
    assert found.tolist() == [0, 2, 1, 2]


def test_auc_counts_pairs_with_ties_as_half():
    right = torch.tensor([True, True, False, False])
    assert auc(torch.tensor([0.9, 0.5, 0.5, 0.1]), right) == pytest.approx(3.5 / 4)
    assert auc(torch.tensor([0.9, float("nan"), 0.5, 0.1]), right) == 1
    assert torch.tensor(auc(torch.ones(2), torch.tensor([True, True]))).isnan()


def test_dropout_is_added_behind_the_first_layer_and_ends_with_training():
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(4, 64), torch.nn.Linear(64, 3))
    x = torch.randn(2, 4)
    plain = model(x)
    add_dropout_(model, 0.5)
    assert not torch.equal(model(x), plain)
    assert torch.equal(model.eval()(x), plain)
    has_some = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Dropout(0.1))
    assert not add_dropout_(has_some, 0.5)[0]._forward_pre_hooks


def test_every_arm_sees_the_same_wrong_labels_and_the_test_rows_stay_clean(tmp_path):
    settings = config(noises=("pair", "instance", "none"))
    first, again = (EXPERIMENT.start(settings, 1, tmp_path / name) for name in ("a", "b"))
    clean = labels_of(shared_task(settings))
    for noise in settings.noises:
        assert torch.equal(first[noise], again[noise])
        share = 0.0 if noise == "none" else settings.pattern_rate
        assert (first[noise] != clean).float().mean().item() == pytest.approx(share, abs=0.08)


def test_pruning_with_cleanlab_runs(tmp_path):
    pytest.importorskip("cleanlab")
    settings = config(noises=("symmetric",), cleanlab=True, epochs=4)
    start = EXPERIMENT.start(settings, 0, tmp_path / "start")
    job = Job("cleanlab", 0, Recorder(), tmp_path / "job", torch.device("cpu"), start=start)
    found = EXPERIMENT.job(settings, job)
    assert found["auc_symmetric"] > 0.5
    assert not job.diverged


def test_it_runs_on_sentences_with_every_arm(tmp_path):
    words = ["red round apple", "blue deep sea", "green tall tree"]
    lines = "".join(f"{words[row % 3]} {row},{row % 3}\n" for row in range(90))
    (tmp_path / "s.csv").write_text("text,label\n" + lines)
    settings = config(task="sentences", data=str(tmp_path / "s.csv"), length=16, noises=("symmetric", "instance"))
    done = run(EXPERIMENT, settings, seeds=1, out=tmp_path / "runs", workers=1)
    assert [failure.error for failure in done.failures] == []
    jobs = [job for job in read_jobs(done.folder) if isinstance(job, JobResult)]
    assert {job.arm for job in jobs} == {arm.name for arm in EXPERIMENT.arms(settings)}


def test_redrawn_labels_are_uniform_and_some_stay_right():
    labels = torch.arange(10).repeat(2000)
    found = redrawn(labels, 0.5, torch.Generator().manual_seed(0))
    changed = found != labels
    assert changed.float().mean() == pytest.approx(0.45, abs=0.01)  # a tenth of those drawn anew stay as they were
    assert torch.allclose(found[changed].bincount() / changed.sum(), torch.full((10,), 0.1), atol=0.01)
    assert torch.equal(found, redrawn(labels, 0.5, torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"noises": ()}, "noises must be different ones of"),
        ({"noises": ("none", "pair")}, "the first not none"),
        ({"noises": ("pair", "paired")}, "noises must be"),
        ({"rate": 1.0}, "rate must be between 0 and 1"),
        ({"dropout": -0.1}, "dropout must be between 0 and 1"),
        ({"trusted": 1}, "trusted at least 2"),
        ({"validation_fraction": 0.0}, "validation_fraction must be above 0"),
        ({"task": "questions"}, "images or sentences"),
    ],
)
def test_bad_settings_are_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        EXPERIMENT.check(config(**changes))


def test_half_precision_trains(tmp_path):
    settings = config(noises=("symmetric",), mixed_precision="bf16")
    start = EXPERIMENT.start(settings, 0, tmp_path / "start")
    job = Job("rescaling", 0, Recorder(), tmp_path / "job", torch.device("cpu"), start=start)
    assert 0 < EXPERIMENT.job(settings, job)["auc_symmetric"] < 1
    assert not job.diverged


@pytest.mark.parametrize("arm", ["rescaling", "mwn"])
def test_a_killed_job_goes_on_to_the_same_numbers(tmp_path, monkeypatch, arm):
    settings = config(noises=("symmetric",))
    start = EXPERIMENT.start(settings, 0, tmp_path / "start")

    def do(folder):
        return EXPERIMENT.job(settings, Job(arm, 0, Recorder(), tmp_path / folder, torch.device("cpu"), start=start))

    whole = do("whole")
    monkeypatch.setitem(fit.__wrapped__.__kwdefaults__, "checkpoint_seconds", 0.0)
    monkeypatch.setattr(progress, "_SHARE", 0)
    update, calls = MetaRescaler.update, []

    def killed(self, *args, **options):
        calls.append(1)
        if len(calls) == 11:
            raise KeyboardInterrupt
        return update(self, *args, **options)

    monkeypatch.setattr(MetaRescaler, "update", killed)
    with pytest.raises(KeyboardInterrupt):
        do("cut")
    resumed = do("cut")
    assert len(calls) < 11 + settings.total_steps(shared_task(settings))  # it did not start over
    for name, value in whole.items():
        torch.testing.assert_close(torch.as_tensor(value), torch.as_tensor(resumed[name]), rtol=0, atol=0)
