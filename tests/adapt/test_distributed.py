"""Adapters train under DDP and FSDP to the values of one process."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from weightsmith.adapt import BoneConfig, apply_bone_

def adapted(variant):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 4))
    return apply_bone_(model, BoneConfig(r=4, variant=variant))

def trained(model, x):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=0.01)
    for _ in range(4):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
    return model

dist.init_process_group("gloo")
mesh = init_device_mesh("cpu", (2,))
x = torch.randn(8, 16, generator=torch.Generator().manual_seed(1))
for variant in ("miss", "row", "col"):
    expected = trained(adapted(variant), x)(x)
    shard = x[dist.get_rank() :: 2]
    assert torch.allclose(trained(DistributedDataParallel(adapted(variant)), shard)(x), expected, atol=1e-5)
    model = adapted(variant)
    for layer in (model[0], model[2], model):
        fully_shard(layer, mesh=mesh)
    assert torch.allclose(trained(model, shard)(x), expected, atol=1e-5)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_end_where_one_does(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launch, tmp_path / "train.py"], check=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
