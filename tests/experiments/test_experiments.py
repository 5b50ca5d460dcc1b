"""What holds for every experiment, on several tasks."""

import dataclasses
import importlib
import math

import pytest
import torch

from weightsmith.core.errors import UsageError
from weightsmith.experiments import (
    adamp,
    bone,
    flexround,
    lcia,
    mwa,
    ofq,
    rich_lazy,
    weight_aligning,
    weight_compander,
)
from weightsmith.experiments.lora_checkpoints import merged
from weightsmith.experiments.teaching import taught
from weightsmith.lab import report
from weightsmith.lab.job import Job
from weightsmith.lab.record import JobResult, Recorder, plain_metrics, read_jobs
from weightsmith.lab.run import estimate, run
from weightsmith.lab.tasks import make_task
from weightsmith.techniques import TECHNIQUES

SMALL = {"train_examples": 60, "test_examples": 12}
CONFIGS = {
    "adamp": {"epochs": 1, "sgd_lrs": (0.1, 0.3), "adam_lrs": (0.003, 0.01), **SMALL},
    "weight-compander": {"epochs": 1, **SMALL},
    "ofq": {"epochs": 1, "pretrain_epochs": 1, "anneal_epochs": 1, **SMALL},
    "bone": {"pretrain_epochs": 1, "steps": 4, "early": 2, **SMALL},
    "mwa": {"pretrain_steps": 3, "steps": 6, "save_every": 1, **SMALL},
    "flexround": {"epochs": 1, "iterations": 3, "samples": 16, **SMALL},
    "weight-aligning": {"epochs": 1, "increments": 3, **SMALL},
    "lcia": {"epochs": 2, "batch_size": 8, "fisher": 4, "train_examples": 120, "test_examples": 12},
    "mir-l": {"steps": 4, "warmup": 1, **SMALL},
    "steer": {"steps": 2, "warmup_steps": 3},
    "dynamic-reward-weighting": {"steps": 2, "warmup_steps": 3},
    "meta-rescaling": {"epochs": 2, "batch_size": 8, "trusted": 4, "noises": ("symmetric",), **SMALL},
    "fast-ibp": {"epochs": 1, "kappas": (0.0,), "shares": (0.4,), "alphas": (0.5,), "attack_steps": 1, **SMALL},
    "eagan": {"train_examples": 200, "test_examples": 12, "rounds": 1, "rounds2": 1},
    "rich-lazy": {"steps": 4, "units": 12, "probe": 12, "kernel_probe": 4, "looks": 1, **SMALL},
}
TEXT = {"task": "questions", "length": 48, "train_examples": 16, "test_examples": 4, "batch_size": 4}


def experiment_of(slug):
    card = next(card for card in TECHNIQUES if card.slug == slug)
    return importlib.import_module(card.experiment).EXPERIMENT


def small(slug, **changes):
    experiment = experiment_of(slug)
    return experiment, dataclasses.replace(experiment.preset("smoke"), **(CONFIGS[slug] | changes))


def do(experiment, config, arm, folder, seed=0):
    task_start = None
    if experiment.start is not None:
        task_start = experiment.start(config, seed, folder / f"start-{arm}")
    job = Job(arm, seed, Recorder(), folder / arm, torch.device("cpu"), start=task_start)
    metrics, scores = plain_metrics(experiment.job(config, job))
    return metrics, scores, job


@pytest.mark.parametrize("slug", CONFIGS)
def test_a_run_ends_in_a_report_and_measures_every_metric(tmp_path, slug):
    experiment, config = small(slug)
    done = run(experiment, config, preset="smoke", seeds=1, out=tmp_path, workers=1)
    assert not done.failures
    jobs = [job for job in read_jobs(done.folder) if isinstance(job, JobResult)]
    assert {job.arm for job in jobs} == {arm.name for arm in experiment.arms(config)}
    measured = {name for job in jobs for name in job.metrics}
    assert measured == {metric.name for metric in experiment.metrics(config)}
    page = report.write(done.folder)
    assert experiment.title in page.read_text()


@pytest.mark.parametrize(
    "slug",
    [
        "bone",
        "flexround",
        *(pytest.param(slug, marks=pytest.mark.slow) for slug in ("adamp", "mwa", "weight-compander")),
    ],
)
def test_every_experiment_runs_on_questions_too(tmp_path, slug):
    experiment, config = small(slug, **TEXT)
    arms = [arm.name for arm in experiment.arms(config)][-2:]
    done = run(experiment, config, preset="smoke", seeds=1, arms=arms, out=tmp_path, workers=1)
    assert [failure.error for failure in done.failures] == []


