"""A validation split of the data's own is what is chosen by; training then gives up no rows."""

import dataclasses
import json

import datasets
import pytest
import toy
from PIL import Image

from weightsmith.core.errors import UsageError
from weightsmith.lab.data.image_sets import load_images
from weightsmith.lab.data.labels import own_validation, parts_of, unused_validation
from weightsmith.lab.data.sources import load_tables
from weightsmith.lab.data.text_sets import load_sentences
from weightsmith.lab.run import run
from weightsmith.lab.tasks import TaskConfig, make_task

COUNTS = {"train": 20, "test": 6, "validation": 8}


pytestmark = pytest.mark.usefixtures("own_caches")


def sentence(split, row):
    return {"text": f"{split} {row} word", "label": row % 2}


def question(split, row):
    return {"question": f"{split} {row}?", "answer": f"{row}"}


def write(folder, ending, name, row=sentence):
    """One file per split, the validation split under another name."""
    folder.mkdir()
    for split, count in COUNTS.items():
        rows = [row(split, number) for number in range(count)]
        path = folder / f"{name if split == 'validation' else split}{ending}"
        if ending == ".csv":
            lines = [",".join(rows[0]), *(",".join(map(str, values.values())) for values in rows)]
            path.write_text("\n".join(lines) + "\n")
        elif ending == ".jsonl":
            path.write_text("".join(json.dumps(values) + "\n" for values in rows))
        else:
            datasets.Dataset.from_list(rows).to_parquet(path)
    return str(folder)


@pytest.mark.parametrize(
    ("ending", "name"),
    [(".csv", "validation"), (".csv", "val"), (".jsonl", "valid"), (".jsonl", "my-dev-1"), (".parquet", "val")],
)
def test_files_of_a_validation_split_are_chosen_by(tmp_path, ending, name):
    data = write(tmp_path / "reviews", ending, name)
    task = make_task(TaskConfig(task="sentences", data=data))
    assert task.rows == COUNTS
    assert task.facts["validation"] == "8 rows of the data's own validation split; training keeps all of its rows"
    fewer = make_task(TaskConfig(task="sentences", data=data, train_examples=10, test_examples=4))
    assert fewer.rows == {"train": 10, "test": 4, "validation": 4}


def test_questions_and_running_text_have_a_validation_split_too(tmp_path):
    asked = write(tmp_path / "asked", ".jsonl", "dev", question)
    assert make_task(TaskConfig(task="questions", data=asked, length=40)).rows == COUNTS
    (tmp_path / "book").mkdir()
    for split, count in COUNTS.items():
        (tmp_path / "book" / f"{split}.txt").write_text("abcdefgh" * count)
    task = make_task(TaskConfig(task="language", data=str(tmp_path / "book"), length=8))
    assert task.rows == COUNTS


@pytest.mark.parametrize("name", ["val", "validation", "Dev"])
@pytest.mark.parametrize("bytes_in_memory", [0, 2**30])
def test_a_folder_of_validation_images_is_chosen_by(tmp_path, monkeypatch, name, bytes_in_memory):
    monkeypatch.setattr("weightsmith.lab.data.image_sets.IN_MEMORY_BYTES", bytes_in_memory)
    for split, level in (("train", 10), (name, 100), ("test", 200)):
        for label in ("cat", "dog"):
            place = tmp_path / "pets" / split / label
            place.mkdir(parents=True)
            for row in range(4):
                Image.new("L", (8, 8), level + row).save(place / f"{row}.png")
    images = load_images(str(tmp_path / "pets"))
    assert [len(part) for part in (images.train, images.validation, images.test)] == [8, 8, 8]
    assert images.validation.read(images.validation.rows, None).unique().tolist() == [100, 101, 102, 103]
    assert images.validation.__getitems__([0, 7]).targets.tolist() == [0, 1]
    Image.new("L", (8, 8), 99).save(tmp_path / "pets" / name / "cat" / "0.png")
    assert load_images(str(tmp_path / "pets")).fingerprint != images.fingerprint
    (tmp_path / "pets" / "valid" / "cat").mkdir(parents=True)
    with pytest.raises(UsageError, match="two folders stand for one split"):
        load_images(str(tmp_path / "pets"))


