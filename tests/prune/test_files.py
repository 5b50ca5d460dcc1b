import contextlib
import json
from random import Random

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.prune import MagnitudePruner, load_sparse, save_sparse
from weightsmith.prune.sparse import sparse_masks


def pruned(amount=0.9, size=400):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, size), nn.BatchNorm1d(size), nn.Linear(size, 5))
    pruner = MagnitudePruner(model)
    pruner.prune_(amount)
    return model, pruner


def test_a_file_comes_back_and_has_the_size_of_the_formula(tmp_path):
    model, pruner = pruned()
    path = save_sparse(model, tmp_path / "m.safetensors", masks=pruner.masks)
    state = load_sparse(path)
    for name, value in model.state_dict().items():
        assert torch.equal(state[name], value)
        assert state[name].dtype == value.dtype
    other = nn.Sequential(nn.Linear(400, 400), nn.BatchNorm1d(400), nn.Linear(400, 5))
    load_sparse(path, other)
    assert torch.equal(other[0].weight, model[0].weight)
    sparse = sum(mask.numel() / 8 + 4 * int(mask.sum()) for mask in pruner.masks.values())
    rest = sum(t.nbytes for name, t in model.state_dict().items() if name not in pruner.masks)
    assert path.stat().st_size == pytest.approx(sparse + rest, rel=0.02)


def test_a_kept_zero_is_kept_and_dense_tensors_stay_dense(tmp_path):
    weight = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
    mask = torch.tensor([[True, True], [False, True]])
    path = save_sparse({"w": weight, "d": torch.ones(3)}, tmp_path / "m.safetensors", masks={"w": mask})
    assert load_file(path)["w.values"].tolist() == [1, 0, 2]
    assert "d" in load_file(path)
    assert torch.equal(load_sparse(path)["w"], weight)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64, torch.int64])
def test_dtypes_and_ties_come_back(tmp_path, dtype):
    weight = torch.zeros(64, 3, dtype=dtype)
    weight[5, 1] = 3
    state = {"a": weight, "b": weight, "scalar": torch.tensor(2.0), "empty": torch.zeros(0, 4)}
    found = load_sparse(save_sparse(state, tmp_path / "m.safetensors"))
    assert torch.equal(found["a"], weight)
    assert found["a"].dtype == dtype
    assert found["b"].data_ptr() == found["a"].data_ptr()
    assert found["scalar"].item() == 2
    assert found["empty"].shape == (0, 4)


def test_what_is_not_a_sparse_file_is_said(tmp_path):
    save_file({"w": torch.ones(2)}, tmp_path / "plain.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    for name, message in (("plain", "no sparse file"), ("text", "cannot be read"), ("none", "no such file")):
        with pytest.raises(UsageError, match=message):
            load_sparse(tmp_path / f"{name}.safetensors")
    with pytest.raises(UsageError, match="masks: w has shape"):
        save_sparse({"w": torch.ones(2)}, tmp_path / "m.safetensors", masks={"w": torch.ones(3)})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t | {"w.values": t["w.values"][:-1]}, "values for"),
        (lambda t: t | {"w.mask": t["w.mask"][:-1]}, "takes"),
        (lambda t: {"w.mask": t["w.mask"]}, "mask or values"),
    ],
)
def test_damage_is_said(tmp_path, change, message):
    from safetensors import safe_open

    weight = torch.zeros(10, 10)
    weight[0] = 1
    path = save_sparse({"w": weight}, tmp_path / "m.safetensors")
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(change(load_file(path)), path, metadata=header)
    with pytest.raises(UsageError, match=message):
        load_sparse(path)


def test_any_damage_is_said_and_never_another_error(tmp_path):
    path = save_sparse(pruned(size=10)[0], tmp_path / "m.safetensors")
    whole, random = path.read_bytes(), Random(0)
    for number in range(150):
        damaged = bytearray(whole)
        if number % 2:
            damaged = damaged[: random.randrange(len(whole))]
        else:
            damaged[random.randrange(900)] ^= 1 << random.randrange(8)
        path.write_bytes(bytes(damaged))
        for read in (load_sparse, sparse_masks):
            with contextlib.suppress(UsageError):  # a flipped bit of a value is no damage that can be seen
                read(path)
    path.write_bytes(whole[:-1])
    for read in (load_sparse, sparse_masks):
        with pytest.raises(UsageError, match="cannot be read"):
            read(path)


@pytest.mark.parametrize("shape", [[2**39, 2**39], [True, 3], [-1]])
def test_a_shape_that_is_none_is_said(tmp_path, shape):
    header = {"weightsmith_sparse": json.dumps({"shapes": {"w": shape}, "tied": {}})}
    tensors = {"w.mask": torch.zeros(0, dtype=torch.uint8), "w.values": torch.zeros(0)}
    save_file(tensors, tmp_path / "m.safetensors", metadata=header)
    with pytest.raises(UsageError):
        load_sparse(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 3)), r"its 1\.weight is \(2, 4\), the model \(3, 4\)"),
        (nn.Sequential(nn.Linear(4, 4)), "the model has no '1.bias'"),
        (nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2), nn.Linear(2, 2)), "the file has no '2.bias'"),
    ],
)
def test_a_file_of_another_model_changes_nothing(tmp_path, model, message):
    path = save_sparse(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), tmp_path / "m.safetensors")
    before = model[0].weight.detach().clone()
    with pytest.raises(UsageError, match=message):
        load_sparse(path, model)
    assert torch.equal(model[0].weight, before)


def test_names_that_the_format_uses_itself(tmp_path):
    state = {"w": torch.zeros(64), "w.mask": torch.ones(3), "v": torch.arange(8.0)}
    path = save_sparse(state, tmp_path / "m.safetensors", masks={"v": torch.tensor([1, 0, 2, 0, 1, 0, 0, 1.0])})
    found = load_sparse(path)
    assert torch.equal(found["w"], state["w"])
    assert torch.equal(found["w.mask"], state["w.mask"])
    assert found["v"].tolist() == [0, 0, 2, 0, 4, 0, 0, 7]
    with pytest.raises(UsageError, match="beside a tensor named"):
        save_sparse(state, path, masks={"w": torch.ones(64, dtype=torch.bool)})
    with pytest.raises(UsageError, match="must be a tensor to be stored, got int"):
        save_sparse({"w": 3}, path)
    with pytest.raises(UsageError, match="is a folder"):
        save_sparse(state, tmp_path)
