import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # so that the tests of this folder find its helpers


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)