def test_the_run_says_in_one_line_what_is_chosen_by(tmp_path):
    config = TaskConfig(task="sentences", data=write(tmp_path / "reviews", ".csv", "val"))
    experiment = dataclasses.replace(toy.EXPERIMENT, task=lambda _: make_task(config))
    done = run(experiment, toy.Config(), seeds=1, out=tmp_path / "runs", workers=1)
    (line,) = done.news
    assert line.startswith("validation: 8 rows of the data's own validation split")


def test_split_names_of_saved_tables_are_understood(tmp_path):
    table = datasets.Dataset.from_list([sentence("any", row) for row in range(10)])
    splits = {"train": table, "val": table.select(range(4)), "test": table.select(range(2))}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert make_task(TaskConfig(task="sentences", data=str(tmp_path / "saved"))).rows == {
        "train": 10,
        "test": 2,
        "validation": 4,
    }


def test_files_of_several_kinds_are_not_read_in_part(tmp_path):
    write(tmp_path / "mixed", ".csv", "val")
    (tmp_path / "mixed" / "val.csv").rename(tmp_path / "mixed" / "val.jsonl")
    with pytest.raises(UsageError, match=r"of several kinds, test\.csv, train\.csv, val\.jsonl"):
        load_tables(str(tmp_path / "mixed"))


def test_a_validation_split_that_is_not_used_is_told():
    used = {"train": [0, 1], "validation": [1], "test": [0]}
    assert own_validation("data", used).labels.tolist() == [1]
    assert unused_validation(used) == unused_validation({"train": [0, 1]}) == ""
    assert own_validation("data", used | {"test": [-1]}) is None
    assert unused_validation(used | {"test": [-1]}) == "the validation split is the test data"
    assert own_validation("data", used | {"validation": [None]}) is None
    assert unused_validation(used | {"validation": [None]}) == "the validation split has no labels"
    with pytest.raises(UsageError, match="validation rows have classes that training does not have: 2"):
        own_validation("data", used | {"validation": [2]})


def classes(names, labels):
    label = datasets.Value("string") if names is None else datasets.ClassLabel(names=names)
    features = datasets.Features({"text": datasets.Value("string"), "label": label})
    texts = [names[label] if names and label >= 0 else str(label) for label in labels]
    return datasets.Dataset.from_dict({"text": texts, "label": labels}, features=features)


@pytest.mark.parametrize("train", [(["neg", "pos"], [0, 1, 0, 1]), (None, ["neg", "pos"])])
def test_splits_that_name_their_classes_in_another_order_are_numbered_as_training_is(tmp_path, train):
    splits = {
        "train": classes(*train),
        "validation": classes(["pos", "neg", "none of them"], [0, 1]),
        "test": classes(["pos"], [0]),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    found = load_sentences(str(tmp_path / "saved"))
    assert (found.classes, found.train_labels.unique().tolist()) == (("neg", "pos"), [0, 1])
    assert (found.validation, found.validation_labels.tolist()) == (["pos", "neg"], [1, 0])
    assert (found.test, found.test_labels.tolist()) == (["pos"], [1])


def test_a_class_that_only_another_split_names_is_an_error_where_it_has_rows(tmp_path):
    splits = {"train": classes(["neg", "pos"], [0, 1]), "test": classes(["other", "neg"], [0, 1])}
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    with pytest.raises(UsageError, match="test rows have classes that training does not have: other"):
        load_sentences(str(tmp_path / "saved"))


@pytest.mark.parametrize("train", [[0, 1, 2], [0.0, 1.0, 2.0], ["a", "b", "c"]])
def test_a_split_that_lacks_a_class_keeps_the_numbers_of_training(train):
    labels = {"train": train, "validation": [train[2], train[0]], "test": [train[2]]}
    assert own_validation("data", labels).labels.tolist() == [2, 0]
    assert parts_of("data", labels)[1].labels.tolist() == [2]


def test_labels_of_another_type_with_the_same_values_agree():
    assert own_validation("data", {"train": [False, True], "validation": [1.0, 0.0], "test": [1]}).labels.tolist() == [
        1,
        0,
    ]
