"""Published sets of degraded and clean images, in miniature."""

import numpy as np
import pytest
import torch

from weightsmith.core.errors import UsageError
from weightsmith.lab.data.photographs import Patches, load_photographs
from weightsmith.lab.data.restoration_folders import find_scenes
from weightsmith.lab.tasks import TrainConfig, make_task

Image = pytest.importorskip("PIL.Image")
DARKER = {"rain": 20, "haze": 40}


def put(path, level, size=(18, 20)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.full((*size, 3), level, np.uint8)).save(path)


def rain(root, degraded="rainy/rain-{:03d}.png", clean="gt/norain-{:03d}.png", count=4):
    for number in range(1, count + 1):
        put(root / degraded.format(number), 100 + number - DARKER["rain"])
        put(root / clean.format(number), 100 + number)


def haze(root, degraded="hazy", clean="gt", ending="jpg", count=4):
    for number in range(1, count + 1):
        for strength in ("0.8_0.2", "1_0.16"):
            put(root / degraded / f"{number:04d}_{strength}.{ending}", 150 + number - DARKER["haze"])
        put(root / clean / f"{number:04d}.png", 150 + number)


RAIN = [
    ("rainy/rain-{:03d}.png", "gt/norain-{:03d}.png"),
    ("rainy/rain-{:d}.png", "norain/norain-{:d}.png"),
    ("input/{:d}.png", "target/{:d}.png"),
    ("rain/X2/norain-{:03d}x2.png", "norain/norain-{:03d}.png"),
    ("rain-{:03d}.png", "norain-{:03d}.png"),
]


@pytest.mark.parametrize(("degraded", "clean"), RAIN)
def test_rain_in_every_layout(tmp_path, degraded, clean):
    root = tmp_path / "Rain100L"
    rain(root, degraded, clean)
    found = load_photographs(str(root))
    assert {split: {kind: len(rows) for kind, rows in kinds.items()} for split, kinds in found.pairs.items()} == {
        "train": {"rain": 2}, "validation": {"rain": 1}, "test": {"rain": 1}
    }  # fmt: skip
    for kinds in found.pairs.values():
        for wet, dry in kinds["rain"]:
            assert (dry.astype(int) - wet == DARKER["rain"]).all()


@pytest.mark.parametrize(("degraded", "clean"), [("hazy", "gt"), ("synthetic/part1", "original"), ("input", "target")])
def test_all_versions_of_a_hazy_scene_are_in_one_split(tmp_path, degraded, clean):
    root = tmp_path / "SOTS"
    haze(root / "outdoor", degraded, clean)
    found = load_photographs(str(root))
    cleans = [{image[0, 0, 0].item() for _, image in kinds["haze"]} for kinds in found.pairs.values()]
    assert sum(map(len, cleans)) == len(set.union(*cleans)) == 4
    assert all(len(kinds["haze"]) == 2 * len(seen) for kinds, seen in zip(found.pairs.values(), cleans, strict=True))


def test_one_folder_with_sets_for_all_three_tasks(tmp_path):
    rain(tmp_path / "derain")
    haze(tmp_path / "SOTS")
    for number in range(4):
        put(tmp_path / "BSD68" / f"test{number:03d}.png", 30 + number)
    config = TrainConfig(
        task="restoration", data=str(tmp_path), train_examples=6, test_examples=6, size=8, model="promptir-4"
    )
    task = make_task(config)
    assert "haze and rain as published" in task.facts["data"]
    batch = task.train.__getitems__(range(6))
    darker = (255 * (batch.targets - batch.inputs)).mean((1, 2, 3))
    assert darker[[1, 4]].tolist() == pytest.approx([40, 40], abs=2)  # JPEG
    assert darker[[2, 5]].tolist() == pytest.approx([20, 20], abs=1e-3)
    assert batch.inputs[0].std() > 0.02  # noise is made
    again = task.held_out["test"].__getitems__([1]).inputs
    assert torch.equal(again, task.held_out["test"].__getitems__([1]).inputs)


def test_turned_pairs_stay_pairs():
    clean = np.random.default_rng(0).integers(0, 200, (12, 14, 3)).astype(np.uint8)
    patches = Patches([clean], 30, 8, draw_anew=True, pairs={kind: [(clean + 9, clean)] for kind in ("rain", "haze")})
    batch = patches.__getitems__([index for index in range(30) if index % 3])
    torch.testing.assert_close(255 * (batch.inputs - batch.targets), torch.full_like(batch.inputs, 9.0))


def test_published_splits_are_kept(tmp_path):
    rain(tmp_path / "train" / "Derain", count=5)
    rain(tmp_path / "test" / "derain", "input/{:d}.png", "target/{:d}.png", count=2)
    found = load_photographs(str(tmp_path))
    assert [len(found.pairs[split]["rain"]) for split in ("train", "validation", "test")] == [4, 1, 2]


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ("derain/gt/norain-002.png", r"rain-002\.png lacks its clean image"),
        ("derain/rainy/rain-003.png", r"norain-003\.png lacks its degraded image"),
        ("SOTS/gt/0002.png", r"0002_0\.8_0\.2\.jpg lacks its clean image"),
    ],
)
def test_the_file_that_lacks_its_partner_is_named(tmp_path, lost, message):
    rain(tmp_path / "derain")
    haze(tmp_path / "SOTS")
    (tmp_path / lost).unlink()
    with pytest.raises(UsageError, match=message):
        load_photographs(str(tmp_path))


def test_other_ways_in_which_pairs_are_none(tmp_path):
    rain(tmp_path / "a")
    put(tmp_path / "a/gt/norain-002.png", 1, size=(18, 22))
    with pytest.raises(UsageError, match=r"rain-002\.png must have the size of .*norain-002\.png, got 20 x 18"):
        load_photographs(str(tmp_path))
    put(tmp_path / "b/hazy/0001_1_1.png", 1)
    with pytest.raises(UsageError, match="lacks its clean image: there must be a folder named gt"):
        load_photographs(str(tmp_path / "b"))
    rain(tmp_path / "c", count=2)
    for number in range(3):
        put(tmp_path / "c" / f"{number}.png", number)
    with pytest.raises(UsageError, match="no pair with rain for"):
        load_photographs(str(tmp_path / "c"))


def test_a_folder_of_photographs_has_no_pairs(tmp_path):
    for number in range(3):
        put(tmp_path / "target" / f"{number}.png", number)
    scenes = find_scenes(tmp_path, tmp_path.rglob("*.png"))
    assert [scene.degraded for scene in scenes] == [(), (), ()]
