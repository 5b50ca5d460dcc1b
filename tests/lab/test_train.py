import math
import os
import runpy
import subprocess
import sys

import pytest
import torch
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.lab.progress import seed_everything
from weightsmith.lab.task import forward
from weightsmith.lab.tasks import TaskConfig, make_task
from weightsmith.lab.train import Hook, evaluate, fit

STEPS = 3  # per epoch: 160 train rows in batches of 50


@pytest.fixture(scope="module")
def task():
    return make_task(TaskConfig(train_examples=200, test_examples=100, model="mlp"))


def small(task, *, lr=0.1, seed=0):
    torch.manual_seed(seed)
    model = task.build()
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def trained(task, *, lr=0.1, **options):
    model, optimizer = small(task, lr=lr)
    length = {} if {"steps", "epochs"} & options.keys() else {"epochs": 2}
    return fit(model, optimizer, task, **{"batch_size": 50, "seed": 0, **length, **options})


def learning_rates(task, **options):
    model, optimizer = small(task, lr=2.0)
    seen = []
    hook = Hook(before_step=lambda: seen.append(optimizer.param_groups[0]["lr"]))
    fit(model, optimizer, task, batch_size=50, seed=0, hooks=[hook], **options)
    assert optimizer.param_groups[0]["lr"] == 2.0  # ready for another run
    return seen


