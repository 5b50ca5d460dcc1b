import sys
from pathlib import Path

import pytest

# the engine's jobs run in other processes, which import the synthetic experiment by name
sys.path.insert(0, str(Path(__file__).parent))


@pytest.fixture
def own_caches(tmp_path, monkeypatch):
    """Caches of data that no other test sees."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("WEIGHTSMITH_CACHE", str(tmp_path / "decoded"))
    monkeypatch.delenv("WEIGHTSMITH_DATA", raising=False)
