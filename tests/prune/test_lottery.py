import subprocess
import sys

import pytest
import torch
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.prune import iterate
from weightsmith.prune.lottery import rounds_for


def make():
    return nn.Sequential(nn.Linear(4, 16), nn.ReLU(), nn.Dropout(0.2), nn.Linear(16, 2))


class Training:
    """Counts, and stops where it is told: the power goes out."""

    def __init__(self, stop_at=None, late=False):
        self.rounds, self.stop_at, self.late = [], stop_at, late

    def __call__(self, model, pruner, number):
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        pruner.attach(optimizer)
        x, y = torch.randn(32, 4), torch.arange(32) % 2
        for step in range(6):
            if number == self.stop_at and step == 3:
                raise KeyboardInterrupt
            if self.late and number == 0 and step == 2:
                pruner.snapshot("step 2")
            optimizer.zero_grad()
            nn.functional.cross_entropy(model(x), y).backward()
            optimizer.step()
        self.rounds.append(number)


def evaluate(model):
    return {"norm": sum(p.detach().double().square().sum().item() for p in model.parameters())}


@pytest.mark.parametrize("late", [False, True])
def test_a_killed_run_goes_on_and_ends_as_one_that_never_stopped(tmp_path, late):
    options = {"rounds": 3, "amount": 0.3, "rewind_to": "step 2" if late else "init", "scope": "layerwise"}
    whole = iterate(make, Training(late=late), evaluate, out=tmp_path / "whole", **options)
    with pytest.raises(KeyboardInterrupt):
        iterate(make, Training(2, late), evaluate, out=tmp_path / "killed", **options)
    again = Training(late=late)
    resumed = iterate(make, again, evaluate, out=tmp_path / "killed", **options)
    assert again.rounds == [2, 3]
    assert [r.metrics for r in resumed] == [r.metrics for r in whole]
    assert [r.density for r in resumed] == pytest.approx([1, 0.7, 0.49, 0.343], abs=0.03)
    for one, other in zip(resumed, whole, strict=True):
        assert (one.folder / "model.safetensors").read_bytes() == (other.folder / "model.safetensors").read_bytes()


def test_a_finished_run_trains_nothing_and_nothing_need_be_written(tmp_path):
    done = iterate(make, Training(), evaluate, rounds=1, out=tmp_path)
    again = Training()
    assert iterate(make, again, evaluate, rounds=1, out=tmp_path) == done
    assert again.rounds == []
    assert iterate(make, Training(), evaluate, rounds=1)[1].metrics == done[1].metrics


def test_a_density_sets_the_number_of_rounds():
    assert rounds_for(0.1, 0.2) == pytest.approx([0.2] * 10 + [1 - 0.1 / 0.8**10])
    assert rounds_for(0.64, 0.2) == pytest.approx([0.2, 0.2])
    done = iterate(make, Training(), evaluate, target_density=0.3, amount=0.5)
    assert len(done) == 3
    assert done[-1].density == pytest.approx(0.3, abs=0.03)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rounds": 0}, "rounds must be"),
        ({"amount": 0.0}, "amount must be above 0"),
        ({"amount": 20}, "amount must be a fraction"),
        ({"target_density": 1.5}, "target_density must be"),
        ({"rewind_to": "epoch 9", "rounds": 1}, "snapshot 'epoch 9' is missing"),
    ],
)
def test_bad_use(options, message):
    with pytest.raises(UsageError, match=message):
        iterate(make, Training(), evaluate, **options)


def test_another_question_does_not_take_an_earlier_answer(tmp_path):
    iterate(make, Training(), evaluate, rounds=1, amount=0.2, out=tmp_path)
    with pytest.raises(UsageError, match="choose another folder"):
        iterate(make, Training(), evaluate, rounds=1, amount=0.3, out=tmp_path)


def test_another_network_does_not_take_the_answer_and_a_file_is_no_folder(tmp_path):
    iterate(make, Training(), evaluate, rounds=1, out=tmp_path / "a")
    other = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2))
    with pytest.raises(UsageError, match="first weights"):
        iterate(lambda: other, Training(), evaluate, rounds=1, out=tmp_path / "a")
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="must be a folder"):
        iterate(make, Training(), evaluate, rounds=1, out=tmp_path / "file")


def test_a_predicate_of_the_users_does_not_hinder_going_on(tmp_path):
    def linear(_, module):
        return isinstance(module, nn.Linear)

    iterate(make, Training(), evaluate, rounds=1, out=tmp_path, where=lambda n, m: linear(n, m))
    again = Training()
    iterate(make, again, evaluate, rounds=1, out=tmp_path, where=lambda n, m: linear(n, m))  # at another address
    assert again.rounds == []


def test_a_damaged_round_is_named(tmp_path):
    iterate(make, Training(), evaluate, rounds=1, out=tmp_path)
    path = tmp_path / "round-01/model.safetensors"
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(UsageError, match="round-01"):
        iterate(make, Training(), evaluate, rounds=1, out=tmp_path)


SCRIPT = """
import sys, time, torch
from torch import nn
from weightsmith.prune import iterate

x, y = torch.randn(32, 4, generator=torch.Generator().manual_seed(0)), torch.arange(32) % 2

def train(model, pruner, number):
    print("round", number, flush=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    pruner.attach(optimizer)
    for _ in range(6):
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(x + torch.randn(32, 4)), y).backward()
        optimizer.step()
        time.sleep(float(sys.argv[2]))

iterate(lambda: nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 2)), train, lambda model: {}, rounds=2, out=sys.argv[1])
"""


@pytest.mark.slow
def test_a_process_that_is_killed_goes_on(tmp_path):
    def start(folder, seconds):
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / folder), str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)

    killed = start("killed", 0.1)
    for line in killed.stdout:
        if line == "round 1\n":
            killed.kill()
    killed.wait()
    said, _ = start("killed", 0).communicate()
    assert said.split("\n")[:-1] == ["round 1", "round 2"]
    start("whole", 0).communicate()
    for number in range(3):
        one, other = (tmp_path / name / f"round-{number:02d}/model.safetensors" for name in ("killed", "whole"))
        assert one.read_bytes() == other.read_bytes()


def test_late_snapshots_of_any_memory_format_are_stored_and_damage_is_said(tmp_path):
    def images():
        layers = nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)
        return nn.Sequential(*layers).to(memory_format=torch.channels_last)

    def train(model, pruner, number):
        if number == 0:
            pruner.snapshot("late")

    options = {"rounds": 1, "amount": 0.5, "rewind_to": "late"}
    done = iterate(images, train, evaluate, out=tmp_path, **options)
    assert iterate(images, train, evaluate, out=tmp_path, **options) == done
    file = done[-1].folder / "snapshots.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(UsageError, match=r"snapshots\.safetensors is damaged"):
        iterate(images, train, evaluate, out=tmp_path, **options)