def test_ofq_runs_on_sentences_too(tmp_path):
    lines = "".join(f"text number {row},{row % 2}\n" for row in range(40))
    (tmp_path / "s.csv").write_text("text,label\n" + lines)
    experiment, config = small("ofq", task="sentences", data=str(tmp_path / "s.csv"), length=16)
    done = run(experiment, config, seeds=1, arms=["fp", "statsq-qkr-cga"], out=tmp_path / "runs", workers=1)
    assert [failure.error for failure in done.failures] == []


@pytest.mark.parametrize(
    ("slug", "arm"),
    [
        ("adamp", "adamp"),
        ("weight-compander", "wc"),
        ("ofq", "lsq-dampening"),
        ("mwa", "loss"),
        ("flexround", "flexround"),
        ("weight-aligning", "bic"),
        ("lcia", "lcia"),
        ("mir-l", "imp"),
        ("meta-rescaling", "rescaling"),
        ("rich-lazy", "r1-spectral"),
        ("steer", "clip-cov"),
        ("dynamic-reward-weighting", "gradient"),
        ("eagan", "evolved"),
    ],
)
def test_a_job_is_a_pure_function_of_config_arm_and_seed(tmp_path, slug, arm):
    experiment, config = small(slug)
    first, scores, _ = do(experiment, config, arm, tmp_path / "one")
    second, again, _ = do(experiment, config, arm, tmp_path / "two")
    timed = {name for name in first if name.startswith("seconds")}
    assert {k: v for k, v in first.items() if k not in timed} == {k: v for k, v in second.items() if k not in timed}
    assert all(torch.equal(scores[name], again[name]) for name in scores)


@pytest.mark.parametrize("slug", CONFIGS)
def test_a_job_that_resumes_gives_the_same_numbers(tmp_path, slug):
    experiment, config = small(slug)
    arm = [arm.name for arm in experiment.arms(config)][-1]
    first, _, one = do(experiment, config, arm, tmp_path)
    second, _, two = do(experiment, config, arm, tmp_path)  # the checkpoints of the first are still there
    timed = ("seconds", "step_ms", "setup_ms")
    assert {k: v for k, v in first.items() if not k.startswith(timed)} == pytest.approx(
        {k: v for k, v in second.items() if not k.startswith(timed)}, nan_ok=True
    )
    assert len(one.record.rows) == len(two.record.rows)


@pytest.mark.parametrize("arm", ["sgdp", "adamp"])
def test_the_share_of_projected_tensors_is_that_of_training_after_a_kill_too(tmp_path, arm):
    experiment, config = small("adamp", delta=100.0)  # so that all tensors are projected
    for _ in range(2):  # the second reads back what the first has trained
        assert do(experiment, config, arm, tmp_path)[0]["projected"] > 50


@pytest.mark.parametrize("slug", CONFIGS)
def test_the_paper_preset_and_all_claims_are_consistent(slug):
    experiment = experiment_of(slug)
    for name in experiment.presets:
        config = experiment.preset(name)
        try:
            experiment.check(config)
        except UsageError as error:  # published data are not bundled, and models are on the hub
            assert ("--data" if name == "paper" else "hub") in str(error)  # noqa: PT017
        described = experiment.describe(config)
        assert 1 <= sum(claim["primary"] for claim in described["claims"]) <= 2
        assert all(claim["worth"] for claim in described["claims"] if claim["primary"]) or slug == "ofq"
        assert len({claim["text"] for claim in described["claims"]}) == len(described["claims"])


@pytest.mark.parametrize("slug", CONFIGS)
def test_no_experiment_holds_a_training_loop_or_a_switch_over_tasks(slug):
    from pathlib import Path

    source = Path(importlib.import_module(experiment_of(slug).job.__module__).__file__).read_text()
    assert "task ==" not in source
    assert ".backward()" not in source


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"increments": 11}, "increments must be at most the 10 classes"),
        ({"memory": 9}, "memory must be at least the 10 classes"),
        ({"head": "fc"}, "head 'fc' is not known"),
    ],
)
def test_classes_that_cannot_arrive_in_steps_are_refused(changes, message):
    experiment, config = small("weight-aligning", **changes)
    with pytest.raises(UsageError, match=message):
        experiment.task(config)


def test_every_arm_gets_the_same_number_of_trials(tmp_path):
    experiment, config = small("adamp", adam_lrs=(0.003, 0.01), sgd_lrs=(0.1, 0.3), more_lrs=1)
    for arm in ("sgd", "adamp", "muon"):
        _, _, job = do(experiment, config, arm, tmp_path)
        trials = [row for row in job.record.rows if row.get("phase") == "sweep"]
        assert [row["trial"] for row in trials] == [1, 2, 3]
        assert len({row["rate"] for row in trials}) == 3