def same_weights(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_a_convnet_learns_the_digits_in_a_few_epochs():
    digits = make_task(TaskConfig())
    torch.manual_seed(0)
    model = digits.build()
    fitted = fit(
        model, torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9), digits, epochs=4, batch_size=64, seed=0
    )
    assert fitted.model is model
    assert (fitted.diverged, fitted.steps) == (False, 4 * (1150 // 64))
    assert digits.evaluate(model, "test").metrics["accuracy"] > 0.9


@pytest.mark.parametrize("augment", [False, True])
def test_the_same_seed_gives_the_same_weights_to_the_last_bit(augment):
    digits = make_task(TaskConfig(train_examples=200, augment=augment))
    first, second, other = (trained(digits, seed=seed).model for seed in (3, 3, 4))
    assert same_weights(first, second)
    assert not same_weights(first, other)


def test_batches_follow_from_the_seed_alone(task):
    seen = []

    def loss(model, batch, draws):
        torch.rand(draws)
        seen[-1] += batch.indices.tolist()
        return task.losses(model, batch)

    for draws in (1, 7):
        seen.append([])
        trained(task, loss=lambda model, batch, draws=draws: loss(model, batch, draws))
    assert seen[0] == seen[1]
    assert sorted(seen[0][:150]) != seen[0][:150]
    assert len(set(seen[0][:150])) == 150


def test_each_epoch_is_recorded(task):
    kept = []
    fitted = trained(task, record=kept.append)
    assert [row["step"] for row in kept] == [3, 6]
    assert [row["epoch"] for row in kept] == [1.0, 2.0]
    assert kept == list(fitted.rows)
    assert {"lr", "train_loss", "validation_loss", "validation_accuracy"} <= kept[0].keys()


def test_rows_come_where_they_are_asked_for(task):
    assert [row["step"] for row in trained(task, steps=7, rows_at=3).rows] == [3, 6, 7]
    assert [row["step"] for row in trained(task, steps=7, rows_at=[2, 5]).rows] == [2, 5, 7]
    late = trained(task, validate="last").rows
    assert ["validation_loss" in row for row in late] == [False, True]
    assert not any("validation_loss" in row for row in trained(task, validate="never").rows)


def test_the_training_loss_is_the_mean_since_the_row_before(task):
    losses = []

    def loss(model, batch):
        found = task.losses(model, batch)
        losses.append(found.mean().item())
        return found

    rows = trained(task, loss=loss).rows
    assert rows[0]["train_loss"] == pytest.approx(sum(losses[:3]) / 3, rel=1e-6)
    assert rows[1]["train_loss"] == pytest.approx(sum(losses[3:]) / 3, rel=1e-6)


def test_a_loss_of_ones_own_may_be_a_mean_or_one_per_example(task):
    mean = trained(task, loss=lambda model, batch: task.losses(model, batch).mean())
    each = trained(task, loss=lambda model, batch: task.losses(model, batch))
    plain = trained(task)
    assert same_weights(each.model, plain.model)
    torch.testing.assert_close(mean.model.state_dict(), plain.model.state_dict(), rtol=1e-5, atol=1e-6)
    doubled = trained(task, loss=lambda model, batch: 2 * task.losses(model, batch), lr=0.05)
    torch.testing.assert_close(doubled.model.state_dict(), plain.model.state_dict(), rtol=1e-3, atol=1e-4)


def test_a_batch_larger_than_the_data_is_all_of_it(task):
    assert trained(task, batch_size=10_000).steps == 2


def test_cosine_falls_to_zero_per_step(task):
    expected = [2 * 0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert learning_rates(task, epochs=2) == pytest.approx(expected)


def test_warmup_rises_linearly_before_the_schedule(task):
    found = learning_rates(task, epochs=2, warmup=1, schedule="constant")
    assert found == pytest.approx([0.5, 1.0, 1.5, 2.0, 2.0, 2.0])
    assert learning_rates(task, steps=4, warmup=1, schedule="constant") == pytest.approx([1.0, 2.0, 2.0, 2.0])


def test_steps_fall_at_their_milestones(task):
    found = learning_rates(task, epochs=3, schedule="step", milestones=(1, 2), gamma=0.5)
    assert found == pytest.approx([2.0] * 3 + [1.0] * 3 + [0.5] * 3)


def test_hooks_see_clipped_gradients_and_may_change_them(task):
    model, optimizer = small(task)
    norms = []

    def look():
        norms.append(torch.stack([p.grad.norm() for p in model.parameters()]).norm().item())
        for parameter in model.parameters():
            parameter.grad.zero_()

    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    fit(model, optimizer, task, epochs=1, batch_size=50, seed=0, clip_norm=0.1, hooks=[Hook(before_step=look)])
    assert norms == pytest.approx([0.1] * STEPS, rel=1e-3)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_the_gradient_of_a_penalty_is_added_after_clipping(task):
    model, optimizer = small(task)
    first, added = next(iter(model.parameters())), []
    without = []
    look = Hook(before_step=lambda: without.append(first.grad.clone()))
    penalty = Hook(penalty=lambda: 3 * first.sum(), before_step=lambda: added.append(first.grad - without[-1]))
    fit(model, optimizer, task, epochs=1, batch_size=50, seed=0, clip_norm=0.1, hooks=[look, penalty])
    assert len(added) == STEPS
    torch.testing.assert_close(added[0], torch.full_like(first, 3.0), rtol=1e-5, atol=1e-5)


def test_divergence_is_a_result_and_no_error(task):
    fitted = trained(task, lr=1e30)
    assert fitted.diverged
    assert fitted.rows[-1]["diverged"] == 1.0
    assert fitted.steps < 6


def test_a_last_step_that_leaves_weights_no_layer_can_use_is_a_divergence(task):
    fitted = trained(task, lr=1e30, steps=1, validate="never")
    assert all(parameter.isfinite().all() for parameter in fitted.model.parameters())
    assert fitted.diverged


def test_the_precision_may_change_between_runs_and_leaves_no_trace(task):
    plain = trained(task).model
    half = trained(task, mixed_precision="bf16").model
    assert not same_weights(plain, half)
    assert same_weights(trained(task).model, plain)
    assert all(parameter.dtype == torch.float32 for parameter in half.parameters())


def test_evaluation_scores_every_example_whatever_the_batch(task):
    model, _ = small(task)
    scores = lambda model, batch: {"loss": task.losses(model, batch)}  # noqa: E731
    one = evaluate(model, task.held_out["test"], scores, batch_size=7)
    other = evaluate(model, task.held_out["test"], scores, batch_size=100)
    torch.testing.assert_close(one.scores["loss"], other.scores["loss"])
    assert one.metrics["loss"] == pytest.approx(one.scores["loss"].mean().item())
    assert len(one.scores["loss"]) == 100


def test_evaluation_puts_every_module_back_into_its_mode(task):
    model, _ = small(task)
    model.train()
    next(iter(model.children())).eval()
    modes = [module.training for module in model.modules()]
    task.evaluate(model, "test")
    assert [module.training for module in model.modules()] == modes


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"epochs": 0}, "epochs must be above 0"),
        ({"steps": -1}, "steps must be above 0"),
        ({"batch_size": 0}, "batch_size must be above 0"),
        ({"epochs": 1, "steps": 1}, "either epochs or steps"),
        ({"schedule": "linear"}, "schedule 'linear' is not known"),
        ({"rows_at": 0}, "rows_at must be at least 1"),
        ({"rows_at": [0, 2]}, "rows_at must be at least 1"),
        ({"warmup": -1}, "warmup must be at least 0"),
        ({"clip_norm": 0.0}, "clip_norm must be above 0"),
        ({"mixed_precision": "fp8"}, "mixed_precision must be one of no, fp16, bf16"),
    ],
)
def test_arguments_out_of_range_are_named(task, options, message):
    with pytest.raises(UsageError, match=message):
        trained(task, **options)


