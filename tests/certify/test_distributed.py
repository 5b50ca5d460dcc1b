"""Two processes: synchronized batch norm is bounded with the statistics of both halves of a batch."""

import socket

import pytest
import torch
from torch import distributed, multiprocessing, nn
from torch.nn.parallel import DistributedDataParallel

from weightsmith.certify import CertifiedTraining, EpsilonSchedule, Recipe, bounds

Y = torch.tensor([0, 1, 2, 0, 1, 2, 0, 1])
X = torch.rand(8, 6, generator=torch.Generator().manual_seed(0))


def net():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).train()


def small():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).train()


class Loss(nn.Module):
    """What DistributedDataParallel wraps: its forward is the loss."""

    def __init__(self, model):
        super().__init__()
        self.model = model
        recipe = Recipe(initialize=False, batchnorm=False, regularizer=None)
        self.training_loss = CertifiedTraining(model, 0.1, EpsilonSchedule(0.1, 1, length=0), X, recipe=recipe)

    def forward(self, x, labels):
        return self.training_loss.loss(x, labels)


def work(rank, port, answers):
    torch.set_num_threads(1)
    distributed.init_process_group("gloo", f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(net())
    found = bounds(model, X[4 * rank : 4 * rank + 4], 0.1)
    found.lower.sum().backward()
    grad = model[0].weight.grad
    distributed.all_reduce(grad)
    var = model[1].running_var.clone()
    plain = small()
    wrapped = DistributedDataParallel(Loss(plain))
    wrapped(X[4 * rank : 4 * rank + 4], Y[4 * rank : 4 * rank + 4]).backward()
    answers[rank] = (found.lower.detach(), grad, var, plain[0].weight.grad)
    distributed.destroy_process_group()


@pytest.mark.slow
def test_two_processes_have_the_bounds_and_gradients_of_one():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with multiprocessing.Manager() as manager:
        answers = manager.dict()
        multiprocessing.spawn(work, (port, answers), nprocs=2)
        (first, grad, var, trained), (second, other, _, again) = answers[0], answers[1]
    model = net()
    expected = bounds(model, X, 0.1)
    expected.lower.sum().backward()
    torch.testing.assert_close(torch.cat([first, second]), expected.lower.detach(), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(grad, model[0].weight.grad, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(other, grad)
    torch.testing.assert_close(var, model[1].running_var)
    model = small()
    Loss(model)(X, Y).backward()
    torch.testing.assert_close(trained, model[0].weight.grad, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(again, trained)
