"""Tasks in sequence."""

import dataclasses

import pytest
import torch

from weightsmith.core.errors import UsageError
from weightsmith.experiments import lcia, rivals, streams
from weightsmith.lab.data.instructions import SETS, make_rows
from weightsmith.lab.job import Job
from weightsmith.lab.record import Recorder

TEXT = {
    "task": "questions", "model": "", "pretrained": False, "length": 64, "train_examples": 16, "test_examples": 4,
    "batch_size": 4, "steps": 2, "fisher": 2, "sets": ("sums", "reversed", "sums-reworded"),
}  # fmt: skip


def settings(**changes):
    return dataclasses.replace(lcia.EXPERIMENT.preset("smoke"), **changes)


def do(config, arm, folder):
    return lcia.job(config, Job(arm, 0, Recorder(), folder, torch.device("cpu")))


@pytest.mark.parametrize("name", SETS)
def test_instruction_sets_keep_inputs_apart(name):
    train, test = (dict(make_rows(name, split)) for split in ("train", "test"))
    inputs = [{question.partition(": ")[2] for question in rows} for rows in (train, test)]
    assert not inputs[0] & inputs[1]
    other = next((key for key in SETS if key != name and key.partition("-")[0] == name.partition("-")[0]), None)
    if other:
        assert not inputs[0] & {question.partition(": ")[2] for question, _ in make_rows(other, "train")}
    question, answer = next(iter(test.items()))
    assert question.partition(": ")[0] in SETS[name].wordings
    assert answer


def test_related_images_share_a_group_and_their_negatives_have_another(tmp_path):
    config = settings(train_examples=120, test_examples=12, epochs=1, batch_size=8)
    assert do(config, "lcia", tmp_path / "a")["groups"] == 2
    assert do(config, "dynamic", tmp_path / "b")["groups"] == 1


def test_images_are_turned_and_negated():
    x = torch.randn(2, 1, 6, 6)
    torch.testing.assert_close(streams._seen(x, 90.0, True), -x.rot90(1, (2, 3)), atol=1e-5, rtol=1e-5)
    assert torch.equal(streams._seen(x, 0.0, False), x)


@pytest.mark.parametrize("arm", ["lcia", "lwf", "ewc", "replay", "joint"])
def test_instructions_arrive_one_after_another(tmp_path, arm):
    found = do(settings(**TEXT), arm, tmp_path)
    assert found["groups"] == (2 if arm == "lcia" else 1)
    assert 0 <= torch.as_tensor(found["score"]).mean() <= 100
    assert found["kept"] > 0


def test_joint_training_sees_every_row_of_every_task():
    for config in (settings(train_examples=120, test_examples=12), settings(**TEXT)):
        stages = lcia._stages(config)
        parts = [(stage.task, torch.arange(len(stage.task.train))) for stage in stages]
        train = streams.together(config, parts).train
        assert len(train) == sum(len(stage.task.train) for stage in stages)
        at = len(stages[0].task.train)
        both, alone = train.__getitems__([0, at]), stages[1].task.train.__getitems__([0])
        inputs = both.inputs["input_ids"] if isinstance(both.inputs, dict) else both.inputs
        expected = alone.inputs["input_ids"] if isinstance(alone.inputs, dict) else alone.inputs
        assert torch.equal(inputs[1][..., : expected.shape[-1]], expected[0])


def test_replay_keeps_as_many_bytes_as_the_groups(tmp_path):
    config = settings(train_examples=120, test_examples=12, steps=2, batch_size=8)
    lcia_kept, replay, joint = (do(config, arm, tmp_path / arm) for arm in ("lcia", "replay", "joint"))
    assert replay["examples"] == joint["examples"]  # all data fit into the bytes of a group here
    assert replay["kept"] <= lcia_kept["kept"]
    held = rivals.Replay(budget=640.0, held=[])  # ten images of 8 x 8
    for stage in lcia._stages(config):
        held.add(stage.task, seed=0)
    assert [len(rows) for _, rows in held.held] == [2, 2, 2, 2]
    assert len(held.with_new(config, lcia.task(config)).train) == len(lcia.task(config).train) + 8


def test_sets_of_your_own_need_their_instructions(tmp_path):
    with pytest.raises(UsageError, match="prompts must name the instruction of each of the 2 sets of your own, got 0"):
        streams.data_sets(settings(), ("a.csv", "b.csv"), ())
    with pytest.raises(UsageError, match="kinds must be degrees"):
        streams.images(settings(train_examples=120, test_examples=12), ("0", "left"))
    own = tmp_path / "own.csv"
    own.write_text("question,answer\n" + "".join(f"Double: {i},{2 * i}\n" for i in range(40)))
    text = settings(**TEXT | {"sets": ("sums", str(own)), "prompts": ("Double the number",)})
    assert [stage.instructions[-1] for stage in lcia._stages(text)][1] == "Double the number"


def test_any_task_with_classes_or_tokens_makes_a_sequence(tmp_path):
    for name, sign in (("a", 1), ("b", 0)):
        rows = "".join(f"{'good' if i % 2 else 'bad'} film {i},{int(i % 2 == sign)}\n" for i in range(60))
        (tmp_path / f"{name}.csv").write_text("text,label\n" + rows)
    sets = tuple(str(tmp_path / f"{name}.csv") for name in "ab")
    changes = {"task": "sentences", "model": "", "sets": sets, "prompts": ("Judge the film", "Judge it wrongly")}
    config = settings(**changes, steps=3, train_examples=None, test_examples=None, batch_size=8)
    for arm in ("joint", "replay"):
        assert 0 <= torch.as_tensor(do(config, arm, tmp_path / arm)["score"]).mean() <= 100


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "restoration", "model": ""}, "must predict classes or tokens"),
        ({"sets": ("digits", "digits")}, "sets must name at least two tasks, each once"),
        ({"kinds": ("0",)}, "kinds must name at least two tasks"),
        ({"task": "questions", "model": "", "data": "arithmetic"}, "sets must name the data of at least two tasks"),
        ({"sets": ("sums", "capitals"), "data": "digits"}, "data must be empty"),
    ],
)
def test_what_makes_no_sequence_is_refused(changes, message):
    with pytest.raises(UsageError, match=message):
        lcia._stages(settings(train_examples=120, test_examples=12, **changes))
