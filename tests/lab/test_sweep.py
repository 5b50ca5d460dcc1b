import math

import pytest
import torch

from weightsmith.core.errors import UsageError
from weightsmith.lab.job import Job
from weightsmith.lab.record import Recorder
from weightsmith.lab.sweep import sweep, tune
from weightsmith.lab.tasks import TrainConfig, make_task


def tried_by(values, score, **options):
    seen = []

    def attempt(value, number):
        assert number == len(seen)
        seen.append(value)
        return score(value), value

    return sweep(values, attempt, **options), seen


def peak_at(best):
    return lambda value: -abs(math.log(value / best))


def test_the_best_value_wins_and_ties_go_to_the_earlier_one():
    found, seen = tried_by([0.1, 1.0, 0.01], peak_at(0.1))
    assert (found.best.value, found.at_edge, found.trials, seen) == (0.1, False, 3, [0.1, 1.0, 0.01])
    assert tried_by([0.3, 0.1], lambda value: 1.0)[0].best.value == 0.3
    assert tried_by([0.3, 0.1], lambda value: value, better="lower")[0].best.value == 0.1


def test_further_trials_go_beyond_an_edge_or_between():
    found, seen = tried_by([0.1, 0.3], peak_at(3.0), more=2)
    assert seen == pytest.approx([0.1, 0.3, 0.9, 2.7])
    assert found.at_edge
    _, seen = tried_by([0.01, 0.1, 1.0], peak_at(0.2), more=1)
    assert seen[-1] == pytest.approx(math.sqrt(0.1 * 1.0))


def test_a_diverged_value_loses_and_smaller_ones_are_tried_when_all_have():
    found, _ = tried_by([1.0, 0.1], lambda value: math.nan if value == 1.0 else -5.0)
    assert found.best.value == 0.1
    _, seen = tried_by([0.1, 0.3, 1.0], lambda value: math.nan, more=2)
    assert seen[3:] == pytest.approx([0.1 / 3, 0.1 / 9])


@pytest.mark.parametrize("values", [[], [0.1, 0.1], [math.inf]])
def test_values_that_cannot_be_tried_are_named(values):
    with pytest.raises(UsageError, match="values must be different numbers"):
        tried_by(values, lambda value: value)


def test_values_may_be_numbers_of_settings_where_none_are_added():
    assert tried_by([0.0, 1.0], lambda value: value)[0].best.value == 1.0
    with pytest.raises(UsageError, match="values must be above 0 for 1 more trials"):
        tried_by([0.0, 1.0], lambda value: value, more=1)


def tuned(tmp_path, config, **options):
    task = make_task(config)
    job = Job(arm="a", seed=0, record=Recorder(), folder=tmp_path, device=torch.device("cpu"))

    def train(rate, folder):
        model = config.network(task, 0)
        return config.fit(model, torch.optim.SGD(model.parameters(), lr=rate), task, 0, folder=folder)

    return tune(config, task, job, [0.1, 1e-5], train, **options), job, task


def test_a_rate_is_chosen_on_validation_and_each_trial_is_recorded(tmp_path):
    config = TrainConfig(train_examples=300, test_examples=50, model="mlp", steps=20)
    found, job, task = tuned(tmp_path, config, more=1)
    assert found.value >= 0.1
    rows = [row for row in job.record.rows if row["phase"] == "sweep"]
    assert [row["trial"] for row in rows] == [1, 2, 3]
    assert torch.equal(found.score, config.score(task, found.model))
    assert not job.diverged


def test_without_validation_rows_nothing_can_be_chosen(tmp_path):
    with pytest.raises(UsageError, match="validation_fraction must be above 0"):
        tuned(tmp_path, TrainConfig(train_examples=100, model="mlp", steps=1, validation_fraction=0))
