"""Curves of laziness in a Trainer of transformers."""

import pytest
import torch
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.diagnose import LazinessProbe

transformers = pytest.importorskip("transformers")
from weightsmith.integrations.laziness import LazinessCallback  # noqa: E402


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 8), nn.Linear(8, 3)

    def forward(self, x, labels=None):
        logits = self.second(torch.relu(self.first(x)))
        loss = None if labels is None else nn.functional.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits} if labels is not None else {"logits": logits}


def train(tmp_path, callback, model):
    rows = [{"x": torch.randn(4), "labels": torch.tensor(i % 3)} for i in range(16)]
    args = transformers.TrainingArguments(
        str(tmp_path), max_steps=5, per_device_train_batch_size=4, report_to=[], learning_rate=0.01, use_cpu=True,
        disable_tqdm=True, save_strategy="no",
    )  # fmt: skip
    transformers.Trainer(model, args, train_dataset=rows, callbacks=[callback]).train()


def test_it_looks_every_few_steps_and_at_the_end_and_changes_nothing(tmp_path):
    results = []
    for every in (2, 10**6):
        torch.manual_seed(0)
        model = Net()
        callback = LazinessCallback(LazinessProbe(model, {"x": torch.randn(6, 4)}), every=every)
        torch.manual_seed(1)
        train(tmp_path, callback, model)
        results.append([p.detach() for p in model.parameters()])
        steps = [row["step"] for row in callback.rows]
    assert steps == [5]
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))
    torch.manual_seed(0)
    model = Net()
    callback = LazinessCallback(LazinessProbe(model, {"x": torch.randn(6, 4)}), every=2)
    train(tmp_path, callback, model)
    assert [row["step"] for row in callback.rows] == [2, 4, 5]
    assert callback.rows[0]["weight_change"] < callback.rows[-1]["weight_change"]
    assert callback.report.kernel_alignment < 1
    assert "representation_alignment/first" in callback.rows[0]


def test_every_must_be_a_number_of_steps():
    with pytest.raises(UsageError, match="every must be at least 1"):
        LazinessCallback(LazinessProbe(Net(), torch.randn(2, 4)), every=0)
