import pytest
import torch

from weightsmith.core.device import default_device


@pytest.mark.parametrize(("cuda", "found"), [(True, "cuda"), (False, "cpu")])
def test_only_a_cuda_gpu_is_picked_unasked(monkeypatch, cuda, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert default_device() == found
