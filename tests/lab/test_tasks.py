import json

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.lab.data.labels import hold_out, subset
from weightsmith.lab.probe import probe
from weightsmith.lab.tasks import TaskConfig, TrainConfig, from_datasets, make_task
from weightsmith.lab.tasks.scoring import logits_of

pytestmark = pytest.mark.usefixtures("own_caches")


def write_lines(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


@pytest.fixture
def reviews(tmp_path):
    good, bad = "a fine film, I liked it \u2028 much", "a dull film, I left early"
    rows = [{"sentence": good if row % 3 else bad, "label": "good" if row % 3 else "bad"} for row in range(30)]
    write_lines(tmp_path / "reviews" / "train.jsonl", rows)
    write_lines(tmp_path / "reviews" / "test.jsonl", rows[:9])
    return str(tmp_path / "reviews")


def works(config):
    """Train a step and evaluate; the task."""
    task = make_task(config)
    probe(task)
    model = config.network(task, 0)
    config.fit(model, torch.optim.SGD(model.parameters(), lr=0.01), task, seed=0)
    outcome = task.evaluate(model, "test")
    assert task.metric.name in outcome.metrics
    assert all(len(scores) == task.rows["test"] for scores in outcome.scores.values())
    return task


def test_images_are_classified_by_default():
    task = works(TrainConfig(train_examples=100, test_examples=20, steps=1))
    assert task.rows == {"train": 80, "validation": 20, "test": 20}
    assert task.facts == {"data": "digits, 8 x 8 gray images of 10 classes", "model": "convnet"}


@pytest.mark.parametrize("model", ["bag", "transformer"])
def test_sentences_are_classified_without_any_download(reviews, model):
    task = works(TrainConfig(task="sentences", data=reviews, model=model, steps=1, length=40))
    assert task.rows == {"train": 24, "validation": 6, "test": 9}


def test_sentences_are_read_from_csv_with_columns_of_ones_own(tmp_path):
    lines = "".join(f'"words, with ""quotes"" {row}",{1 + row % 2}\n' for row in range(20))
    (tmp_path / "mine.csv").write_text("body,kind\n" + lines)
    config = TrainConfig(task="sentences", data=str(tmp_path / "mine.csv"), columns=("body", "kind"), steps=1)
    assert works(config).rows["test"] == 4
    with pytest.raises(UsageError, match=r"no column 'bodi'; did you mean 'body'"):
        make_task(TaskConfig(task="sentences", data=str(tmp_path / "mine.csv"), columns=("bodi", "kind")))


def test_running_text_is_predicted_in_windows(tmp_path):
    (tmp_path / "book.txt").write_text("It was a dark night. " * 300)
    task = works(TrainConfig(task="language", data=str(tmp_path / "book.txt"), length=32, steps=1))
    assert task.metric.better == "lower"
    with pytest.raises(UsageError, match="at least 3 windows"):
        make_task(TaskConfig(task="language", data=str(tmp_path / "book.txt"), length=5000))


def test_questions_are_trained_on_their_answers_alone(tmp_path):
    rows = [{"question": f"What is {row} + 1?", "answer": f"#### {row + 1}"} for row in range(20)]
    write_lines(tmp_path / "sums" / "train.jsonl", rows)
    write_lines(tmp_path / "sums" / "test.jsonl", rows[:5])
    task = works(TrainConfig(task="questions", data=str(tmp_path / "sums"), length=64, steps=1))
    batch = task.train.__getitems__([0])
    asked = len("Question: What is 0 + 1?\nAnswer:")
    assert (batch.targets[0, :asked] == -100).all()
    assert (batch.targets[0, asked + 2 :] >= 0).any()
    with pytest.raises(UsageError, match="length must leave room for answers"):
        make_task(TaskConfig(task="questions", data=str(tmp_path / "sums"), length=8))


def test_worked_arithmetic_is_bundled():
    config = TrainConfig(task="questions", train_examples=20, test_examples=5, steps=1)
    assert works(config).rows == {"train": 16, "validation": 4, "test": 5}


def test_a_hugging_face_model_answers_and_is_scored_by_exact_matches(tiny_language_model):
    config = TrainConfig(
        task="questions", model=tiny_language_model, pretrained=True, train_examples=8, test_examples=4, steps=1,
        new_tokens=2,
    )  # fmt: skip
    assert works(config).metric.name == "exact"


def test_a_hugging_face_classifier_reads_sentences(reviews, tiny_language_model):
    works(TrainConfig(task="sentences", data=reviews, model=tiny_language_model, steps=1, length=20))


def test_a_task_of_ones_own_is_a_function(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text("""
import torch
from torch import nn
from weightsmith.lab.tasks import from_datasets

def squared(output, target):
    return (output.squeeze(-1) - target).square()

def task():
    x = torch.arange(40.0)[:, None] / 40
    pairs = [{"x": a, "y": a.squeeze()} for a in x]
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(1, 1)
        def forward(self, x):
            return self.layer(x)
    return from_datasets(Net, pairs[:30], pairs[30:], loss=squared, metric=squared, better="lower")
""")
    monkeypatch.chdir(tmp_path)
    task = works(TrainConfig(task="mine.py:task", steps=1))
    assert (task.metric.name, task.metric.better) == ("squared", "lower")
    assert TaskConfig(task="mine.py:task").score_metric().better == "lower"
    before = make_task(TaskConfig(task="mine.py:task")).fingerprint
    assert before == task.fingerprint


def test_loss_and_metric_of_ones_own(tmp_path, monkeypatch):
    (tmp_path / "parts.py").write_text("""
import torch
def hinge(output, targets):
    return torch.nn.functional.multi_margin_loss(output, targets, reduction="none")
def top2(output, targets):
    return (output.topk(2).indices == targets[:, None]).any(1).float()
def wrong(output, targets):
    return output.mean()
""")
    monkeypatch.chdir(tmp_path)
    config = TrainConfig(train_examples=100, test_examples=20, steps=1, loss="parts:hinge", metric="parts:top2")
    assert works(config).metric.name == "top2"
    with pytest.raises(UsageError, match=r"must be one per example"):
        probe(make_task(TaskConfig(train_examples=100, loss="parts:wrong")))


def test_a_model_from_a_file_and_a_checkpoint_to_start_from(tmp_path, monkeypatch):
    (tmp_path / "mynet.py").write_text("""
from torch import nn
def make(channels, size, classes):
    return nn.Sequential(nn.Flatten(), nn.Linear(channels * size**2, classes))
def few():
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 3))
class Output(dict):
    pass
class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(64, 10)
    def forward(self, x):
        return None, self.layer(x.flatten(1))
def tuples():
    return Net()
""")
    monkeypatch.chdir(tmp_path)
    works(TrainConfig(train_examples=100, test_examples=20, steps=1, model="mynet.py:make"))
    with pytest.raises(UsageError, match="3 outputs per example, the data have 10 classes"):
        probe(make_task(TaskConfig(train_examples=100, model="mynet:few")))
    with pytest.raises(UsageError, match="holds no logits"):
        probe(make_task(TaskConfig(train_examples=100, model="mynet:tuples")))
    weights = nn.Linear(64, 10)
    save_file({"1.weight": weights.weight.detach(), "1.bias": weights.bias.detach()}, "start.safetensors")
    task = make_task(TaskConfig(train_examples=100, model="mynet.py:make", checkpoint="start.safetensors"))
    assert torch.equal(task.build()[1].weight, weights.weight)
    torch.save({"state_dict": {"1.weight": weights.weight.detach()}}, "half.pt")
    with pytest.raises(UsageError, match="does not fit the model"):
        make_task(TaskConfig(train_examples=100, model="mynet.py:make", checkpoint="half.pt")).build()
    with pytest.raises(UsageError, match="there is no such file"):
        make_task(TaskConfig(train_examples=100, checkpoint="none.pt")).build()


def test_changed_user_code_changes_the_fingerprint(tmp_path, monkeypatch):
    from weightsmith.core.load import load_module
    from weightsmith.core.own_code import code_digest

    (tmp_path / "netparts.py").write_text("WIDTH = 3\n")
    (tmp_path / "mainnet.py").write_text("from netparts import WIDTH\n")
    (tmp_path / "stranger.py").write_text("X = 1\n")
    monkeypatch.chdir(tmp_path)
    module = load_module("mainnet.py", "model")
    before = code_digest(module)
    (tmp_path / "stranger.py").write_text("X = 2\n")
    assert code_digest(module) == before
    (tmp_path / "netparts.py").write_text("WIDTH = 4\n")
    assert code_digest(load_module("mainnet.py", "model")) != before


def pets(folder, *, classes=("cat", "dog"), test_classes=None, count=4):
    for split, names in (("train", classes), ("test", test_classes or classes)):
        for name in names:
            place = folder / split / name
            place.mkdir(parents=True)
            for row in range(count):
                mode = "L" if row % 2 else "RGB"
                Image.new(mode, (12, 12), 40 * row if mode == "L" else (40 * row, 0, 0)).save(place / f"{row}.png")
    return folder


def test_class_folders_with_mixed_modes_become_colors_of_the_asked_size(tmp_path):
    config = TrainConfig(data=str(pets(tmp_path / "pets")), size=8, steps=1)
    assert works(config).facts["data"].endswith("8 x 8 color images of 2 classes")


def test_what_cannot_be_trained_on_is_named_at_once(tmp_path):
    with pytest.raises(UsageError, match="one class only"):
        make_task(TaskConfig(data=str(pets(tmp_path / "one", classes=("cat",)))))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageError, match="is empty"):
        make_task(TaskConfig(data=str(tmp_path / "empty")))
    broken = pets(tmp_path / "broken")
    (broken / "train" / "cat" / "2.png").write_bytes(b"not an image")
    with pytest.raises(UsageError, match=r"2\.png"):
        make_task(TaskConfig(data=str(broken)))


def test_test_classes_that_training_lacks_are_an_error(tmp_path):
    write_lines(tmp_path / "data" / "train.jsonl", [{"text": "x", "label": name} for name in "abab"])
    write_lines(tmp_path / "data" / "test.jsonl", [{"text": "x", "label": name} for name in "abz"])
    with pytest.raises(UsageError, match="test rows have classes that training does not have: z"):
        make_task(TaskConfig(task="sentences", data=str(tmp_path / "data")))


def test_images_named_in_a_table_are_found_beside_it(tmp_path):
    folder = pets(tmp_path / "pets")
    rows = [f"train/{name}/{row}.png,{name}\n" for name in ("cat", "dog") for row in range(4)]
    (folder / "list.csv").write_text("path,label\n" + "".join(rows))
    task = make_task(TaskConfig(data=str(folder / "list.csv")))
    assert sum(task.rows.values()) == 8
    (folder / "list.csv").write_text("path,label\nnowhere.png,cat\n" + "".join(rows))
    with pytest.raises(UsageError, match=r"no image 'nowhere\.png'"):
        make_task(TaskConfig(data=str(folder / "list.csv")))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"task": "sounds"}, "task 'sounds' is not known"),
        ({"task": "sentences"}, "needs data"),
        ({"train_examples": 0}, "train_examples must be at least 1"),
        ({"validation_fraction": 1.0}, "validation_fraction must be"),
        ({"model": "resnet21"}, "model 'resnet21' is not known"),
        ({"task": "questions", "model": "bag"}, "model 'bag' is not known"),
        ({"task": "questions", "new_tokens": 3}, "cannot generate"),
        ({"task": "no_such:task"}, "no module 'no_such'"),
        ({"data": "digits.xyz"}, "is not known"),
    ],
)
def test_wrong_settings_are_named(changes, message):
    with pytest.raises(UsageError, match=message):
        make_task(TaskConfig(**changes)).build()


