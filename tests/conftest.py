import os
from pathlib import Path

import pytest
import torch
from hypothesis import settings

# everything that tests load is on disk: without this, libraries ask the hub first, and wait where there is no network
os.environ.setdefault("HF_HUB_OFFLINE", "1")

# how long an example takes says how busy the machine is
settings.register_profile("weightsmith", deadline=None)
settings.load_profile("weightsmith")


@pytest.fixture(autouse=True, scope="session")
def _one_thread():
    # the models here are tiny: more threads only wait for each other, and tests run side by side
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def real_model():
    """Give the folder of a model that ``make models`` has fetched."""

    def find(name):
        folder = Path(__file__).parents[1] / ".models" / name
        if not folder.is_dir():
            pytest.skip(f"{name} is not there: run `make models`")
        return folder

    return find
