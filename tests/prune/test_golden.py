"""Against the authors' own functions: masks exact, weights after every round."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from weightsmith.prune import MagnitudePruner

GOLDEN = load_file(Path(__file__).parents[1] / "golden/mir-l.safetensors")


class Toy(nn.Module):
    """The parameters of the reference model; its forward pass is not needed."""

    def __init__(self, state):
        super().__init__()
        for name, value in state.items():
            *path, last = name.split(".")
            module = self
            for part in path:
                if not hasattr(module, part):
                    setattr(module, part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(value.clone()))


def part(prefix):
    return {key.removeprefix(prefix): value for key, value in GOLDEN.items() if key.startswith(prefix)}


@pytest.mark.parametrize(("case", "scope", "rounds"), [("imp_global", "global", 3), ("imp_layer", "layerwise", 2)])
def test_masks_and_rewound_weights_of_every_round(case, scope, rounds):
    start = part(f"{case}.init.")
    model = Toy(start)
    pruner = MagnitudePruner(model, scope=scope, faithful=True)
    pruner.snapshot()
    for number in range(1, rounds + 1):
        trained, after = part(f"{case}.r{number}.trained."), part(f"{case}.r{number}.after.")
        model.load_state_dict(trained)
        report = pruner.prune_(0.2)
        assert pruner.rewind_() is report.model is model
        masks = part(f"{case}.r{number}.mask.")
        assert masks.keys() == pruner.masks.keys()
        for name, mask in masks.items():
            assert torch.equal(pruner.masks[name], mask.bool()), (number, name)
        for name, value in model.state_dict().items():
            # the authors' code rewinds biases in the first round only: it lets training write into what it kept
            expected = start[name] if "bias" in name else after[name]
            torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-11)


def test_what_the_product_rewinds_is_everything():
    start = part("imp_global.init.")
    model = Toy(start)
    pruner = MagnitudePruner(model, scope="global", faithful=True)
    pruner.faithful = False
    pruner.snapshot()
    model.load_state_dict(part("imp_global.r1.trained."))
    pruner.rewind_()
    for name, value in model.state_dict().items():
        assert torch.equal(value, start[name])
