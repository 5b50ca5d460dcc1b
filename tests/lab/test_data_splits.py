import datasets
import pytest
import torch
from PIL import Image

from weightsmith.core.errors import UsageError
from weightsmith.lab.data.image_sets import load_images
from weightsmith.lab.data.labels import parts_of
from weightsmith.lab.data.text_sets import load_questions, load_sentences, load_text, same_answer
from weightsmith.lab.data.tokens import Words

pytestmark = pytest.mark.usefixtures("own_caches")


def picture(path, value=0, mode="RGB", size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, value).save(path)


def pixels(images, split="train"):
    part = getattr(images, split)
    return sorted(part.read(part.rows, None)[:, 0, 0, 0].tolist())


# labels and splits ----------------------------------------------------------------------------------------------------


def test_a_rare_class_is_in_training_when_the_test_rows_are_taken_from_it():
    labels = ["c" if row in (3, 4) else "ab"[row % 2] for row in range(40)]
    train, test, classes = parts_of("data", {"train": labels})
    assert classes == ("a", "b", "c")
    assert train.labels.bincount(minlength=3).min() > 0
    assert test.labels.bincount(minlength=3).tolist() == [4, 4, 0]
    assert sorted([*train.rows.tolist(), *test.rows.tolist()]) == list(range(40))


def test_numbers_of_classes_may_start_anywhere_and_be_floats_or_truth_values():
    assert parts_of("data", {"train": [1, 2, 1, 2], "test": [2, 1]})[0].labels.tolist() == [0, 1, 0, 1]
    assert parts_of("data", {"train": [1.0, 2.0], "test": [2.0]})[2] == ("1", "2")
    assert parts_of("data", {"train": [True, False], "test": [True]})[1].labels.tolist() == [1]


def test_labels_that_are_withheld_make_the_validation_rows_the_test_rows():
    _, test, _ = parts_of("data", {"train": [0, 1, 0], "validation": [1, 1], "test": [-1, -1]})
    assert (test.split, test.labels.tolist()) == ("validation", [1, 1])


@pytest.mark.parametrize(
    ("labels", "names", "message"),
    [
        ({"train": ["a", None, ""]}, None, "2 rows without a label"),
        ({"train": [0, 1, -1]}, ["cat", "dog"], "1 rows without a label"),
        ({"train": [0.25, 0.5]}, None, r"numbers such as 0\.25, not classes"),
        ({"train": [[1], [2]]}, None, "labels must be strings or numbers, got list"),
        ({"train": ["a", "a"]}, None, r"one class only \(a\)"),
        ({"train": [0, 1], "test": [2]}, ["cat", "dog", "cow"], "training does not have: cow"),
        ({"train": ["a", "b"]}, None, "too few to hold some out"),
    ],
)
def test_labels_that_make_no_classes_are_named(labels, names, message):
    with pytest.raises(UsageError, match=message):
        parts_of("data", labels, names)


# images ---------------------------------------------------------------------------------------------------------------


def test_the_class_is_the_first_folder_however_deep_an_image_lies(tmp_path):
    for label in ("cat", "dog"):
        for row, place in enumerate(("a", "b/c", ".")):
            picture(tmp_path / "pets" / "train" / label / place / f"{row}.png")
    picture(tmp_path / "pets" / "train" / ".ipynb_checkpoints" / "0.png")
    picture(tmp_path / "pets" / "train" / "__MACOSX" / "0.png")
    (tmp_path / "pets" / "train" / "cat" / "Thumbs.db").write_bytes(b"x")
    (tmp_path / "pets" / "README.txt").write_text("pets")
    images = load_images(str(tmp_path / "pets"))
    assert images.class_names == ("cat", "dog")
    assert sum(len(part) for part in (images.train, images.validation, images.test)) == 6


def test_classes_without_splits_give_up_test_rows_and_may_be_named_like_one(tmp_path):
    for label in ("train", "plane"):
        for row in range(10):
            picture(tmp_path / "vehicles" / label / f"{row}.png")
    images = load_images(str(tmp_path / "vehicles"))
    assert images.class_names == ("plane", "train")
    assert images.test.labels.tolist().count(0) == images.test.labels.tolist().count(1) == 2


