import pytest
import torch

from weightsmith.core.errors import UsageError
from weightsmith.quantize.calibration import make_batches

CPU = torch.device("cpu")


def sizes(calibration, batch_size=None):
    return [len(next(iter(batch.inputs.values()))) for batch in make_batches(calibration, batch_size, CPU)]


def test_samples_are_regrouped_whatever_form_they_come_in():
    images = torch.randn(70, 1, 4, 4)
    assert sizes(images) == [32, 32, 6]
    assert sizes(images.split(7), 35) == [35, 35]
    assert sizes([(part, None) for part in images.split(7)], 70) == [70]
    assert sizes(({"pixel_values": part, "labels": torch.zeros(7)} for part in images.split(7)), 70) == [70]
    assert sizes(torch.randint(9, (5, 6))) == [2, 2, 1]
    assert sizes([[1, 2, 3], [4, 5, 6]]) == [2]


def test_sequences_of_unequal_length_are_padded_and_masked():
    (batch,) = make_batches([torch.tensor([1, 2, 3]), torch.tensor([4])], 2, CPU)
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.head(1).mask.tolist() == [[1, 1, 1]]


def test_a_given_mask_is_kept():
    tokens = {"input_ids": torch.ones(2, 3, dtype=torch.long), "attention_mask": torch.tensor([[1, 1, 1], [1, 1, 0]])}
    (batch,) = make_batches([tokens], None, CPU)
    assert batch.mask.tolist() == [[1, 1, 1], [1, 1, 0]]
    assert list(batch.inputs) == ["input_ids", "attention_mask"]


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        ([], "at least 2 samples, got 0"),
        (torch.randn(1, 4), "at least 2 samples, got 1"),
        (torch.tensor([[1.0], [float("nan")]]), "sample 1 holds NaN or infinity"),
        ([torch.randn(2, 1, 4, 4), torch.randn(2, 1, 5, 5)], "differ in shape"),
        ([{"a": torch.ones(2, 3)}, {"b": torch.ones(2, 3)}], "same inputs"),
    ],
)
def test_data_that_cannot_serve_is_refused(calibration, message):
    with pytest.raises(UsageError, match=message):
        make_batches(calibration, None, CPU)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(UsageError, match="batch_size must be at least 1, got 0"):
        make_batches(torch.randn(4, 2), 0, CPU)
