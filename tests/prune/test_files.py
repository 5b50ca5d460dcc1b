import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from weightsmith.core.errors import UsageError
from weightsmith.prune import MagnitudePruner, load_sparse, save_sparse


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