def test_folders_that_make_no_classes_are_named(tmp_path):
    (tmp_path / "pets" / "train" / "cow").mkdir(parents=True)
    picture(tmp_path / "pets" / "train" / "cat" / "0.png")
    with pytest.raises(UsageError, match="cow holds no images"):
        load_images(str(tmp_path / "pets"))
    picture(tmp_path / "flat" / "train" / "0.png")
    with pytest.raises(UsageError, match="needs a folder per class"):
        load_images(str(tmp_path / "flat"))
    picture(tmp_path / "tests" / "test" / "cat" / "0.png")
    with pytest.raises(UsageError, match="no folder 'train', only test"):
        load_images(str(tmp_path / "tests"))
    for label in ("cat", "dog"):
        picture(tmp_path / "more" / "train" / label / "0.png")
    picture(tmp_path / "more" / "test" / "cow" / "0.png")
    with pytest.raises(UsageError, match="training does not have: cow"):
        load_images(str(tmp_path / "more"))


def test_an_image_that_changes_is_read_again_and_makes_other_data(tmp_path):
    for row in range(10):
        picture(tmp_path / f"{row}.png", (row, 0, 0))
    lines = [f"{row}.png,{'ab'[row % 2]}\n" for row in range(10)]
    (tmp_path / "list.csv").write_text("path,label\n" + "".join(lines))
    before = load_images(str(tmp_path / "list.csv"))
    for row in range(10):
        picture(tmp_path / f"{row}.png", (200, 0, 0))
    after = load_images(str(tmp_path / "list.csv"))
    assert set(pixels(after)) == {200}
    assert before.fingerprint != after.fingerprint


@pytest.mark.parametrize("bytes_in_memory", [0, 2**30])
def test_an_image_in_another_class_makes_other_data(tmp_path, monkeypatch, bytes_in_memory):
    monkeypatch.setattr("weightsmith.lab.data.image_sets.IN_MEMORY_BYTES", bytes_in_memory)
    for label, rows in (("cat", range(3)), ("dog", range(3, 6))):
        for row in rows:
            picture(tmp_path / "pets" / "train" / label / f"{row}.png", (row, 0, 0))
    before = load_images(str(tmp_path / "pets"))
    assert load_images(str(tmp_path / "pets")).fingerprint == before.fingerprint
    (tmp_path / "pets" / "train" / "cat" / "2.png").rename(tmp_path / "pets" / "train" / "dog" / "2.png")
    assert load_images(str(tmp_path / "pets")).fingerprint != before.fingerprint


def test_one_color_image_among_gray_ones_makes_all_of_them_color(tmp_path):
    for label in ("cat", "dog"):
        for row in range(20):
            picture(tmp_path / "pets" / "train" / label / f"{row:02}.png", 9, "L")
    picture(tmp_path / "pets" / "train" / "dog" / "19.png", (9, 9, 200))
    assert load_images(str(tmp_path / "pets"), test_examples=1).channels == 3


def test_gray_levels_of_16_bits_are_scaled_and_not_cut(tmp_path):
    for row, label in enumerate("aabb" * 3):
        picture(tmp_path / "xray" / "train" / label / f"{row}.png", 256 * 10 * row, "I;16")
    images = load_images(str(tmp_path / "xray"), validation_fraction=0)
    assert images.channels == 1
    assert set(pixels(images)) <= {10 * row for row in range(12)}
    assert len(set(pixels(images))) > 5


