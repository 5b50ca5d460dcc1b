import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.lab.identity import function_words, weights_digest
from weightsmith.lab.tasks import TaskConfig, from_datasets, make_task
from weightsmith.lab.train import Hook, fit


def same_weights(first, second):
    return weights_digest(first) == weights_digest(second)


def noisy_task():
    x = torch.randn(64, 5, generator=torch.Generator().manual_seed(0))
    y = (x.sum(1) > 0).long()

    def build():
        return nn.Sequential(nn.Linear(5, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))

    pairs = [(a, int(b)) for a, b in zip(x, y, strict=True)]
    return from_datasets(build, pairs[:48], pairs[48:])


class Stopped(Exception):
    pass


class Average:
    """Something with a state that belongs to the run."""

    def __init__(self, model):
        self.model, self.value, self.calls = model, torch.zeros(2, 16), 0

    def update(self):
        self.value = 0.9 * self.value + 0.1 * self.model[4].weight.detach()
        self.calls += 1

    def state_dict(self):
        return {"value": self.value, "calls": self.calls}

    def load_state_dict(self, state):
        self.value, self.calls = state["value"], state["calls"]


def noisy_run(folder, stop=None, pause=0.0, **options):
    task = noisy_task()
    torch.manual_seed(1)
    model = task.build()
    average, kept = Average(model), []

    def step():
        average.update()
        time.sleep(pause)
        if stop is not None and average.calls == stop:
            raise Stopped

    fitted = fit(
        model, torch.optim.AdamW(model.parameters(), lr=0.01), task, batch_size=10, seed=7,
        hooks=[Hook(after_step=step, state=average)], record=kept.append, folder=folder, **{"epochs": 5, **options},
    )  # fmt: skip
    return fitted, average, kept


@pytest.mark.parametrize("stop", [1, 3, 4, 10, 15])
def test_a_run_that_was_stopped_anywhere_ends_as_one_that_was_not(tmp_path, stop):
    whole, average, rows = noisy_run(None)
    with pytest.raises(Stopped):
        noisy_run(tmp_path, stop=stop, checkpoint_seconds=0.0)
    resumed, again, kept = noisy_run(tmp_path, checkpoint_seconds=0.0)
    assert same_weights(resumed.model, whole.model)
    assert torch.equal(again.value, average.value)
    assert again.calls == average.calls == 15
    assert kept == rows


def test_a_finished_run_is_read_back_and_not_trained_again(tmp_path):
    whole, _, rows = noisy_run(tmp_path)
    again, average, kept = noisy_run(tmp_path, stop=1)
    assert same_weights(whole.model, again.model)
    assert (kept, average.calls) == (rows, 15)


def test_a_damaged_checkpoint_starts_over(tmp_path):
    whole, *_ = noisy_run(tmp_path)
    file = tmp_path / "fit.pt"
    whole_file = file.read_bytes()
    place = whole_file.index(bytes([*whole.model[0].weight.detach().view(torch.uint8).flatten()[:16]]))
    flipped = bytearray(whole_file)
    flipped[place] ^= 1  # one bit of one weight
    for damaged in (whole_file[:100], b"", bytes(flipped)):
        file.write_bytes(damaged)
        assert same_weights(noisy_run(tmp_path)[0].model, whole.model)
    torch.save({"weights": 1}, file)
    assert same_weights(noisy_run(tmp_path)[0].model, whole.model)


def plain_run(folder, *, seed_of_weights=0, optimizer=torch.optim.SGD, group=None, rows=100, **options):
    task = make_task(TaskConfig(train_examples=rows, model="mlp"))
    torch.manual_seed(seed_of_weights)
    model = task.build()
    stepper = optimizer(model.parameters(), **{"lr": 0.1, **(group or {})})
    return fit(model, stepper, task, **{"steps": 3, "batch_size": 20, "seed": 0, **options}, folder=folder)


