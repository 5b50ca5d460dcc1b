import sys

import datasets
import huggingface_hub
import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from weightsmith.core.errors import MissingExtra, UsageError
from weightsmith.lab.data import image_sets as data_module
from weightsmith.lab.data.image_sets import load_images
from weightsmith.lab.data.images import crop_and_flip

pytestmark = pytest.mark.usefixtures("own_caches")


def write(folder, **splits):
    """Write splits, each a list of (image, label), in the hub's parquet layout of CIFAR-100."""
    features = datasets.Features(
        {
            "img": datasets.Image(),
            "fine_label": datasets.ClassLabel(names=["cat", "dog"]),
            "note": datasets.Value("string"),
        }
    )
    folder.mkdir(parents=True)
    for split, examples in splits.items():
        columns = {
            "img": [image for image, _ in examples],
            "fine_label": [label for _, label in examples],
            "note": ["-"] * len(examples),
        }
        table = datasets.Dataset.from_dict(columns, features=features)
        table.to_parquet(folder / f"{split}.parquet")
    return folder.parent


def plain(count, *, size=(8, 8), start=0):
    """Images whose every pixel tells their row."""
    return [(Image.new("RGB", size, (row, 0, 255 - row)), row % 2) for row in range(start, start + count)]


def rows_of(split):
    x = split.read(split.rows, None)
    return x[:, 0, 0, 0].tolist()


def test_digits_need_neither_folder_nor_network():
    digits = load_images("digits")
    assert (digits.channels, digits.size, digits.classes) == (1, 8, 10)
    assert len(digits.train) + len(digits.validation) + len(digits.test) == 1797
    batch = digits.train.__getitems__([0, 1])
    assert (batch.inputs.shape, batch.inputs.dtype) == ((2, 1, 8, 8), torch.float32)
    assert (batch.targets.dtype, batch.indices.tolist()) == (torch.int64, [0, 1])


def test_digits_can_be_resized_and_shortened():
    digits = load_images("digits", size=12, train_examples=50, test_examples=7)
    assert digits.train.__getitems__([0]).inputs.shape == (1, 1, 12, 12)
    assert (len(digits.train), len(digits.validation), len(digits.test)) == (40, 10, 7)


def test_splits_are_the_same_at_every_load():
    first, second = load_images("digits"), load_images("digits")
    for split in ("train", "validation", "test"):
        assert torch.equal(getattr(first, split).labels, getattr(second, split).labels)
        assert torch.equal(getattr(first, split).rows, getattr(second, split).rows)


def test_train_and_validation_share_a_seeded_stratified_subset(tmp_path):
    # sorted by class: the first rows would hold one class only
    rows = [(Image.new("RGB", (8, 8), (row, 0, 0)), int(row >= 20)) for row in range(30)]
    root = write(tmp_path / "tiny", train=rows, test=rows)
    tiny, again = (load_images("tiny", data_dir=root, train_examples=15, test_examples=6) for _ in range(2))
    chosen = rows_of(tiny.train) + rows_of(tiny.validation)
    assert len(set(chosen)) == 15
    assert chosen == rows_of(again.train) + rows_of(again.validation)
    assert sum(row >= 20 for row in chosen) == 5
    assert tiny.validation.labels.bincount().tolist() == [2, 1]
    assert tiny.test.labels.bincount().tolist() == [4, 2]


def test_a_validation_fraction_of_zero_leaves_all_to_training():
    digits = load_images("digits", validation_fraction=0)
    assert len(digits.validation) == 0
    assert digits.validation.__getitems__([]).inputs.shape == (0, 1, 8, 8)


def test_train_pixels_are_normalized_per_channel(tmp_path):
    root = write(tmp_path / "tiny", train=plain(30), test=plain(10))
    tiny = load_images("tiny", data_dir=root)
    x = tiny.train.__getitems__(range(len(tiny.train))).inputs
    assert torch.allclose(x.mean((0, 2, 3))[[0, 2]], torch.zeros(2), atol=1e-5)
    assert torch.allclose(x.std((0, 2, 3), correction=0)[[0, 2]], torch.ones(2), atol=1e-5)
    assert x.isfinite().all()  # the middle channel is constant


@pytest.mark.parametrize("name", ["cifar100", "someone/tiny-set"])
def test_a_folder_named_as_the_data_set_stands_for_the_hub(tmp_path, monkeypatch, name):
    root = write(tmp_path / "root" / name.split("/")[-1], train=plain(10), test=plain(4))
    monkeypatch.setenv("WEIGHTSMITH_DATA", str(root))
    images = load_images(name)
    assert images.class_names == ("cat", "dog")
    assert images.test.labels.tolist() == [0, 1, 0, 1]