def test_seeding_covers_every_global_generator():
    import random

    import numpy as np

    def draw():
        seed_everything(5)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


def test_a_loss_of_another_shape_is_named(task):
    with pytest.raises(UsageError, match=r"loss must be one number or one per example, \(50,\), got \(50, 1\)"):
        trained(task, loss=lambda model, batch: task.losses(model, batch)[:, None])


def test_a_score_that_is_not_per_example_is_named(task):
    model, _ = small(task)
    with pytest.raises(UsageError, match=r"hits must be one number per example, \(100,\), got \(\)"):
        evaluate(model, task.held_out["test"], lambda model, batch: {"hits": task.losses(model, batch).mean()})


def test_the_environment_does_not_change_the_gradients(task, monkeypatch):
    plain = trained(task).model
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    assert same_weights(trained(task).model, plain)


def test_an_accelerator_of_the_users_own_is_left_as_it_was(task):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state()
    try:
        own = Accelerator(mixed_precision="bf16", gradient_accumulation_steps=3)
        trained(task)
        assert (own.mixed_precision, own.gradient_accumulation_steps) == ("bf16", 3)
    finally:
        AcceleratorState._reset_state()


def test_an_error_within_training_leaves_model_and_optimizer_usable(task):
    model, optimizer = small(task)

    def fail():
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fit(
            model, optimizer, task, epochs=1, batch_size=50, seed=0, warmup=2, mixed_precision="bf16",
            hooks=[Hook(after_step=fail)],
        )  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == 0.1
    assert model(task.example().inputs).dtype == torch.float32


def test_a_model_in_half_precision_is_trained_and_scored(task):
    torch.manual_seed(0)
    model = task.build().to(torch.bfloat16)
    fitted = fit(model, torch.optim.SGD(model.parameters(), lr=0.1), task, epochs=5, batch_size=50, seed=0)
    assert fitted.rows[-1]["train_loss"] < fitted.rows[0]["train_loss"]
    assert next(model.parameters()).dtype == torch.bfloat16


SCRIPT = """
import sys
import torch
from accelerate import PartialState
from weightsmith.lab.tasks import TaskConfig, make_task
from weightsmith.lab.train import fit

task = make_task(TaskConfig(train_examples=200, test_examples=101, model="mlp"))
torch.manual_seed(0)
model, other = task.build(), task.build()
rows = []
for net in (model, other):
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    fit(net, optimizer, task, epochs=2, batch_size=33, seed=0, clip_norm=1.0, record=rows.append)
state, found = PartialState(), task.evaluate(model, "test")
result = state.num_processes, rows, model.state_dict(), dict(found.metrics), found.scores["loss"]
torch.save(result, f"{sys.argv[1]}/{state.process_index}.pt")
"""


@pytest.mark.slow
def test_two_processes_train_as_one_does(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "one")])
    runpy.run_path(str(script))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, script, tmp_path / "two"], env=environment, check=True, timeout=180, capture_output=True)
    (_, rows, weights, test, scores), (processes, *first), (_, *second) = (
        torch.load(tmp_path / file) for file in ("one/0.pt", "two/0.pt", "two/1.pt")
    )
    assert processes == 2
    assert len(first[0]) == len(rows) == 4
    assert second[0] == []  # the main process records
    for ours, theirs in zip(rows, first[0], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)
    for _, state, measured, each in (first, second):
        torch.testing.assert_close(state, weights, rtol=1e-5, atol=1e-6)
        assert measured == pytest.approx(test, rel=1e-4)
        torch.testing.assert_close(each, scores, rtol=1e-3, atol=1e-5)


def test_a_model_may_take_positional_or_keyword_inputs():
    class Two(nn.Module):
        def forward(self, a, b):
            return a - b

    from weightsmith.lab.task import Batch

    a, b = torch.ones(2), torch.zeros(2)
    for inputs in ((a, b), [a, b], {"b": b, "a": a}):
        assert torch.equal(forward(Two(), Batch(inputs, None, torch.arange(2))), a)
