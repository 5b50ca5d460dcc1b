"""Sharded training: AdamP and SGDP on two ranks move every weight as one process does."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard, distribute_tensor

from weightsmith.optim import SGDP, AdamP

RUNS = {
    "AdamP": lambda params: AdamP(params, lr=0.01, weight_decay=0.1),
    "AdamP nesterov, one by one": lambda params: AdamP(params, lr=0.01, nesterov=True, foreach=False),
    "AdamP together": lambda params: AdamP(params, lr=0.01, weight_decay=0.1, foreach=True),
    "AdamP capturable": lambda params: AdamP(params, lr=0.01, weight_decay=0.1, capturable=True),
    "AdamP always projected": lambda params: AdamP(params, lr=0.01, weight_decay=0.1, delta=100.0),
    "SGDP": lambda params: SGDP(params, lr=0.1, momentum=0.9, weight_decay=0.01),
    "SGDP buffer": lambda params: SGDP(params, lr=0.1, momentum=0.9, project_buffer=True),
}
"""Every form of the step."""


class Net(nn.Module):
    """A matrix for every way to be cut in two: one row, one row in three dimensions, fewer columns, an odd number."""

    def __init__(self):
        super().__init__()
        self.cls_token = nn.Parameter(torch.randn(1, 1, 7))
        self.body = nn.Linear(7, 5, bias=False)
        self.norm = nn.LayerNorm(5)
        self.kernel = nn.Conv1d(5, 3, 1)
        self.column = nn.Linear(1, 4)
        self.head = nn.Linear(4, 1)

    def forward(self, x):
        h = self.norm(self.body(torch.tanh(x + self.cls_token[0])))
        h = self.kernel(h[:, :, None]).mean((1, 2))[:, None]
        return self.head(torch.tanh(self.column(h)))


def fresh():
    torch.manual_seed(0)
    return Net()


def train(model, optimizer, steps):
    x = torch.randn(8, 7, generator=torch.Generator().manual_seed(1))
    for _ in range(steps):
        optimizer.zero_grad()
        (model(x) - 1).square().mean().backward()
        optimizer.step()


def values(model):
    tensors = [p.detach() for p in model.parameters()]
    return [t.full_tensor() if hasattr(t, "full_tensor") else t for t in tensors]


def assert_same(got, want):
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def sharded(mesh):
    model = fresh()
    fully_shard(model.body, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def restore(path, model, optimizer):
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.load(state, checkpoint_id=path)
    set_state_dict(model, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"])


def check_training(mesh, name, folder):
    alone = fresh()
    reference = RUNS[name](alone.parameters())
    train(alone, reference, 6)

    model = sharded(mesh)
    optimizer = RUNS[name](model.parameters())
    train(model, optimizer, 3)
    state = dict(zip(("model", "optimizer"), get_state_dict(model, optimizer), strict=True))
    dcp.save(state, checkpoint_id=folder / name)
    train(model, optimizer, 3)
    assert_same(values(model), values(alone))
    (got,), (want,) = optimizer.projection_stats(), reference.projection_stats()
    assert (got.channel, got.layer, got.none) == (want.channel, want.layer, want.none)
    assert abs(got.mean_norm - want.mean_norm) < 1e-4

    resumed = sharded(mesh)
    optimizer = RUNS[name](resumed.parameters())
    restore(folder / name, resumed, optimizer)
    train(resumed, optimizer, 3)
    assert_same(values(resumed), values(alone))


def check_placements(mesh, name):
    """The cuts of tensor parallelism, which go through the rows."""
    for placement in (Shard(0), Shard(1), Replicate()):
        generator = torch.Generator().manual_seed(2)
        for shape in ((1, 7), (7, 1), (3, 5), (1, 1), (2, 1, 3)):
            w, g = torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)
            local = nn.Parameter(w.clone())
            spread = nn.Parameter(distribute_tensor(w.clone(), mesh, [placement]))
            ours, theirs = RUNS[name]([local]), RUNS[name]([spread])
            for gradient in (g, torch.zeros_like(g), g):
                local.grad, spread.grad = gradient.clone(), distribute_tensor(gradient.clone(), mesh, [placement])
                ours.step()
                theirs.step()
            assert_same([spread.detach().full_tensor()], [local.detach()])


def main(folder, *names):
    """What each of two ranks runs."""
    dist.init_process_group("gloo")
    mesh = init_device_mesh("cpu", (2,))
    for name in names:
        check_training(mesh, name, Path(folder))
        check_placements(mesh, name)
    dist.destroy_process_group()


@pytest.mark.parametrize("names", [["AdamP"], pytest.param(list(RUNS)[1:], marks=pytest.mark.slow)])
def test_two_ranks_end_where_one_process_does_and_their_checkpoint_goes_on_in_one(names, tmp_path):
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    subprocess.run([*launch, __file__, tmp_path, *names], check=True, timeout=200, env=environment)
    for name in names:
        want, model = fresh(), fresh()
        train(want, RUNS[name](want.parameters()), 6)
        optimizer = RUNS[name](model.parameters())
        restore(tmp_path / name, model, optimizer)
        train(model, optimizer, 3)
        assert_same(values(model), values(want))


if __name__ == "__main__":
    main(*sys.argv[1:])
