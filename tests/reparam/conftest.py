import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor

GOLDEN = Path(__file__).parents[1] / "golden" / "weight-compander.safetensors"


class Golden:
    """The stored cases: tensors by ``case.name``, settings by case."""

    def __init__(self) -> None:
        with safe_open(GOLDEN, "pt") as file:
            self.tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            self.settings: dict[str, Any] = {
                case: json.loads(text) for case, text in sorted(file.metadata().items()) if text.startswith("{")
            }

    def __call__(self, case: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        prefix = f"{case}."
        tensors = {key[len(prefix) :]: value for key, value in self.tensors.items() if key.startswith(prefix)}
        return tensors, self.settings[case]


@pytest.fixture(scope="session")
def golden() -> Golden:
    return Golden()


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)
