"""``fold_``: bake every parametrization into plain weights, so that the model is again what the user brought.

A technique that changes how a weight is written registers a ``torch.nn.utils.parametrize`` parametrization. Folding
evaluates it once and puts the result where the weight was: same class, same keys, same outputs.
"""

from typing import Any, NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightsmith.core.errors import UsageError
from weightsmith.core.modes import evaluating
from weightsmith.core.select import Where, select
from weightsmith.core.weights import Slot, owners

Model = TypeVar("Model", bound=nn.Module)
_Holders = dict[int, list[Slot]]


@torch.no_grad()
def fold_(model: Model, *, where: Where = None) -> Model:
    """Replace every parametrized tensor by its present value, in place.

    All values are computed before anything is replaced. Parameters stay parameters and buffers stay buffers. Tensors
    that share their originals (tied weights) fold to the same value and stay tied. A parameter keeps its identity; of
    several originals (weight norm) the first one of the weight's shape becomes the weight. So an optimizer that was
    built before goes on working.

    Hooks (`torch.nn.utils.prune`, the older `weight_norm` and `spectral_norm`) are no parametrizations and stay.

    Args:
        model: Any module; one without parametrizations is returned as it is.
        where: Which parametrized modules to fold: ``None`` (all), glob(s) over module names, or a predicate.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: ``where`` is given and matches no parametrized module; an original is also used elsewhere with
            another value, is itself computed by a hook, or is sharded. Nothing has been changed then.
        ValueError: A folded value would not be finite, or a parametrization's own ``assert_valid(name)`` raises;
            nothing has been changed then.
    """
    if (
        where is None
        and not _is_parametrized("", model)
        and not any(_is_parametrized(n, m) for n, m in model.named_modules())
    ):
        return model
    slots = [
        _Site(f"{name}.{attribute}".lstrip("."), module, attribute, held)
        for name, module in select(model, where or _is_parametrized, default=_is_parametrized).items()
        for attribute, held in _of(module).items()
    ]
    for slot in slots:
        for parametrization in slot.held:
            if hasattr(parametrization, "assert_valid"):  # it may know of values that are finite and still wrong
                cast(Any, parametrization).assert_valid(slot.name)
    values = [_evaluate(slot) for slot in slots]
    for slot, value in zip(slots, values, strict=True):
        if not value.isfinite().all():
            raise ValueError(
                f"folding {slot.name} gives values that are not finite; the model is unchanged. "
                "Look at the parametrization's own parameters: training has probably diverged"
            )
    tied, holders = _tied(slots), owners(model, buffers=True)
    for group in tied:
        _check_alone(holders, [slots[i] for i in group], [values[i] for i in group])
    for group in tied:
        heir = _heir([slots[i] for i in group], values[group[0]], holders)
        for i in group:
            _replace(slots[i], heir)
        heir.data = values[group[0]]
    return model


class _Site(NamedTuple):
    name: str  # qualified: module and attribute
    module: nn.Module
    attribute: str
    held: parametrize.ParametrizationList

    @property
    def originals(self) -> list[Tensor]:
        names = ["original"] if self.held.is_tensor else [f"original{i}" for i in range(self.held.ntensors)]
        return [getattr(self.held, name) for name in names]


def _is_parametrized(_name: str, module: nn.Module) -> bool:
    return parametrize.is_parametrized(module)


def _of(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    return dict(cast(nn.ModuleDict, module.parametrizations).items())  # type: ignore[arg-type]


def _evaluate(slot: _Site) -> Tensor:
    with evaluating(slot.held):  # a parametrization with training-time state (spectral norm) must not advance it
        return cast(Tensor, getattr(slot.module, slot.attribute)).detach().clone()


def _tied(slots: list[_Site]) -> list[list[int]]:
    groups: dict[tuple[int, ...], list[int]] = {}
    for i, slot in enumerate(slots):
        groups.setdefault(tuple(map(id, slot.originals)), []).append(i)
    return list(groups.values())


def _check_alone(holders: _Holders, slots: list[_Site], values: list[Tensor]) -> None:
    """Refuse if the weight cannot take the place of its original without changing what else uses that."""
    first = slots[0]
    if any(hasattr(original, "placements") for original in first.originals):
        raise UsageError(
            f"{first.name} is sharded, and what shards it would go on with its own copy: gather the state with "
            "torch.distributed.checkpoint.state_dict.get_model_state_dict, load it into a whole model, and fold that"
        )
    stored = [*first.held._parameters.values(), *first.held._buffers.values()]
    if not all(any(original is tensor for tensor in stored) for original in first.originals):
        raise UsageError(
            f"the original of {first.name} is itself computed by a hook: remove that first, for pruning by "
            f"torch.nn.utils.prune.remove({_get(_list_name(first))}, 'original')"
        )
    for slot, value in zip(slots[1:], values[1:], strict=True):
        if not torch.equal(value, values[0]):
            raise UsageError(f"{_TIED.format(first.name, slot.name)} {_untie(f'{_list_name(slot)}.original')}")
    if not first.held.is_tensor:
        return  # the weight needs no original: it can have a parameter of its own
    for name in _others(holders, first.originals[0], slots):
        if not torch.equal(values[0], first.originals[0]):
            raise UsageError(f"{_TIED.format(first.name, name)} {_untie(name)}")


_TIED = (
    "{0} and {1} share one parameter but not one value, as only one of them is parametrized and folded, or each in its "
    "own way: fold both, or untie them first:"
)


def _untie(name: str) -> str:
    owner, _, attribute = name.rpartition(".")
    return f"owner = {_get(owner)}; owner.{attribute} = torch.nn.Parameter(owner.{attribute}.detach().clone())"


def _list_name(slot: _Site) -> str:
    return f"{slot.name.removesuffix(slot.attribute)}parametrizations.{slot.attribute}"


def _get(name: str) -> str:
    return f"model.get_submodule({name!r})"


def _others(holders: _Holders, original: Tensor, slots: list[_Site]) -> list[str]:
    """Names under which a tensor is used, apart from these slots."""
    known = [slot.held for slot in slots]
    return [slot.name for slot in holders[id(original)] if not any(slot.module is held for held in known)]


def _heir(slots: list[_Site], value: Tensor, holders: _Holders) -> Tensor:
    """Return the tensor that goes on as the weight."""
    originals = slots[0].originals
    if slots[0].held.is_tensor:
        return originals[0]
    trains = any(original.requires_grad for original in originals)
    for original in originals:
        if original.shape == value.shape and original.dtype == value.dtype and not _others(holders, original, slots):
            return original.requires_grad_(trains)
    if any(isinstance(original, nn.Parameter) for original in originals):
        return nn.Parameter(value, trains)
    return value


def _replace(slot: _Site, heir: Tensor) -> None:
    module, attribute = slot.module, slot.attribute
    # deep copies share the class that holds the tensor's property, and torch deletes it there: take a class of our own
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    parametrize.remove_parametrizations(module, attribute, leave_parametrized=not slot.held.is_tensor)
    if not isinstance(heir, nn.Parameter):
        setattr(module, attribute, heir)
        return
    # weights come before biases in every torch layer; re-registering has moved them to the end
    module._buffers.pop(attribute, None)
    others = {name: parameter for name, parameter in module._parameters.items() if name != attribute}
    module._parameters.clear()
    module._parameters[attribute] = heir
    module._parameters.update(others)