def test_a_job_whose_every_trial_diverged_says_so(tmp_path):
    experiment, config = small("adamp", sgd_lrs=(1e30,), epochs=3)
    metrics, _, job = do(experiment, config, "sgd", tmp_path)
    assert job.diverged
    assert math.isnan(metrics["score"])


def test_momentum_inflates_the_norm_in_the_plane_and_projection_does_not(tmp_path):
    experiment, config = small("adamp")
    plain, projected = (do(experiment, config, arm, tmp_path)[0] for arm in ("sgd", "sgdp"))
    assert plain["plane_norm"] > 3
    assert projected["plane_norm"] < 1.5


def test_a_new_adapter_leaves_the_network_as_it_was():
    _, config = small("bone")
    task = bone.changed(make_task(config))
    model = config.network(task, 0)
    batch = task.example()
    before = task.losses(model, batch)
    for arm in ("lora", "pissa", "miss", "col", "row", "full"):
        adapted = bone._adapted(config, arm, config.network(task, 0))
        torch.testing.assert_close(task.losses(adapted, batch), before, rtol=1e-4, atol=1e-5)


def test_merging_leaves_the_model_as_it_was(tmp_path):
    experiment, config = small("mwa")
    start = experiment.start(config, 0, tmp_path)
    model = config.network(make_task(config), 0)
    model.load_state_dict(start["weights"])
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    states = start["constant"]["states"][-2:]
    with merged(model, states, [0.5, 0.5], "exact", rank=config.rank, alpha=config.alpha):
        assert any(not torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_taught_student_has_the_gradients_of_the_distillation_loss():
    from weightsmith.quantize.in_training.distillation import distillation_loss

    _, config = small("ofq")
    task = make_task(config)
    student, teacher = config.network(task, 0), config.network(task, 1)
    batch = task.example()
    expected = torch.autograd.grad(
        distillation_loss(student(batch.inputs), teacher(batch.inputs), batch.targets), student.head.weight
    )[0]
    with taught(student, teacher, task) as loss:
        found = torch.autograd.grad(loss(student, batch), student.head.weight)[0]
    torch.testing.assert_close(found, expected)
    assert not student._forward_hooks


@pytest.mark.parametrize(
    ("module", "changes", "message"),
    [
        (adamp, {"adam_lrs": ()}, "adam_lrs must hold learning rates above 0"),
        (weight_compander, {"scales": (0.5, 1.0)}, "scales must start with 1"),
        (ofq, {"mixed_precision": "fp16"}, "mixed_precision must be"),
        (ofq, {"anneal_epochs": 0}, "anneal_epochs must be above 0"),
        (bone, {"early": 0}, "early must be between 1 and steps"),
        (mwa, {"last": 99}, "last at most steps / save_every"),
        (flexround, {"bits": (7,)}, "bits must be some of"),
        (flexround, {"flexround_lrs": (0.1, 0.2)}, "the same number of"),
        (adamp, {"epochs": 0}, "epochs must be above 0"),
        (weight_aligning, {"increments": 0}, "increments must be above 0"),
        (rich_lazy, {"lr": 0.0}, "lr must be above 0"),
        (weight_aligning, {"task": "language"}, "task must be a classification"),
        (lcia, {"sets": ("sums", "sums")}, "must name at least two tasks, each once"),
        (lcia, {"kinds": ("0", "0")}, "must name at least two tasks, each once"),
        (lcia, {"kappa": 0.0}, "kappa must be above 0"),
    ],
)
def test_what_cannot_run_is_refused_before_any_job(module, changes, message):
    config = dataclasses.replace(module.EXPERIMENT.preset("smoke"), **changes)
    with pytest.raises(UsageError, match=message):
        module.EXPERIMENT.check(config)


def test_the_cost_of_certified_training_is_told_for_fewer_rows_than_a_batch_too():
    experiment, config = small("fast-ibp")
    few = dataclasses.replace(config, train_examples=20, batch_size=64)
    assert estimate(experiment, few, seeds=1, workers=1).seconds[1] > 0


def test_the_cost_of_quantized_training_counts_the_shared_start_once_and_times_the_quantized_step():
    experiment, config = small("ofq", pretrain_epochs=7)
    arms = [arm.name for arm in experiment.arms(config)]
    each = [experiment.steps(config, arm) for arm in arms]
    assert each[0] - each[2] == 7 * config.total_steps(make_task(config))
    assert each[arms.index("ptq")] == 0
    assert experiment.step_seconds(config) > 0
