import os
import runpy
import subprocess
import sys

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from weightsmith.core.errors import UsageError
from weightsmith.lab.data import load_images
from weightsmith.lab.models import build_model
from weightsmith.lab.train import evaluate, fit, seed_everything

STEPS = 3  # per epoch: 160 train rows in batches of 50


@pytest.fixture(scope="module")
def digits():
    return load_images("digits", train_examples=200, test_examples=100)


def small(name="mlp", *, lr=0.1, seed=0):
    torch.manual_seed(seed)
    model = build_model(name, channels=1, size=8, classes=10)
    return model, torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)


def rows(data, *, model=None, **options):
    kept = []
    model, optimizer = model or small()
    fit(model, optimizer, data, **{"epochs": 2, "batch_size": 50, "seed": 0, **options}, record=kept.append)
    return kept


def learning_rates(data, **options):
    model, optimizer = small(lr=2.0)
    seen = []
    fit(
        model, optimizer, data, batch_size=50, seed=0,
        before_step=lambda: seen.append(optimizer.param_groups[0]["lr"]), **options,
    )  # fmt: skip
    assert optimizer.param_groups[0]["lr"] == 2.0  # ready for another run
    return seen


def same_weights(first, second):
    return all(
        torch.equal(a, b) for a, b in zip(first.state_dict().values(), second.state_dict().values(), strict=True)
    )


def test_a_convnet_learns_the_digits_in_a_few_epochs():
    digits = load_images("digits")
    model, optimizer = small("convnet")
    fitted = fit(model, optimizer, digits, epochs=4, batch_size=64, seed=0)
    assert fitted.model is model
    assert (fitted.diverged, fitted.steps) == (False, 4 * (1150 // 64))
    assert evaluate(model, digits.test)["accuracy"] > 0.9


@pytest.mark.parametrize("augment", [False, True])
def test_the_same_seed_gives_the_same_weights_to_the_last_bit(augment):
    data = load_images("digits", train_examples=200, augment=augment)
    first, second, other = (
        fit(*small("convnet"), data, epochs=2, batch_size=50, seed=seed).model for seed in (0, 0, 1)
    )
    assert same_weights(first, second)
    assert not same_weights(first, other)


def test_batches_are_the_same_for_arms_that_draw_other_random_numbers():
    class Watcher(nn.Module):
        def __init__(self, noise):
            super().__init__()
            self.linear, self.noise, self.seen = nn.Linear(64, 10), noise, []

        def forward(self, x):
            self.seen.append(x.clone())
            return self.linear(x.flatten(1)) + self.noise * torch.rand(1)

    data = load_images("digits", train_examples=200, augment=True, validation_fraction=0)
    plain, noisy = Watcher(0), Watcher(1)
    for model in (plain, noisy):
        fit(model, torch.optim.SGD(model.parameters(), lr=0.1), data, epochs=2, batch_size=50, seed=3)
    assert len(plain.seen) == 8
    assert all(torch.equal(a, b) for a, b in zip(plain.seen, noisy.seen, strict=True))


def test_each_epoch_is_recorded(digits):
    first, second = rows(digits, after_epoch=lambda model: {"norm": model[1].weight.norm().item()})
    assert list(first) == [
        "epoch", "step", "lr", "train_loss", "train_accuracy", "validation_loss", "validation_accuracy", "norm",
    ]  # fmt: skip
    assert (first["epoch"], first["step"], second["epoch"], second["step"]) == (1, STEPS, 2, 2 * STEPS)
    assert second["train_loss"] < first["train_loss"]


def test_the_training_figures_are_means_over_the_epoch(digits):
    model, _ = small()
    frozen = torch.optim.SGD(model.parameters(), lr=0.0)
    everything = evaluate(model, digits.train)
    (row,) = rows(digits, model=(model, frozen), epochs=1, batch_size=160)
    assert row["train_loss"] == pytest.approx(everything["loss"], rel=1e-5)
    assert row["train_accuracy"] == pytest.approx(everything["accuracy"])


def test_evaluation_can_wait_for_the_last_epoch(digits):
    first, second = rows(digits, evaluate_each_epoch=False)
    assert "validation_loss" not in first
    assert "validation_loss" in second


def test_nothing_is_validated_where_nothing_is_held_out():
    (row,) = rows(load_images("digits", train_examples=100, validation_fraction=0), epochs=1)
    assert "validation_loss" not in row


def test_a_batch_larger_than_the_data_is_all_of_it(digits):
    assert rows(digits, epochs=1, batch_size=1000)[0]["step"] == 1


def test_cosine_falls_to_nought_per_step(digits):
    seen = learning_rates(digits, epochs=2)
    assert seen == pytest.approx([1 + torch.tensor(torch.pi * step / 6).cos().item() for step in range(6)])


def test_warmup_rises_linearly_before_the_schedule(digits):
    assert learning_rates(digits, epochs=2, schedule="constant", warmup_epochs=1) == pytest.approx(
        [0.5, 1, 1.5, 2, 2, 2]
    )
    assert learning_rates(digits, epochs=2, warmup_epochs=1) == pytest.approx([0.5, 1, 1.5, 2, 1.5, 0.5])


def test_steps_fall_at_their_milestones(digits):
    seen = learning_rates(digits, epochs=3, schedule="step", milestones=[1, 2], gamma=0.5)
    assert seen == pytest.approx([2.0] * 3 + [1.0] * 3 + [0.5] * 3)


def test_before_step_sees_clipped_gradients_and_may_change_them(digits):
    model, optimizer = small()
    before = [parameter.detach().clone() for parameter in model.parameters()]
    norms = []

    def silence():
        norms.append(torch.stack([parameter.grad.norm() for parameter in model.parameters()]).norm().item())
        optimizer.zero_grad()

    fit(model, optimizer, digits, epochs=1, batch_size=50, seed=0, clip_norm=0.01, before_step=silence)
    assert norms == pytest.approx([0.01] * STEPS, rel=1e-3)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters(), strict=True))


