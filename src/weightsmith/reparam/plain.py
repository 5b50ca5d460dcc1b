"""Plain checkpoints into a companded model and out of it: both sides keep the keys the user brought."""

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from weightsmith.core.errors import UsageError
from weightsmith.core.modes import evaluating
from weightsmith.reparam.apply import Site, sites


@torch.no_grad()
def plain_state_dict(model: nn.Module) -> dict[str, Any]:
    """Return what ``fold_(model).state_dict()`` would hold, and leave ``model`` as it is.

    Args:
        model: A companded model; what else is parametrized becomes plain as well.
    """
    state = dict(model.state_dict())
    with evaluating(model):  # a parametrization with training-time state (spectral norm) must not advance it
        for name, module in model.named_modules():
            if not parametrize.is_parametrized(module) or ".parametrizations." in f".{name}.":
                continue  # what is inside of a parametrization goes with it
            path = f"{name}." if name else ""
            for attribute in cast(nn.ModuleDict, module.parametrizations):
                prefix = f"{path}parametrizations.{attribute}."
                state = {key: value for key, value in state.items() if not key.startswith(prefix)}
                state[path + attribute] = getattr(module, attribute).detach()
    return state


@torch.no_grad()
def load_plain_state_dict(model: nn.Module, state_dict: Mapping[str, Any], *, strict: bool = True) -> Any:
    """Load a checkpoint of the uncompanded model: weights are written through the curves' inverse.

    The present ``a`` and ``b`` stay. All weights are inverted before anything is loaded.

    Args:
        model: A companded model.
        state_dict: Tensors by the plain model's keys.
        strict: As in ``torch.nn.Module.load_state_dict``.

    Returns:
        Missing and unexpected keys, as ``load_state_dict`` does.

    Raises:
        UsageError: A weight is out of its curve's reach; the message names it.
    """
    own, state = model.state_dict(), dict(state_dict)
    for site in sites(model, every_owner=True):
        prefix = _prefix(site)
        original = f"{prefix}original"
        state |= {key: value for key, value in own.items() if key.startswith(prefix) and key != original}
        if site.name not in state:
            continue  # load_state_dict words what is missing
        value = state.pop(site.name).to(site.v)
        for parametrization in reversed(site.module.parametrizations[site.attribute]):  # type: ignore[index]
            try:
                value = parametrization.right_inverse(value)
            except UsageError as error:
                raise UsageError(f"{site.name}: {error}") from error
        state[original] = value
    return model.load_state_dict(state, strict=strict)


def _prefix(site: Site) -> str:
    return f"{site.name.removesuffix(site.attribute)}parametrizations.{site.attribute}."
