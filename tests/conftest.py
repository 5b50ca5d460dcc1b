import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # the models here are tiny: more threads only wait for each other, and tests run side by side
    torch.set_num_threads(1)
