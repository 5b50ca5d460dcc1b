"""A parametrization on a tensor that several modules share."""

from typing import Any

from torch import nn
from torch.nn.utils import parametrize


def register_shared_(owners: list[tuple[nn.Module, str]], parametrization: nn.Module) -> None:
    """Put one parametrization on every owner of a tensor, and say so to ``save_pretrained`` of transformers.

    That method writes a shared tensor once if the model declares under which name it may be left out. It looks for
    the declaration on every submodule; one on the parametrization ends with it.

    Args:
        owners: Modules and attributes, the one whose name is to be kept first.
        parametrization: What computes the tensor.
    """
    for index, (module, attribute) in enumerate(owners):
        parametrize.register_parametrization(module, attribute, parametrization)
        if index:
            declare_shared_(module, attribute)


def declare_shared_(module: nn.Module, attribute: str, part: str = "") -> None:
    """Say to ``save_pretrained`` that tensors of a parametrization are kept under another name as well.

    Args:
        module: The parametrized module.
        attribute: Its parametrized attribute.
        part: How the names of these tensors begin; ``""``: all of them are shared.
    """
    held: Any = module.parametrizations[attribute]  # type: ignore[index]
    held._tied_weights_keys = {**getattr(held, "_tied_weights_keys", {}), part: part}
