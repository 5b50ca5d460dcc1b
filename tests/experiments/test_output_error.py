import copy

import pytest
import torch
from torch import nn

from weightsmith.experiments.output_error import batches_of, relative_error
from weightsmith.lab.data.views import View
from weightsmith.lab.tasks import TaskConfig, make_task


def test_the_error_of_outputs_is_relative_and_does_not_depend_on_how_rows_are_batched():
    task = make_task(TaskConfig(train_examples=60, test_examples=40, model="mlp"))
    model = task.build()
    changed = copy.deepcopy(model)
    last = [module for module in changed.modules() if isinstance(module, nn.Linear)][-1]
    with torch.no_grad():
        last.weight.mul_(0.9), last.bias.mul_(0.9)
    split = task.held_out["test"]
    for size in (7, 32):
        assert relative_error(changed, model, batches_of(split, size=size)) == pytest.approx(0.01, rel=1e-4)
    assert sum(len(batch.indices) for batch in batches_of(split, 10, size=3)) == 10
    assert len(batches_of(View(split, torch.arange(33)))) == 2