def weighted(weight):
    return lambda model, batch: weight * model(batch.inputs).square().mean(1)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed"),
        ({"steps": 4}, "steps"),
        ({"batch_size": 10}, "batch_size"),
        ({"seed_of_weights": 1}, "first weights"),
        ({"rows": 120}, "data"),
        ({"group": {"lr": 0.2}}, "optimizer"),
        ({"group": {"weight_decay": 0.1}}, "optimizer"),
        ({"optimizer": torch.optim.Adam}, "optimizer"),
        ({"clip_norm": 0.1}, "clip_norm"),
        ({"schedule": "constant"}, "schedule"),
        ({"warmup": 2}, "schedule"),
        ({"mixed_precision": "bf16"}, "mixed_precision"),
        ({"validate": "never"}, "validate"),
        ({"rows_at": 1}, "rows_at"),
        ({"hooks": [Hook(state=torch.optim.SGD([nn.Parameter(torch.zeros(1))]))]}, "hooks"),
        ({"loss": weighted(1.0)}, "loss"),
    ],
)
def test_a_folder_serves_one_run_alone(tmp_path, changes, named):
    plain_run(tmp_path)
    with pytest.raises(UsageError, match=f"another training run, with another {named}"):
        plain_run(tmp_path, **changes)


def test_a_loss_with_another_weight_is_another_loss():
    assert function_words(weighted(1.0)) == function_words(weighted(1.0))
    assert function_words(weighted(1.0)) != function_words(weighted(2.0))
    assert function_words(partial(max, 1)) != function_words(partial(max, 2))
    assert function_words(partial(weighted, weight=1)) != function_words(partial(plain_run, weight=1))


def test_a_loss_that_counts_its_calls_stays_the_same_loss():
    calls = 0

    def loss(model, batch):
        nonlocal calls
        calls += 1

    before = function_words(loss)
    loss(None, None)
    assert function_words(loss) == before


def test_first_weights_that_differ_in_order_alone_are_told_apart():
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.load_state_dict({"weight": first.weight.flip(0), "bias": first.bias})
    assert weights_digest(first) != weights_digest(second)


def test_a_state_that_could_not_be_read_back_is_refused_before_training(tmp_path):
    class Odd:
        def state_dict(self):
            return {"path": Path("here")}

        def load_state_dict(self, state):
            pass

    with pytest.raises(UsageError, match="state of hook 0 must be tensors, numbers"):
        plain_run(tmp_path, hooks=[Hook(state=Odd())])


KILLED = """
import sys, torch
sys.path.insert(0, {here!r})
from pathlib import Path
import test_resume
torch.set_num_threads(1)
fitted, *_ = test_resume.noisy_run(Path(sys.argv[1]), pause=float(sys.argv[3]), epochs=30, checkpoint_seconds=0.0)
torch.save(fitted.model.state_dict(), sys.argv[2])
"""


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_ends_bit_identical(tmp_path):
    script, folder, end = tmp_path / "script.py", tmp_path / "fit", tmp_path / "end.pt"
    script.write_text(KILLED.format(here=str(Path(__file__).parent)))
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    generator, steps = torch.Generator().manual_seed(time.time_ns()), []
    for _ in range(2):
        since = (folder / "fit.pt").stat().st_mtime_ns if steps else 0
        process = subprocess.Popen([sys.executable, script, folder, end, "0.02"], env=environment)
        while not (folder / "fit.pt").exists() or (folder / "fit.pt").stat().st_mtime_ns == since:
            assert process.poll() is None
            time.sleep(0.005)
        time.sleep(0.3 * torch.rand((), generator=generator).item())
        process.send_signal(signal.SIGKILL)
        process.wait()
        steps.append(torch.load(folder / "fit.pt")["own"]["step"])
    assert 0 < steps[0] < steps[1] < 90  # each kill came in the middle
    subprocess.run([sys.executable, script, folder, end, "0"], env=environment, check=True)
    whole, *_ = noisy_run(None, epochs=30)
    ended = torch.load(end)
    assert all(torch.equal(ended[name], tensor) for name, tensor in whole.model.state_dict().items())