def test_label_smoothing_raises_the_training_loss_only(digits):
    def row(label_smoothing):
        model, _ = small()
        frozen = torch.optim.SGD(model.parameters(), lr=0.0)
        return rows(digits, model=(model, frozen), epochs=1, label_smoothing=label_smoothing)[0]

    plain, smoothed = row(0.0), row(0.5)
    assert plain["train_loss"] != smoothed["train_loss"]
    assert plain["validation_loss"] == smoothed["validation_loss"]


def test_divergence_is_a_result_and_no_error(digits):
    model, optimizer = small(lr=1e30)
    kept = []
    fitted = fit(model, optimizer, digits, epochs=5, batch_size=50, seed=0, record=kept.append, schedule="constant")
    assert fitted.diverged
    assert fitted.steps < 5 * STEPS
    assert kept[-1]["diverged"] == 1
    assert "train_loss" not in kept[-1]


def test_the_precision_may_change_between_runs_and_leaves_no_trace(digits):
    class Spy(nn.Linear):
        dtypes = ()

        def forward(self, x):
            out = super().forward(x.flatten(1))
            Spy.dtypes += (out.dtype,)
            return out

    for precision, dtype in (("bf16", torch.bfloat16), ("no", torch.float32), ("bf16", torch.bfloat16)):
        model = Spy(64, 10)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        fit(model, optimizer, digits, epochs=1, batch_size=50, seed=0, mixed_precision=precision)
        assert Spy.dtypes[-1] is dtype
        model(torch.zeros(1, 64))
        assert Spy.dtypes[-1] is torch.float32


def test_evaluation_is_the_mean_over_all_examples_whatever_the_batch(digits):
    model, _ = small()
    x, y = digits.test.__getitems__(range(100))
    with torch.no_grad():
        loss, accuracy = F.cross_entropy(model(x), y).item(), (model(x).argmax(1) == y).float().mean().item()
    for batch_size in (7, 512):
        assert evaluate(model, digits.test, batch_size) == pytest.approx({"loss": loss, "accuracy": accuracy})


def test_evaluation_puts_every_module_back_into_its_mode(digits):
    model, _ = small("convnet")
    model[0].eval()
    modes = [module.training for module in model.modules()]
    before = {key: value.clone() for key, value in model.state_dict().items()}
    evaluate(model, digits.test)
    assert [module.training for module in model.modules()] == modes
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def test_evaluation_of_nothing_is_an_error():
    with pytest.raises(UsageError, match="split must not be empty"):
        evaluate(small()[0], load_images("digits", validation_fraction=0).validation)


def test_training_does_not_leave_global_switches_behind(digits):
    before = torch.backends.cudnn.deterministic, torch.are_deterministic_algorithms_enabled()
    rows(digits, epochs=1)
    assert (torch.backends.cudnn.deterministic, torch.are_deterministic_algorithms_enabled()) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"schedule": "cosin"}, r"schedule 'cosin' is not known: did you mean 'cosine'"),
        ({"epochs": 0}, "epochs must be at least 1, got 0"),
        ({"batch_size": 0}, "batch_size must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range_are_named(digits, options, message):
    with pytest.raises(UsageError, match=message):
        rows(digits, **options)


def test_seeding_covers_every_global_generator():
    import random

    import numpy as np

    def draw():
        seed_everything(2**40)
        return random.random(), np.random.rand(), torch.rand(1).item()

    assert draw() == draw()


SCRIPT = """
import sys
import torch
from accelerate import PartialState
from weightsmith.lab.data import load_images
from weightsmith.lab.models import build_model
from weightsmith.lab.train import evaluate, fit

digits = load_images("digits", train_examples=200, test_examples=101)
torch.manual_seed(0)
model, other = (build_model("mlp", channels=1, size=8, classes=10) for _ in range(2))
rows = []
for net in (model, other):
    fit(
        net, torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9), digits, epochs=2, batch_size=33, seed=0,
        clip_norm=1.0, record=rows.append,
    )
state = PartialState()
result = state.num_processes, rows, model.state_dict(), evaluate(model, digits.test)
torch.save(result, f"{sys.argv[1]}/{state.process_index}.pt")
"""


def test_two_processes_train_as_one_does(tmp_path, monkeypatch):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    (tmp_path / "one").mkdir()
    (tmp_path / "two").mkdir()
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path / "one")])
    runpy.run_path(str(script))
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = os.environ | {"ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, script, tmp_path / "two"], env=environment, check=True, timeout=120, capture_output=True)
    (_, rows, weights, test), (processes, *first), (_, *second) = (
        torch.load(tmp_path / file) for file in ("one/0.pt", "two/0.pt", "two/1.pt")
    )
    assert processes == 2
    assert len(first[0]) == len(rows) == 4
    assert second[0] == []  # the main process records
    for ours, theirs in zip(rows, first[0], strict=True):
        assert theirs == pytest.approx(ours, rel=1e-4)
    for _, state, measured in (first, second):
        torch.testing.assert_close(state, weights, rtol=1e-5, atol=1e-6)
        assert measured == pytest.approx(test, rel=1e-4)
