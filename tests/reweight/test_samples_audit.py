"""The audit of labels: table, file, plot."""

import csv
import json

import pytest
import torch

from weightsmith.core.errors import UsageError
from weightsmith.reweight.audit import AuditLog


def log():
    found = AuditLog()
    given, suggested = torch.tensor([0, 1, 2]), torch.tensor([0, 2, 2])
    found.add(torch.tensor([7, 3, 9]), (given, suggested, torch.tensor([0.9, 0.2, 0.4]), given + 0.5, given > 1), 0)
    found.add(torch.tensor([9]), (given[2:], given[2:], torch.tensor([0.1]), torch.tensor([1.0]), torch.ones(1)), 1)
    return found


def test_the_table_has_the_latest_numbers_and_the_most_suspicious_first():
    table = log().table()
    assert table.index == [9, 3, 7]
    assert table.label_score == pytest.approx([0.1, 0.2, 0.9])
    assert table.is_label_issue == [False, True, False]  # the model confirms the label of 9
    assert table.epoch == [1, 0, 0]
    assert table.issues().index == [3]
    assert (table.issues().given_label, table.issues().predicted_label) == ([1], [2])


def test_the_file_and_the_frame_have_the_columns_of_cleanlab(tmp_path):
    table = log().table(["cat", "dog", "=fox"])
    file = table.to_csv(tmp_path / "new" / "audit.csv")
    rows = list(csv.DictReader(file.open()))
    columns = ["is_label_issue", "label_score", "given_label", "predicted_label"]
    assert list(rows[0])[:5] == ["index", *columns]
    assert [row["given_label"] for row in rows] == ["=fox", "dog", "cat"]
    pytest.importorskip("pandas")
    frame = table.to_pandas()
    assert list(frame.columns)[:4] == columns
    assert frame.loc[3, "predicted_label"] == "=fox"
    assert bool(frame.loc[3, "is_label_issue"])


def test_the_plot_counts_every_sample_once():
    table = log().table()
    drawn = json.loads(table.plot(bins=4).to_json())
    values = drawn["data"]["values"]
    assert sum(row["samples"] for row in values) == 3
    assert {"start": 0.0, "end": 0.25, "label": "another one suggested", "samples": 1} in values
    with pytest.raises(UsageError, match="bins must be at least 1, got 0"):
        table.plot(bins=0)


def test_a_saved_log_goes_on():
    first, second = log(), AuditLog()
    second.load_state_dict(first.state_dict())
    assert second.weights() == first.weights()
    more = (torch.zeros(1), torch.zeros(1), torch.ones(1), torch.zeros(1), torch.ones(1))
    for found in (first, second):
        found.add(torch.tensor([11]), more, 2)
    assert second.table() == first.table()


def test_many_batches_are_all_kept():
    found = AuditLog()
    for start in range(0, 1000, 5):
        ids = torch.arange(start, start + 5)
        found.add(ids, (ids % 3, ids % 3, ids / 1000, ids.float(), ids > 0), 0)
    assert found.weights() == pytest.approx({i: i / 1000 for i in range(1000)})


def test_a_table_of_nothing_and_too_few_names_are_refused():
    with pytest.raises(UsageError, match="give ids"):
        AuditLog().table()
    with pytest.raises(UsageError, match="class_names must name 3 classes at least, got 2"):
        log().table(["a", "b"])
