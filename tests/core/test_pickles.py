import os
import pickle
import zipfile
from collections import OrderedDict

import pytest
import torch

from weightsmith.core.errors import UsageError
from weightsmith.core.pickles import read_pickle


class Malicious:
    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def save(path, content, **options):
    torch.save(content, path, **options)
    return path


@pytest.mark.parametrize("zipped", [True, False])
def test_a_state_dict_comes_back(tmp_path, zipped):
    weight = torch.randn(3, 4)
    state = OrderedDict(weight=weight, tied=weight, transposed=weight.T, half=weight.bfloat16(), n=torch.tensor(3))
    file = save(tmp_path / "pytorch_model.bin", state, _use_new_zipfile_serialization=zipped)
    found = read_pickle(file, allow_pickle=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in state.items())


def test_it_is_read_only_when_asked_for(tmp_path):
    with pytest.raises(UsageError, match=r"a pickle; allow_pickle=True \(--allow-pickle\) reads plain tensors"):
        read_pickle(tmp_path / "pytorch_model.bin", allow_pickle=False)


@pytest.mark.parametrize("zipped", [True, False, None])
def test_no_code_in_it_runs(tmp_path, monkeypatch, zipped):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    file, proof = tmp_path / "pytorch_model.bin", tmp_path / "proof"
    content = {"weight": torch.ones(2), "x": Malicious(proof)}
    if zipped is None:
        file.write_bytes(pickle.dumps(content))
    else:
        save(file, content, _use_new_zipfile_serialization=zipped)
    with pytest.raises(UsageError, match="cannot be read as plain tensors") as caught:
        read_pickle(file, allow_pickle=True)
    assert "\n" not in str(caught.value)
    assert not proof.exists()
    torch.load(file, weights_only=False) if zipped is not None else pickle.loads(file.read_bytes())
    assert proof.exists()  # it would have


@pytest.mark.parametrize(
    "state",
    [
        {"a": torch.zeros(1).expand(2**30)},
        {"a": torch.zeros(1).expand(2**50)},
        {"a": torch.zeros(2**20 + 2**10).as_strided((2**20, 2**10), (1, 1))},
        {f"{i}": tensor for tensor in [torch.zeros(2**20)] for i in range(200)},
    ],
)
def test_tensors_that_would_fill_the_memory_are_refused(tmp_path, state):
    file = save(tmp_path / "pytorch_model.bin", state)
    with pytest.raises(UsageError, match="made to fill the memory"):
        read_pickle(file, allow_pickle=True)


def test_a_small_expanded_buffer_is_read(tmp_path):
    file = save(tmp_path / "x.bin", {"ids": torch.arange(512).expand(1, -1), "mask": torch.ones(1).expand(64, 64)})
    assert read_pickle(file, allow_pickle=True)["mask"].shape == (64, 64)


@pytest.mark.parametrize(
    "content", [[1], 3, {"a": 1}, {1: torch.ones(1)}, {"a": {"b": torch.ones(1)}}, {"a": torch.eye(2).to_sparse()}]
)
def test_only_plain_tensors_by_name_are_read(tmp_path, content):
    with pytest.raises(UsageError, match=r"must hold tensors by name|must be a plain tensor"):
        read_pickle(save(tmp_path / "x.bin", content), allow_pickle=True)


def test_damaged_and_packed_files_are_one_error(tmp_path):
    file = save(tmp_path / "x.bin", {"a": torch.ones(100)})
    whole = file.read_bytes()
    for content in (b"", b"x", whole[:200], whole[:-30], whole[:100] + b"\xff" * 50 + whole[150:]):
        file.write_bytes(content)
        with pytest.raises(UsageError, match="cannot be read"):
            read_pickle(file, allow_pickle=True)
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("x/data.pkl", b"\0" * 10**6)
    with pytest.raises(UsageError, match="is compressed"):
        read_pickle(file, allow_pickle=True)
    with pytest.raises(UsageError, match="is not a file"):
        read_pickle(tmp_path, allow_pickle=True)
