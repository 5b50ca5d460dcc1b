"""Optimizers."""

from weightsmith.optim import SGDP, AdamP, param_groups

OPTIMIZERS = {
    "weightsmith.optim.AdamP": [
        lambda model: AdamP(model.parameters(), lr=0.01, weight_decay=0.1),
        lambda model: AdamP(param_groups(model, 0.1), lr=0.01, nesterov=True, capturable=True),
    ],
    "weightsmith.optim.SGDP": [
        lambda model: SGDP(model.parameters(), lr=0.1, momentum=0.9, weight_decay=0.01),
        lambda model: SGDP(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, foreach=False),
    ],
}

ALONGSIDE = {
    "weightsmith.optim.param_groups",
}
