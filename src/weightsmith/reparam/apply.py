"""Put companders on a model's weights, find them again, and ask after their health."""

from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedParameter
from torch.nn.utils import parametrize

from weightsmith.core.errors import UsageError, unknown
from weightsmith.core.select import Where, select
from weightsmith.core.tied import declare_shared_
from weightsmith.reparam.compander import CLIP, WeightCompander
from weightsmith.reparam.curves import Curve

Model = TypeVar("Model", bound=nn.Module)

_LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


class Site(NamedTuple):
    """One companded weight: its qualified name, what trains, what maps that to the weight, and whose weight it is."""

    name: str
    v: Tensor
    compander: WeightCompander
    module: nn.Module
    attribute: str


class _Slot(NamedTuple):
    name: str  # qualified: module and attribute
    module: nn.Module
    attribute: str


@torch.no_grad()
def compand_(
    model: Model,
    a: float = 0.7,
    b: float = 0.7,
    *,
    fn: str | Curve = "arctan",
    learnable: bool = False,
    share: str = "layer",
    where: Where = None,
    overflow: str = "error",
    positive: bool = False,
    allow_existing: bool = False,
    include_frozen: bool = False,
) -> Model:
    """Write weights as ``w = a * phi(v / b)`` and train ``v``; outputs do not change at the start.

    Each weight parameter keeps its identity and now holds ``v = b * phi^-1(w / a)``. A tied weight is one weight:
    choosing one of its owners compands all of them, with a single inversion. Build the optimiser afterwards.

    Args:
        model: Changed in place, after everything has been checked.
        a: Height of the curve; the paper's best lie in 0.5 to 1.0, for ``learnable=True`` it starts from 0.5.
        b: Width of the curve; the paper's best lie in 0.5 to 1.0, for ``learnable=True`` it starts from 1.0.
        fn: ``"arctan"`` (the Weight Compander), ``"arcsinh"``, ``"erf"`` or your own `Curve`.
        learnable: Train ``a`` and ``b`` along with the weights.
        share: One learnt pair per ``"layer"`` (the paper's *fine*) or one for the whole ``"model"`` (*coarse*).
        where: Which modules: ``None`` (every linear and convolution layer, first and last included), glob(s) over
            module names, or a predicate; any module with a parameter ``weight`` can be named.
        overflow: What to do with weights that the curve cannot reach: ``"error"``, or ``"clip"`` to 0.95 of the bound.
        positive: Keep learnt ``a`` and ``b`` above 0 through a softplus.
        allow_existing: Put the compander on top of a parametrization that is already there (spectral norm, ...). The
            start is then not matched, and `add_weight_decay_grad_` and `InWeightSpace` pass such weights by.
        include_frozen: Also compand weights that do not require gradients; they and their own pairs stay frozen.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: An argument is out of range, nothing matches, a weight is out of the curve's reach, not
            materialised, companded already, or made by something else.
        TypeError: A weight is sparse, complex, quantised, or has sparse gradients.
    """
    if share not in ("layer", "model"):
        raise unknown("share", share, ("layer", "model"))

    def new(*tensors: Tensor) -> WeightCompander:
        compander = WeightCompander(a, b, fn, learnable=learnable, positive=positive, overflow=overflow)
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
        return compander.to(tensors[0].device, dtype)

    chosen = select(model, where, default=_is_layer, supported=_has_weight)
    on_top = {name: module for name, module in chosen.items() if _is_written_already(name, module, allow_existing)}
    weights = {
        id(weight): weight
        for name, module in chosen.items()
        if name not in on_top and isinstance(weight := module._parameters["weight"], Tensor)
        if weight.requires_grad or include_frozen
    }
    if not weights and not on_top:
        raise UsageError("every matching weight is frozen: pass include_frozen=True to compand it all the same")
    slots = _slots(model)
    for key, weight in weights.items():
        _check_tensor(weight, slots[key])
    shared = new(*weights.values(), *(_sample(module) for module in on_top.values()))
    starts = shared.admit({slots[key][0].name: weight for key, weight in weights.items()})
    for name, start in starts.items():
        shared.invert(start, name)

    for weight, start in zip(weights.values(), starts.values(), strict=True):
        compander = shared if share == "model" else new(weight).requires_grad_(weight.requires_grad)
        start = start.clone()
        for index, (_, module, attribute) in enumerate(slots[id(weight)]):
            weight.copy_(start)  # registering inverts what it finds: each owner of a tied weight must find the start
            parametrize.register_parametrization(module, attribute, compander)
            if index:
                declare_shared_(module, attribute)
    for module in on_top.values():
        compander = shared if share == "model" else new(_sample(module))
        parametrize.register_parametrization(module, "weight", compander, unsafe=True)
    if share == "model":
        for site in list(sites(model, every_owner=True))[1:]:
            declare_shared_(site.module, site.attribute, "0.")
    return model