def test_a_folder_of_image_files_is_read_too(tmp_path):
    for split in ("train", "test"):
        for label in ("cat", "dog"):
            folder = tmp_path / "pets" / split / label
            folder.mkdir(parents=True)
            for row in range(5):
                Image.new("L", (8, 8), 20 * row).save(folder / f"{row}.png")
    pets = load_images(str(tmp_path / "pets"))
    assert (pets.channels, pets.size, pets.class_names) == (1, 8, ("cat", "dog"))
    assert pets.test.labels.tolist() == [0] * 5 + [1] * 5


def test_images_that_differ_in_size_become_squares_of_one_size(tmp_path):
    root = write(tmp_path / "tiny", train=plain(4, size=(8, 8)) + plain(4, size=(20, 10)), test=plain(2))
    assert load_images("tiny", data_dir=root).size == 224
    assert load_images("tiny", data_dir=root, size=6).train.__getitems__([0]).inputs.shape == (1, 3, 6, 6)


def test_withheld_test_labels_make_the_validation_split_the_test_split(tmp_path):
    withheld = [(image, -1) for image, _ in plain(3)]
    root = write(tmp_path / "tiny", train=plain(10), validation=plain(4, start=50), test=withheld)
    assert rows_of(load_images("tiny", data_dir=root).test) == [50, 51, 52, 53]


def test_without_a_test_split_a_fifth_of_train_is_held_out(tmp_path):
    root = write(tmp_path / "tiny", train=plain(20))
    tiny = load_images("tiny", data_dir=root)
    assert (len(tiny.train), len(tiny.validation), len(tiny.test)) == (13, 3, 4)
    assert sorted(rows_of(tiny.train) + rows_of(tiny.validation) + rows_of(tiny.test)) == list(range(20))


def test_images_are_decoded_once(tmp_path, monkeypatch):
    root = write(tmp_path / "tiny", train=plain(10), test=plain(4))
    first = load_images("tiny", data_dir=root)
    monkeypatch.setattr(data_module, "to_square", None)
    second = load_images("tiny", data_dir=root)
    assert torch.equal(first.train.__getitems__([0]).inputs, second.train.__getitems__([0]).inputs)


def test_a_broken_or_unwritable_cache_does_no_harm(tmp_path, monkeypatch):
    root = write(tmp_path / "tiny", train=plain(10), test=plain(4))
    load_images("tiny", data_dir=root)
    for file in (tmp_path / "decoded").iterdir():
        file.write_bytes(file.read_bytes()[:100])
    assert rows_of(load_images("tiny", data_dir=root).test) == [0, 1, 2, 3]
    monkeypatch.setenv("WEIGHTSMITH_CACHE", "/dev/null/nowhere")
    assert rows_of(load_images("tiny", data_dir=root).test) == [0, 1, 2, 3]


def test_large_data_is_decoded_on_the_way(tmp_path, monkeypatch):
    monkeypatch.setattr(data_module, "IN_MEMORY_BYTES", 0)
    root = write(tmp_path / "large", train=plain(20, size=(60, 40)), test=plain(4, size=(40, 60)))
    large = load_images("large", data_dir=root, size=16, augment=True)
    batch = large.train.__getitems__([5, 2])
    assert large.train.slow
    assert batch.inputs.shape == (2, 3, 16, 16)
    assert batch.targets.tolist() == large.train.labels[[5, 2]].tolist()
    assert rows_of(large.test) == [0, 1, 2, 3]


def noisy(count):
    noise = np.random.default_rng(0).integers(0, 256, (count, 40, 40, 3), dtype=np.uint8)
    return [(Image.fromarray(pixels), row % 2) for row, pixels in enumerate(noise)]


@pytest.mark.parametrize("bytes_in_memory", [0, 2**30])
def test_augmentation_follows_from_the_seed_alone(tmp_path, monkeypatch, bytes_in_memory):
    monkeypatch.setattr(data_module, "IN_MEMORY_BYTES", bytes_in_memory)
    root = write(tmp_path / "noise", train=noisy(10), test=noisy(2))
    train = load_images("noise", data_dir=root, augment=True, size=16).train
    batches = [[0, 1, 2, 3], [4, 5, 6, 7]]

    def epoch(seed, workers):
        train.seed = seed
        loader = DataLoader(train, batch_sampler=batches, collate_fn=lambda batch: batch.inputs, num_workers=workers)
        return torch.stack(list(loader))

    once = epoch(seed=7, workers=0)
    assert torch.equal(once, epoch(seed=7, workers=2))
    assert not torch.equal(once, epoch(seed=8, workers=0))
    train.augment = False
    assert not torch.equal(once, epoch(seed=7, workers=0))


