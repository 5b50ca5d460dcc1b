"""Photographs, what happens to them, and the task that restores them."""

from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from weightsmith.core.errors import UsageError
from weightsmith.lab.data.degradations import (
    DEGRADATIONS,
    add_haze,
    add_noise,
    add_rain,
    degrade,
)
from weightsmith.lab.data.photographs import Patches, load_photographs
from weightsmith.lab.tasks import TrainConfig, make_task
from weightsmith.lab.tasks.restoration import psnr

pytest.importorskip("skimage")
GOLDEN = load_file(Path(__file__).parents[1] / "golden/mir-l.safetensors")
CONFIG = TrainConfig(task="restoration", train_examples=12, test_examples=6, size=16, model="promptir-4")


def test_noise_is_that_of_the_authors_code():
    generator = np.random.RandomState(7)
    clean = generator.randint(0, 256, (12, 10, 3)).astype(np.uint8)
    assert np.array_equal(clean, GOLDEN["noise25.clean"].numpy())
    noisy = add_noise(clean, 25, generator.randn(*clean.shape))
    assert np.array_equal(noisy, GOLDEN["noise25.noisy"].numpy())


def test_quality_is_that_of_the_authors_code():
    found = psnr(GOLDEN["met32.restored"].clamp(0, 1), GOLDEN["met32.clean"].clamp(0, 1)).mean().item()
    assert found == pytest.approx(GOLDEN["met32.psnr_ssim"][0].item(), abs=1e-4)


def test_haze_lightens_and_rain_adds_streaks():
    image = np.full((40, 40, 3), 60, np.uint8)
    generator = np.random.default_rng(0)
    hazy, rainy = add_haze(image, generator), add_rain(image, generator)
    assert hazy.mean() > image.mean()
    assert hazy[0].mean() > hazy[-1].mean()  # farther at the top
    assert 0.02 < (rainy > image).mean() < 0.2
    for kind in DEGRADATIONS:
        first, second = (degrade(image, kind, np.random.default_rng(3)) for _ in range(2))
        assert np.array_equal(first, second)


def test_no_photograph_is_in_two_splits_and_patches_follow_from_their_index():
    found = load_photographs("photographs")
    assert all(split for split in (found.train, found.validation, found.test))
    patches = Patches(found.test, 9, 24, draw_anew=False)
    whole, some = patches.__getitems__(range(9)), patches.__getitems__([4])
    assert torch.equal(whole.inputs[4], some.inputs[0])
    assert whole.inputs.shape == whole.targets.shape == (9, 3, 24, 24)
    train = Patches(found.train, 9, 24, draw_anew=True)
    first = train.__getitems__([0]).targets
    train.seed = 1
    assert not torch.equal(first, train.__getitems__([0]).targets)


def test_the_task_trains_and_is_measured_by_degradation():
    task = make_task(CONFIG)
    model = CONFIG.network(task, 0)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    CONFIG.fit(model, optimizer, task, 0, steps=2, batch_size=4)
    found = task.evaluate(model, "test")
    assert {f"{name}_{kind}" for name in ("psnr", "gain") for kind in DEGRADATIONS} <= found.metrics.keys()
    assert task.evaluate(torch.nn.Identity(), "test").metrics["gain"] == pytest.approx(0, abs=1e-6)
    assert found.scores["psnr"].shape == (6,)


def test_a_folder_of_photographs(tmp_path):
    from PIL import Image

    for number in range(5):
        Image.fromarray(np.full((20, 30), 40 * number, np.uint8)).save(tmp_path / f"{number}.png")
    found = load_photographs(str(tmp_path))
    assert [len(split) for split in (found.train, found.validation, found.test)] == [3, 1, 1]
    assert found.train[0].shape == (20, 30, 3)
    with pytest.raises(UsageError, match="size must be at most"):
        Patches(found.train, 3, 25, draw_anew=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [({"model": "promptir-3"}, "model must be promptir"), ({"model": "unet"}, "model must be promptir"),
     ({"data": "nowhere"}, "nowhere")],
)  # fmt: skip
def test_bad_use(changes, message):
    with pytest.raises(UsageError, match=message):
        make_task(TrainConfig(**({"task": "restoration"} | changes)))
