"""One order of arguments: the model that is changed, read or saved first; what makes a model takes the folder first."""

import inspect

import pytest
import torch
from torch import nn

from weightsmith import adapt, quantize
from weightsmith.quantize import (
    Grid,
    export_onnx,
    flexround_,
    load_quantized,
    round_to_nearest_,
    save_quantized,
)

FUNCTIONS = {
    f"{package.__name__}.{name}": list(inspect.signature(getattr(package, name)).parameters.values())
    for package in (quantize, adapt)
    for name in package.__all__
    if inspect.isfunction(getattr(package, name))
}
WITH_MODEL = {name: parameters for name, parameters in FUNCTIONS.items() if any(p.name == "model" for p in parameters)}


@pytest.mark.parametrize("name", WITH_MODEL)
def test_the_model_comes_first_and_for_what_makes_one_the_folder(name):
    first, *others = WITH_MODEL[name]
    model = next(parameter for parameter in WITH_MODEL[name] if parameter.name == "model")
    if model.default is inspect.Parameter.empty:
        assert first is model
        positional = [p.name for p in others if p.kind is not inspect.Parameter.KEYWORD_ONLY]
        assert positional[:1] == ["folder"] or "folder" not in positional
    else:  # it makes the model unless it is given one to fill
        assert first.name == "folder"


def test_arguments_in_another_order_are_named():
    model = nn.Sequential(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="what is saved comes first, then the folder"):
        save_quantized("out", model)
    with pytest.raises(TypeError, match="load_quantized takes the folder first"):
        load_quantized(model, "out")
    for verb in (flexround_, round_to_nearest_):
        with pytest.raises(TypeError, match="the order is model, calibration, grid"):
            verb(torch.randn(4, 4), model, Grid(3))
    with pytest.raises(TypeError, match="model must be a module"):
        export_onnx(torch.randn(4, 4), model, "net.onnx")