def test_crop_and_flip_only_shifts_and_mirrors():
    x = torch.randint(1, 256, (40, 2, 6, 6), dtype=torch.uint8)
    augmented = crop_and_flip(x, torch.Generator().manual_seed(0), padding=2)
    padded = torch.nn.functional.pad(x, (2,) * 4)
    seen = set()
    for image, result in zip(padded, augmented, strict=True):
        views = {
            (top, left, mirrored): (window.flip(-1) if mirrored else window)
            for top in range(5)
            for left in range(5)
            for mirrored in (False, True)
            for window in [image[:, top : top + 6, left : left + 6]]
        }
        seen |= {key for key, view in views.items() if torch.equal(view, result)}
    assert len(seen) > 20
    assert {mirrored for *_, mirrored in seen} == {False, True}


def test_an_unknown_name_lists_near_ones():
    with pytest.raises(UsageError, match=r"data 'minst' is not known: did you mean 'mnist'"):
        load_images("minst")


def test_a_missing_data_folder_is_named(tmp_path, monkeypatch):
    with pytest.raises(UsageError, match=r"data_dir must be a folder, got .*nowhere"):
        load_images("mnist", data_dir=tmp_path / "nowhere")
    monkeypatch.setenv("WEIGHTSMITH_DATA", str(tmp_path / "nowhere"))
    with pytest.raises(UsageError, match=r"WEIGHTSMITH_DATA must be a folder, got .*nowhere"):
        load_images("mnist")


def test_a_path_that_does_not_exist_is_no_hub_id(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(
        UsageError, match=r"the hub shows no dataset '/no/such/folder': correct the name, give an existing"
    ):
        load_images("/no/such/folder")


@pytest.mark.parametrize("argument", [{"validation_fraction": 1.0}, {"train_examples": 0}, {"size": -1}])
def test_arguments_out_of_range_are_named(argument):
    with pytest.raises(UsageError, match=next(iter(argument))):
        load_images("digits", **argument)


def test_without_network_the_error_says_what_to_do(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    with pytest.raises(UsageError, match=r"'ylecun/mnist'.*WEIGHTSMITH_DATA.*mnist/train\.parquet.*--data digits"):
        load_images("mnist")
    with pytest.raises(UsageError, match=r"'someone/pets'.*WEIGHTSMITH_DATA.*pets/train\.parquet"):
        load_images("someone/pets")


def test_a_hub_that_answers_is_asked_for_the_data_set(tmp_path, monkeypatch):
    root = write(tmp_path / "tiny", train=plain(10), test=plain(4))
    load, asked = datasets.load_dataset, []
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub.HfApi, "repo_info", lambda self, hub_id, **_: asked.append(hub_id))
    monkeypatch.setattr(datasets, "load_dataset", lambda path: asked.append(path) or load(str(root / "tiny")))
    assert load_images("cifar100").classes == 2
    assert set(asked) == {"uoft-cs/cifar100"}


def test_offline_mode_looks_into_the_cache_only(monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(UsageError, match="'uoft-cs/cifar10' is unavailable from the hub"):
        load_images("cifar10")


def test_a_missing_extra_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(
        MissingExtra, match=r"datasets is needed for the data set 'mnist': pip install .weightsmith\[hf\]"
    ):
        load_images("mnist")


def test_columns_that_are_not_understood_are_shown(tmp_path):
    (tmp_path / "odd").mkdir()
    datasets.Dataset.from_dict({"text": ["a"]}).to_parquet(tmp_path / "odd" / "train.parquet")
    with pytest.raises(UsageError, match=r"no column for images.*text"):
        load_images("odd", data_dir=tmp_path)


def test_an_empty_folder_is_named(tmp_path):
    (tmp_path / "void").mkdir()
    with pytest.raises(UsageError, match=r"data 'void': the folder is empty"):
        load_images("void", data_dir=tmp_path)


def test_a_set_without_train_split_is_an_error(tmp_path):
    root = write(tmp_path / "tiny", test=plain(3))
    with pytest.raises(UsageError, match="no split named 'train', only 'test'"):
        load_images("tiny", data_dir=root)
