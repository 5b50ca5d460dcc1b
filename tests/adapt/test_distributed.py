"""Adapters train under DDP and FSDP to the values of one process, and are saved from there."""

import os
import subprocess
import sys

import pytest

SCRIPT = """
import copy
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from weightsmith.adapt import (
    BoneConfig, apply_bone_, bone_disabled, bone_state_dict, load_bone, load_bone_state_dict_, merge_bone_, save_bone,
    unload_bone_,
)
from weightsmith.core.errors import UsageError

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

# an adapter of a sharded model is saved whole, and comes back
folder = sys.argv[1]
plain = nn.Sequential(nn.Linear(16, 16), nn.Tanh(), nn.Linear(16, 1))
dist.broadcast_object_list(states := [plain.state_dict()])
plain.load_state_dict(states[0])
model = copy.deepcopy(plain)
apply_bone_(model, BoneConfig(r=4, variant="row", where="0", modules_to_save=("2",)))
for layer in (model[0], model[2], model):
    fully_shard(layer, mesh=mesh)
expected = trained(model, x)(x)
assert save_bone(model, folder) == Path(folder)
whole = load_bone(copy.deepcopy(plain), folder)
assert torch.allclose(whole(x), expected, atol=1e-5)
with bone_disabled(model):
    assert torch.allclose(model(x), plain(x), atol=1e-5)
for block in model.parameters():
    block.data.zero_()
model[0].weight.data.add_(1)  # only the adapter comes back
load_bone_state_dict_(model, bone_state_dict(whole))
assert all(torch.equal(t.full_tensor(), bone_state_dict(whole)[n]) for n, t in bone_state_dict(model).items())
for verb in (merge_bone_, unload_bone_, lambda m: apply_bone_(m, BoneConfig(r=4), "second")):
    try:
        verb(model)
        raise AssertionError(verb)
    except UsageError as error:
        assert "FSDP2 has sharded" in str(error)
dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_end_where_one_does(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    subprocess.run(
        [*launch, tmp_path / "train.py", tmp_path / "adapter"],
        check=True,
        timeout=300,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