@pytest.mark.parametrize("field", ["epochs", "steps", "batch_size"])
def test_training_settings_out_of_range_are_named(field):
    with pytest.raises(UsageError, match=f"{field} must be above 0"):
        TrainConfig(**{field: 0}).check()


def test_latin_1_text_is_named(tmp_path):
    (tmp_path / "old.csv").write_bytes("text,label\ncafé,a\nthé,b\n".encode("latin-1") * 3)
    with pytest.raises(UsageError, match=r"old\.csv"):
        make_task(TaskConfig(task="sentences", data=str(tmp_path / "old.csv")))


def test_subsets_keep_the_share_of_every_class():
    labels = torch.tensor([0] * 60 + [1] * 30 + [2] * 10)
    chosen = subset(100, 20, labels)
    assert labels[chosen].bincount().tolist() == [12, 6, 2]
    assert torch.equal(chosen, subset(100, 20, labels))
    kept, held = hold_out(100, 0.2, labels)
    assert sorted([*kept.tolist(), *held.tolist()]) == list(range(100))
    assert labels[held].bincount().tolist() == [12, 6, 2]


def test_logits_are_found_in_what_models_return():
    x = torch.zeros(2, 3)
    for output in (x, (x, None), {"logits": x}, type("Output", (), {"logits": x})()):
        assert logits_of(output) is x


def test_a_dataset_without_examples_is_refused():
    with pytest.raises(UsageError, match="train must be a map-style dataset"):
        from_datasets(lambda: nn.Linear(1, 2), [], [(torch.zeros(1), 0)])
