"""What is lost and gained after every task, for any model."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from weightsmith.continual import ForgettingMeter, prediction_accuracy, transfer
from weightsmith.core.errors import UsageError

SCORES = st.lists(st.lists(st.floats(0, 100), min_size=4, max_size=4), min_size=4, max_size=4)
NAMES = ("a", "b", "c", "d")


def rows_of(matrix):
    return [(name, dict(zip(NAMES, row, strict=True))) for name, row in zip(NAMES, matrix, strict=True)]


@given(SCORES)
@settings(max_examples=50, deadline=None)
def test_measures_are_the_papers_equations(matrix):
    a = torch.tensor(matrix, dtype=torch.float64)
    found = transfer(rows_of(matrix))
    lost = [(a[i:3, i].max() - a[3, i]).item() for i in range(3)]
    assert found.final == pytest.approx(a[3].mean().item())
    assert found.new == pytest.approx(a.diag().mean().item())
    assert found.forgetting == pytest.approx(sum(lost) / 3, abs=1e-9)
    assert found.backward == pytest.approx(((a[3] - a.diag())[:3].mean()).item(), abs=1e-9)
    assert found.forward == pytest.approx(sum(a[i - 1, i].item() for i in range(1, 4)) / 3)
    assert found.over_steps == pytest.approx(sum(a[j, : j + 1].mean().item() for j in range(4)) / 4)
    assert found.forgetting >= -found.backward - 1e-9


@given(SCORES)
@settings(max_examples=25, deadline=None)
def test_a_loss_is_measured_as_its_negative_score(matrix):
    up = transfer(rows_of([[-value for value in row] for row in matrix]))
    down = transfer(rows_of(matrix), better="lower")
    assert (down.final, down.new) == pytest.approx((-up.final, -up.new))
    assert (down.forgetting, down.backward) == pytest.approx((up.forgetting, up.backward))


def test_a_single_task_has_nothing_to_forget():
    found = transfer([("a", {"a": 50.0})])
    assert (found.final, found.new, found.over_steps) == (50, 50, 50)
    assert all(map(math.isnan, (found.forgetting, found.backward, found.forward)))


def test_a_task_that_comes_again_counts_from_its_first_time():
    found = transfer([("a", {"a": 80.0, "b": 0.0}), ("b", {"a": 20.0, "b": 70.0}), ("a", {"a": 85.0, "b": 60.0})])
    assert found.backward == pytest.approx(((85 - 80) + (60 - 70)) / 2)


class Constant(nn.Module):
    """Predicts one class, whatever comes in."""

    def __init__(self, label, classes=3):
        super().__init__()
        self.logits = nn.Parameter(torch.nn.functional.one_hot(torch.tensor(label), classes).float())

    def forward(self, x):
        return self.logits.expand(*x.shape[:1], -1)


SETS = {
    "zeros": [(torch.zeros(4, 2), torch.zeros(4, dtype=torch.long))],
    "ones": [(torch.zeros(2, 2), torch.ones(2, dtype=torch.long))] * 2,
    "mixed": [(torch.zeros(4, 2), torch.tensor([0, 0, 0, 1]))],
}


def test_meter_records_what_models_can_do_and_shows_it(tmp_path):
    meter = ForgettingMeter(SETS)
    meter.start(Constant(2))
    assert meter.record(Constant(0), "zeros") == {"zeros": 100, "ones": 0, "mixed": 75}
    meter.record(Constant(1), "ones")
    assert meter.matrix().tolist() == [[100, 0, 75], [0, 100, 25]]
    report = meter.report()
    assert (report.transfer.final, report.transfer.forgetting, report.transfer.backward) == (50, 100, -100)
    assert str(report).splitlines()[-3:] == [
        "    ones    0.00 (-100.00)  100.00 (+100.00)  25.00 (-50.00)",
        "final 50.00, right after each task 100.00, mean over steps 75.00",
        "forgetting 100.00, backward transfer -100.00",
    ]
    for ending in ("html", "svg", "png", "json"):
        meter.plot(tmp_path / f"map.{ending}")
    assert "zeros" in (tmp_path / "map.svg").read_text()


def test_meter_goes_on_with_its_file(tmp_path):
    file = tmp_path / "forgetting.csv"
    whole = ForgettingMeter(SETS)
    for at, task in enumerate(("zeros", "ones")):
        ForgettingMeter(SETS, path=file).record(Constant(at), task)
        whole.record(Constant(at), task)
    assert ForgettingMeter(SETS, path=file).report() == whole.report()
    assert file.read_text().splitlines() == ["after,zeros,ones,mixed", "zeros,100.0,0.0,75.0", "ones,0.0,100.0,25.0"]


@pytest.mark.parametrize(
    "content", ["", "after,zeros\n", "after,zeros,ones,mixed\nzeros,1\n", "after,zeros,ones,mixed\nzeros,1,2,x\n",
                "after,zeros,ones,mixed\nother,1,2,3\n", 'after,zeros,ones,mixed\n"zeros,1,2,3\n', "\x00"],
)  # fmt: skip
def test_a_damaged_file_is_refused(tmp_path, content):
    (tmp_path / "f.csv").write_text(content)
    with pytest.raises(UsageError, match=r"f\.csv"):
        ForgettingMeter(SETS, path=tmp_path / "f.csv")


def test_bad_arguments_are_refused(tmp_path):
    with pytest.raises(UsageError, match="at least one set"):
        ForgettingMeter({})
    with pytest.raises(UsageError, match="better"):
        ForgettingMeter(SETS, better="up")
    with pytest.raises(UsageError, match="names"):
        ForgettingMeter({"after": []})
    meter = ForgettingMeter(SETS)
    with pytest.raises(UsageError, match="did you mean 'zeros'"):
        meter.record(Constant(0), "zeroes")
    with pytest.raises(UsageError, match="nothing has been recorded"):
        meter.plot(tmp_path / "a.svg")
    with pytest.raises(UsageError, match="path must end"):
        meter.plot(tmp_path / "a.pdf")
    meter.record(Constant(0), "zeros")
    with pytest.raises(UsageError, match="before the first record"):
        meter.start(Constant(0))
    with pytest.raises(UsageError, match="rows"):
        transfer([])
    with pytest.raises(UsageError, match="no score of 'a'"):
        transfer([("a", {"b": 1.0})])


def test_any_score_can_be_measured_and_the_mode_of_the_model_stays():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(2, 2))
    seen = []
    meter = ForgettingMeter({"a": 3}, lambda m, data: seen.append(m.training) or data, better="lower")
    assert meter.record(model.train(), "a") == {"a": 3.0}
    assert seen == [False]
    assert model.training


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "has no labels"),
        (iter([]), "has no labels"),
        ([{"x": torch.zeros(1)}], "must hold labels, got x"),
        ([torch.zeros(1)], "got Tensor"),
        ([(torch.zeros(2, 2), torch.zeros(3))], "predictions are"),
        ([(torch.zeros(2, 2), torch.full((2,), -100))], "has no labels"),
    ],
)
def test_sets_that_cannot_be_scored_are_refused(batches, message):
    with pytest.raises(UsageError, match=message):
        prediction_accuracy(Constant(0), batches)


def test_a_causal_model_is_scored_on_the_next_token():
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.GPT2Config(vocab_size=11, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    model = transformers.GPT2LMHeadModel(config).eval()
    ids = torch.randint(11, (5, 8))
    found = model(input_ids=ids).logits.argmax(-1)
    labels = torch.cat([ids[:, :1], found[:, :-1]], 1)  # what it predicts
    labels[:, 1] = -100
    batch = {"input_ids": ids, "labels": labels}
    assert prediction_accuracy(model, [batch]) == 100
    labels[0, 2] = (labels[0, 2] + 1) % 11
    assert prediction_accuracy(model, [batch]) == pytest.approx(100 * 29 / 30)
    peft = pytest.importorskip("peft")
    tuned = peft.get_peft_model(model, peft.LoraConfig(r=1, target_modules=["c_attn"], fan_in_fan_out=True))
    assert prediction_accuracy(tuned, [batch]) == pytest.approx(100 * 29 / 30)


def test_the_callback_measures_before_and_after_every_task(tmp_path):
    transformers = pytest.importorskip("transformers")
    from weightsmith.integrations.continual import ForgettingCallback, LCIACallback

    config = transformers.BertConfig(
        vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, num_labels=2
    )
    torch.manual_seed(0)
    model = transformers.BertForSequenceClassification(config)
    data = {
        name: [{"input_ids": torch.full((3,), token), "labels": (token + flip) % 2} for token in range(2, 18)]
        for flip, name in enumerate(("even", "odd"))
    }
    held = {
        name: [transformers.default_data_collator(rows)]
        for name, rows in data.items()
    }  # fmt: skip
    meter, shown = ForgettingMeter(held, path=tmp_path / "f.csv"), []
    for name, rows in data.items():
        args = transformers.TrainingArguments(
            str(tmp_path), max_steps=20, learning_rate=3e-2, report_to=[], use_cpu=True, save_strategy="no",
            disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        callbacks = [LCIACallback(mode="fixed", fallback_beta=0.2), ForgettingCallback(meter, name, show=shown.append)]
        transformers.Trainer(model, args, train_dataset=rows, callbacks=callbacks).train()
        assert meter.matrix()[-1].tolist() == [prediction_accuracy(model, held[key]) for key in held]
    assert [name for name, _ in meter.report().rows] == ["(before)", "even", "odd"]
    assert "forgetting" in shown[-1]
    assert meter.matrix()[0, 0] > 90
    with pytest.raises(UsageError, match="did you mean"):
        ForgettingCallback(meter, "evn")
