import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from weightsmith.core.errors import UsageError
from weightsmith.quantize import Grid, flexround_, quantized_weights, round_to_nearest_
from weightsmith.quantize.after_training.calibration import make_batches

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


def test_a_data_loader_gives_lists_whose_first_item_is_taken():
    images = torch.randn(70, 1, 4, 4)
    loader = DataLoader(TensorDataset(images, torch.zeros(70)), batch_size=7)
    assert sizes(loader) == [32, 32, 6]
    assert torch.equal(make_batches(loader, 70, CPU)[0].inputs["input"], images)


def test_numpy_arrays_are_taken_as_tensors_are():
    images = np.random.default_rng(0).normal(size=(40, 1, 4, 4))
    assert sizes(images) == sizes(list(images.reshape(8, 5, 1, 4, 4))) == [32, 8]
    assert sizes(np.ones((5, 6), dtype=np.int64)) == [2, 2, 1]
    (batch,) = make_batches(images, 40, CPU, torch.float32)
    assert torch.equal(batch.inputs["input"], torch.from_numpy(images).float())
    rows = np.random.default_rng(0).normal(size=(40, 8))
    report = flexround_(nn.Sequential(nn.Linear(8, 4)), rows, Grid(3), blocks="layers", iterations=2)
    assert report.blocks[0].error is not None


def test_a_number_of_bits_is_a_grid():
    model = nn.Sequential(nn.Linear(8, 4), nn.Linear(4, 4))
    flexround_(model, torch.randn(8, 8), 4, blocks="layers", iterations=1, overrides={"1": 8})
    assert [found.bits for found in quantized_weights(model).values()] == [4, 8]
    assert round_to_nearest_(nn.Sequential(nn.Linear(8, 4)), grid=3).grid == Grid(3)
    for wrong in ("4", 4.0, True):
        with pytest.raises(TypeError, match="grid must be a Grid or a number of bits"):
            round_to_nearest_(nn.Sequential(nn.Linear(8, 4)), grid=wrong)


@pytest.mark.parametrize("wrong", [Grid(3), 4, "text.jsonl", nn.Linear(2, 2), None])
def test_other_arguments_in_the_place_of_calibration_are_named(wrong):
    with pytest.raises(TypeError, match="the order of arguments is model, calibration, grid"):
        flexround_(nn.Sequential(nn.Linear(8, 4)), wrong, blocks="layers")


@pytest.mark.parametrize(
    ("calibration", "message"),
    [
        (["some text", "and more"], "must be a tensor, an array or numbers, got str: tokenize"),
        ([{"input_ids": [1, 2], "text": "some"}], "calibration input 'text' must be"),
        ([1, 2, 3], "got the number 1"),
    ],
)
def test_what_is_no_tensor_is_named(calibration, message):
    with pytest.raises(TypeError, match=message):
        make_batches(calibration, None, CPU)


def test_sequences_of_unequal_length_are_padded_and_masked():
    (batch,) = make_batches([torch.tensor([1, 2, 3]), torch.tensor([4])], 2, CPU)
    assert batch.inputs["input_ids"].tolist() == [[1, 2, 3], [4, 0, 0]]
    assert batch.mask.tolist() == [[1, 1, 1], [1, 0, 0]]
    assert batch.head(1).mask.tolist() == [[1, 1, 1]]


def test_inputs_of_two_lengths_need_no_mask_while_each_has_one_length():
    samples = [{"input_ids": torch.arange(5), "decoder_input_ids": torch.arange(3)} for _ in range(2)]
    (batch,) = make_batches(samples, 2, CPU)
    assert list(batch.inputs) == ["input_ids", "decoder_input_ids"]
    assert batch.mask is None


def test_the_mask_of_padding_is_that_of_the_encoder_whatever_comes_first():
    samples = [{"decoder_input_ids": torch.arange(3), "input_ids": torch.arange(size)} for size in (4, 5)]
    (batch,) = make_batches(samples, 2, CPU)
    assert batch.mask.tolist() == [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]


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
        ([{"a": torch.ones(2, 3), "b": torch.ones(3, 3)}], "as many samples each"),
    ],
)
def test_data_that_cannot_serve_is_refused(calibration, message):
    with pytest.raises(UsageError, match=message):
        make_batches(calibration, None, CPU)


def test_a_batch_size_below_one_is_refused():
    with pytest.raises(UsageError, match="batch_size must be at least 1, got 0"):
        make_batches(torch.randn(4, 2), 0, CPU)