def sites(model: nn.Module, *, every_owner: bool = False) -> Iterator[Site]:
    """Yield every companded weight.

    Companders that lie on top of another parametrization are left out: what trains there is not ``v``.

    Args:
        model: Any module.
        every_owner: Yield a tied weight once for each of its owners, not only under its first name.
    """
    seen: set[int] = set()
    for name, module in model.named_modules():
        if not parametrize.is_parametrized(module):
            continue
        for attribute, held in cast(nn.ModuleDict, module.parametrizations).items():
            first = cast(parametrize.ParametrizationList, held)[0]
            if isinstance(first, WeightCompander) and (every_owner or id(held.original) not in seen):
                seen.add(id(held.original))
                yield Site(f"{name}.{attribute}".lstrip("."), cast(Tensor, held.original), first, module, attribute)


@torch.no_grad()
def saturation_report(model: nn.Module) -> dict[str, float]:
    """Return the fraction of weights beyond 0.95 of their bound, by weight name.

    There the slope is below 0.7 % of that at zero (arctan): such weights are all but frozen.
    """
    return {
        name: float((compander(v).abs() > CLIP * compander.bound).double().mean())
        for name, v, compander, *_ in sites(model)
    }


def assert_valid(model: nn.Module) -> None:
    """Check that every ``a`` and ``b`` is finite and above 0; call it before folding a model with learnt pairs.

    Raises:
        UsageError: One is not; the message names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, WeightCompander):
            module.assert_valid(name)


def _is_layer(_name: str, module: nn.Module) -> bool:
    return isinstance(module, _LAYERS)


def _has_weight(_name: str, module: nn.Module) -> bool:
    # not hasattr: it would run a parametrization that may be there, and spectral norm's has side effects
    return (
        module._parameters.get("weight") is not None
        or parametrize.is_parametrized(module, "weight")
        or isinstance(vars(module).get("weight"), Tensor)
    )


def _is_written_already(name: str, module: nn.Module, allow_existing: bool) -> bool:
    if parametrize.is_parametrized(module, "weight"):
        kinds = [type(parametrization) for parametrization in module.parametrizations.weight]  # type: ignore[union-attr]
        if any(issubclass(kind, WeightCompander) for kind in kinds):
            raise UsageError(f"{name or type(module).__name__} is companded already: fold_ it first")
        if any(getattr(kind, "final", False) for kind in kinds):
            raise UsageError(
                f"the weight of {name or type(module).__name__} is quantized by {kinds[-1].__name__}: a curve would "
                "move it off its grid. Leave the module out of where, or compand_ and fold_ before prepare_ofq_"
            )
        if not allow_existing:
            raise UsageError(
                f"the weight of {name or type(module).__name__} is parametrised by {kinds[-1].__name__} already: "
                "remove that, leave the module out of where, or pass allow_existing=True to compand on top"
            )
        return True
    if "weight" not in module._parameters:
        raise UsageError(
            f"the weight of {name or type(module).__name__} comes from a hook (weight norm, spectral norm, pruning): "
            "remove that first, or leave the module out of where"
        )
    return False


def _sample(module: nn.Module) -> Tensor:
    """Return a parameter that tells where a parametrised module lives."""
    return next(module.parameters())


def _slots(model: nn.Module) -> dict[int, list[_Slot]]:
    slots: dict[int, list[_Slot]] = {}
    for name, module in model.named_modules():
        for attribute, parameter in module._parameters.items():
            slots.setdefault(id(parameter), []).append(_Slot(f"{name}.{attribute}".lstrip("."), module, attribute))
    return slots


def _check_tensor(weight: Tensor, slots: list[_Slot]) -> None:
    name = slots[0].name
    if isinstance(weight, UninitializedParameter):
        raise UsageError(f"{name} is lazy: run one batch through the model first")
    if weight.is_meta:
        raise UsageError(f"{name} is on the meta device: materialise the model and load its weights first")
    if weight.layout is not torch.strided or weight.dtype not in _DTYPES:
        raise TypeError(
            f"{name} must be a dense float16, bfloat16, float32 or float64 tensor, got {weight.dtype}, {weight.layout}"
        )
    if any(isinstance(slot.module, parametrize.ParametrizationList) for slot in slots):
        raise UsageError(f"{name} is tied to a tensor that is parametrised already: fold_ that first")
    if any(getattr(slot.module, "sparse", False) is True for slot in slots):
        raise TypeError(
            f"{name} has sparse gradients, which a curve cannot pass on: build its Embedding with sparse=False"
        )