def test_a_broken_image_that_is_read_late_is_named_too(tmp_path, monkeypatch):
    monkeypatch.setattr("weightsmith.lab.data.image_sets.IN_MEMORY_BYTES", 0)
    monkeypatch.setattr("weightsmith.lab.data.image_sets._LOOKED_AT", 1)
    monkeypatch.setattr("weightsmith.lab.data.image_sets._SAMPLE", 1)
    for label in ("cat", "dog"):
        for row in range(6):
            picture(tmp_path / "pets" / "train" / label / f"{row}.png")
    broken = tmp_path / "pets" / "train" / "dog" / "5.png"
    broken.write_bytes(broken.read_bytes()[:45])
    images = load_images(str(tmp_path / "pets"), validation_fraction=0)
    with pytest.raises(UsageError, match=r"dog/5\.png is not an image"):
        for part in (images.train, images.test):
            part.__getitems__(list(range(len(part))))


# texts ----------------------------------------------------------------------------------------------------------------


def test_a_text_file_is_read_as_it_is_written(tmp_path):
    text = "one\ntwo\n\nthree\n"
    (tmp_path / "book.txt").write_text(text)
    assert "".join(load_text(str(tmp_path / "book.txt")).values()) == text
    (tmp_path / "books").mkdir()
    for split in ("train", "test"):
        (tmp_path / "books" / f"wiki.{split}.txt").write_text(f"{split}\nmore\n")
    assert load_text(str(tmp_path / "books")) == {"train": "train\nmore\n", "test": "test\nmore\n"}


def test_latin_1_is_named_with_what_to_do(tmp_path):
    for name in ("old.csv", "old.txt"):
        (tmp_path / name).write_bytes("text,label\ncafé,a\n".encode("latin-1") * 3)
        with pytest.raises(UsageError, match="convert it to UTF-8, for example with iconv"):
            load_text(str(tmp_path / name))


def test_the_words_none_null_and_na_are_classes_as_others_are(tmp_path):
    rows = [f"text {row},{['null', 'NA', 'None'][row % 3]}\n" for row in range(30)]
    (tmp_path / "odd.csv").write_text("text,label\n" + "".join(rows))
    assert load_sentences(str(tmp_path / "odd.csv")).classes == ("NA", "None", "null")


def test_pairs_of_texts_are_read_together(tmp_path):
    rows = [f"{row},first {row},second {row},{row % 2}\n" for row in range(20)]
    (tmp_path / "pairs.csv").write_text("id,premise,hypothesis,label\n" + "".join(rows))
    assert "first 2\nsecond 2" in load_sentences(str(tmp_path / "pairs.csv")).train
    found = load_sentences(str(tmp_path / "pairs.csv"), columns=("id", "hypothesis", "label"))
    assert "2\nsecond 2" in found.train


def test_what_save_to_disk_leaves_is_read(tmp_path):
    table = datasets.Dataset.from_dict({"text": ["a", "b"] * 5, "label": [0, 1] * 5})
    datasets.DatasetDict({"train": table, "test": table.select(range(2))}).save_to_disk(tmp_path / "saved")
    assert len(load_sentences(str(tmp_path / "saved")).test) == 2


def test_a_file_that_is_not_there_is_no_hub_id():
    with pytest.raises(UsageError, match=r"there is no file 'mine/reviews\.csv'"):
        load_text("mine/reviews.csv")


def test_worked_sums_are_never_trained_on_and_tested(monkeypatch):
    train, test = load_questions("arithmetic", "train", 80_000), load_questions("arithmetic", "test", 80_000)
    assert not set(train) & set(test)
    assert len(train) + len(test) == 98 * 98 * 8


@pytest.mark.parametrize(
    ("given", "wanted", "right"),
    [
        ("it is 4", "2 + 2 = 4\n#### 4", True),
        ("it is 5", "#### 4", False),
        ("Rome", "Paris", False),
        (" paris", "Paris", True),
        ("nothing", "#### 4", False),
    ],
)
def test_answers_are_compared_by_their_number_or_their_text(given, wanted, right):
    assert same_answer(given, wanted) is right


def test_words_have_the_same_number_everywhere():
    words = Words()
    first, second = words(["Good, good!", ""])["input_ids"]
    assert first[0] == first[2] == words("GOOD")["input_ids"][0]
    assert second == []
    assert all(0 <= number < words.pad_token_id for number in first)
    assert torch.tensor(first).tolist() == [3730, 878, 3730, 8147]  # the same in every process
