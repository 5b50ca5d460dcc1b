"""How weights are written."""

import torch

from weightsmith.reparam import InWeightSpace, WeightCompander, compand_, param_groups
from weightsmith.testing import Parametrization, Rewrite


def _compand(*args, **options):
    return Rewrite(lambda model, x, where=None: compand_(model, *args, where=where, **options), change_at_begin=1e-5)


REWRITES = {
    "weightsmith.reparam.compand_": [
        _compand(),
        _compand(0.5, 1.0, learnable=True, overflow="clip"),
        _compand(1.0, 1.0, fn="arcsinh", learnable=True, share="model"),
    ],
}

PARAMETRIZATIONS = {
    "weightsmith.reparam.WeightCompander": [
        Parametrization(lambda: WeightCompander(0.7, 0.7, "arctan", overflow="clip"), change_at_begin=1e-5),
    ],
}


def _in_weight_space(model):
    compand_(model, overflow="clip")
    return InWeightSpace(torch.optim.AdamW(param_groups(model, 0.0), lr=0.01), model)


OPTIMIZERS = {"weightsmith.reparam.InWeightSpace": [_in_weight_space]}

ALONGSIDE = {
    "weightsmith.reparam.param_groups",
}

ELSEWHERE = {
    # changes gradients between two calls of the user's, which InWeightSpace above makes: tests/reparam compares the two
    "weightsmith.reparam.add_weight_decay_grad_",
}
