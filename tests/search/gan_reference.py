"""Reference values from the authors' code, and networks that hold its weights."""

import re
from pathlib import Path

import torch
from safetensors.torch import load_file

from weightsmith.search.gan import Discriminator, Generator

GOLDEN = load_file(Path(__file__).parents[1] / "golden" / "eagan.safetensors")
_NOT_WEIGHTS = ("genotypes", "z", "out_", "max_abs", "inplace", "u_after")


def genotypes(name):
    return [tuple(tuple(cell) for cell in genotype) for genotype in GOLDEN[name].tolist()]


def real(t, n):
    return torch.sin(0.37 * torch.arange(n * 3 * 32 * 32, dtype=torch.float64) + t).view(n, 3, 32, 32)


def _weights(prefix):
    found = {name.removeprefix(prefix): value for name, value in GOLDEN.items() if name.startswith(prefix)}
    return {name: value for name, value in found.items() if not name.startswith(_NOT_WEIGHTS)}


def super_generator():
    model = Generator(channels=2, bottom=4, latent=6).double()
    model.load_state_dict(_weights("gsuper."))
    return model


def super_discriminator():
    model = Discriminator(channels=2).double()
    renamed = {}
    for name, value in _weights("dsuper.").items():
        layer, _, kind = name.rpartition(".")
        inner = {"weight": "weight.original", "u": "weight.0.u", "v": "weight.0.v"}
        renamed[f"{layer}.parametrizations.{inner[kind]}" if kind in inner else name] = value
    model.load_state_dict(renamed)
    return model


def plain_name(name):
    """The reference's name of a parameter."""
    return name.replace("parametrizations.weight.original", "weight")


def tolerances(names):
    """Largest deviation per trained parameter of a generator: 1e-8 but for the biases that BatchNorm takes away again.

    Their true gradient is 0; Adam divides what rounding leaves of it (1e-13) by its epsilon of 1e-8, so that the last
    digits of a sum, which depend on where in memory it lies, decide.
    """
    return torch.tensor([1e-6 if re.fullmatch(r"cell2\.e[456]\.op\d\.bias", name) else 1e-8 for name in names])


def sorted_names(model):
    return sorted(plain_name(name) for name, _ in model.named_parameters())


def norms(model):
    named = {plain_name(name): parameter for name, parameter in model.named_parameters()}
    return torch.stack([named[name].detach().norm() for name in sorted(named)])
