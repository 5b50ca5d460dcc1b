"""The example that is no GAN."""

import importlib.util
import itertools
from pathlib import Path

EXAMPLE = Path(__file__).parents[2] / "examples" / "search_cnn.py"


def test_the_convnet_example_finds_a_front_of_accuracy_and_size():
    spec = importlib.util.spec_from_file_location("search_cnn", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = module.search(generations=2, steps=5, rows=300)
    front = found.front
    assert 0 < len(front) <= 12
    assert all(a.values["accuracy"] >= b.values["accuracy"] for a, b in itertools.pairwise(front))
    assert all(a.values["parameters"] >= b.values["parameters"] for a, b in itertools.pairwise(front))
