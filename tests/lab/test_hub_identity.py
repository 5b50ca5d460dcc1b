"""A name of the hub may stand for other content tomorrow: its results are then not reused. No network is needed."""

import dataclasses
import shutil

import datasets
import pytest
import toy
from huggingface_hub import constants
from PIL import Image

from weightsmith.lab.data import image_sets
from weightsmith.lab.run import run
from weightsmith.lab.tasks import TaskConfig, make_task

transformers = pytest.importorskip("transformers")


@pytest.fixture(autouse=True)
def hub(tmp_path, monkeypatch):
    """An empty cache of the hub, which is offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("WEIGHTSMITH_CACHE", str(tmp_path / "decoded"))
    monkeypatch.delenv("WEIGHTSMITH_DATA", raising=False)
    return tmp_path / "hub"


def publish(hub, commit):
    """Put a revision of the same small model into the cache, as a download does."""
    place = hub / "models--someone--tiny"
    config = transformers.ViTConfig(
        hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, patch_size=4
    )
    config.save_pretrained(place / "snapshots" / commit)
    (place / "refs").mkdir(exist_ok=True)
    (place / "refs" / "main").write_text(commit)


def test_another_revision_of_a_hub_model_makes_another_folder_and_says_so(hub, tmp_path):
    config = TaskConfig(model="someone/tiny", train_examples=60, test_examples=10)
    experiment = dataclasses.replace(toy.EXPERIMENT, task=lambda _: make_task(config))

    def ask():
        return run(experiment, toy.Config(), seeds=1, out=tmp_path / "runs", workers=1)

    publish(hub, "a" * 40)
    one = ask()
    assert (ask().folder, one.news) == (one.folder, [])
    publish(hub, "b" * 40)
    other = ask()
    assert other.folder != one.folder
    assert other.news == [f"data and model code changed since {one.folder}: nothing of it is reused"]


def test_a_file_in_a_model_folder_that_changes_makes_another_identity(hub, tmp_path):
    publish(hub, "a" * 40)
    folder = tmp_path / "mine"
    shutil.copytree(hub / "models--someone--tiny" / "snapshots" / ("a" * 40), folder)
    (folder / "more").mkdir()
    (folder / "more" / "part.json").write_text("1")
    config = TaskConfig(model=str(folder), train_examples=60, test_examples=10)
    before = make_task(config).fingerprint
    assert make_task(config).fingerprint == before
    (folder / "more" / "part.json").write_text("2")
    assert make_task(config).fingerprint != before


@pytest.mark.parametrize("bytes_in_memory", [0, 2**30])
def test_a_hub_data_set_whose_rows_change_under_the_same_name_makes_another_identity(monkeypatch, bytes_in_memory):
    monkeypatch.setattr(image_sets, "IN_MEMORY_BYTES", bytes_in_memory)
    monkeypatch.setattr(datasets, "load_dataset_builder", lambda name: None)

    def fingerprints(level):
        pictures = datasets.Dataset.from_dict(
            {"image": [Image.new("L", (8, 8), row) for row in [*range(9), level]], "label": [0, 1] * 5},
            features=datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])}),
        )
        texts = datasets.Dataset.from_dict({"text": [f"word{row}" for row in [*range(9), level]], "label": [0, 1] * 5})
        found = []
        for task, table in (("images", pictures), ("sentences", texts)):
            splits = datasets.DatasetDict({"train": table, "test": table})
            monkeypatch.setattr(datasets, "load_dataset", lambda splits=splits, **_: splits)
            found.append(make_task(TaskConfig(task=task, data="someone/rows")).fingerprint)
        return found

    before, again, after = fingerprints(100), fingerprints(100), fingerprints(200)
    assert before == again
    assert before[0] != after[0]
    assert before[1] != after[1]
