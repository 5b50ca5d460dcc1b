"""Put companders on a model's weights; list and validate them."""

from collections.abc import Iterator
from functools import reduce
from typing import NamedTuple, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightsmith.core.errors import UsageError, unknown
from weightsmith.core.select import Where, select
from weightsmith.core.tied import declare_shared_
from weightsmith.core.weights import Slot, check_plain, is_linear, owners, why_computed
from weightsmith.reparam.compander import CLIP, WeightCompander
from weightsmith.reparam.curves import Curve

Model = TypeVar("Model", bound=nn.Module)


class Site(NamedTuple):
    """One companded weight: its qualified name, what trains, what maps that to the weight, and whose weight it is."""

    name: str
    v: Tensor
    compander: WeightCompander
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
    choosing one of its owners compands all of them, with a single inversion. Build the optimizer afterwards.

    Args:
        model: Changed in place, after everything has been checked.
        a: Height of the curve; the paper's best lie in 0.5 to 1.0. The paper starts learned ones from 0.5.
        b: Width of the curve; the paper's best lie in 0.5 to 1.0. The paper starts learned ones from 1.0.
        fn: ``"arctan"`` (the Weight Compander), ``"arcsinh"``, ``"erf"`` or your own `Curve`.
        learnable: Train ``a`` and ``b`` along with the weights.
        share: One learned pair per ``"layer"`` (the paper's *fine*) or one for the whole ``"model"`` (*coarse*).
        where: Which modules: ``None`` (every linear and convolution layer, first and last included), glob(s) over
            module names, or a predicate; any module with a parameter ``weight`` can be named.
        overflow: What to do with weights that the curve cannot reach: ``"error"``, or ``"clip"`` to 0.95 of the bound.
        positive: Keep learned ``a`` and ``b`` above 0 through a softplus.
        allow_existing: Put the compander on top of a parametrization that is already there (spectral norm, ...). The
            start is then not matched, and `add_weight_decay_grad_` and `InWeightSpace` skip such weights.
        include_frozen: Also compand weights that do not require gradients; they and their own pairs stay frozen.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: An argument is out of range, nothing matches, a weight is out of the curve's reach, not
            materialized, companded already, or made by something else.
        TypeError: A weight is sparse, complex, quantized, or has sparse gradients.
    """
    if share not in ("layer", "model"):
        raise unknown("share", share, ("layer", "model"))

    def new(*tensors: Tensor) -> WeightCompander:
        compander = WeightCompander(a, b, fn, learnable=learnable, positive=positive, overflow=overflow)
        dtype = reduce(torch.promote_types, (tensor.dtype for tensor in tensors), torch.float32)
        return compander.to(tensors[0].device, dtype)

    chosen = select(model, where, default=is_linear, supported=_has_weight)
    on_top = {name: module for name, module in chosen.items() if _is_written_already(name, module, allow_existing)}
    weights = {
        id(weight): weight
        for name, module in chosen.items()
        if name not in on_top and isinstance(weight := module._parameters["weight"], Tensor)
        if weight.requires_grad or include_frozen
    }
    if not weights and not on_top:
        raise UsageError("every matching weight is frozen: pass include_frozen=True to compand it all the same")
    slots = owners(model)
    for key in weights:
        _check(slots[key])
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
    """Check that every ``a`` and ``b`` is finite and above 0; call it before folding a model with learned pairs.

    Raises:
        UsageError: One is not; the message names it.
    """
    for name, module in model.named_modules():
        if isinstance(module, WeightCompander):
            module.assert_valid(name)


def _has_weight(_name: str, module: nn.Module) -> bool:
    # not hasattr: it would run a parametrization that may be there, and spectral norm's has side effects
    return (
        module._parameters.get("weight") is not None
        or parametrize.is_parametrized(module, "weight")
        or isinstance(vars(module).get("weight"), Tensor)
    )


def _is_written_already(name: str, module: nn.Module, allow_existing: bool) -> bool:
    weight = f"{name}.weight".lstrip(".")
    reason, on_top = why_computed(module), parametrize.is_parametrized(module, "weight")
    if on_top:
        kinds = [type(parametrization) for parametrization in module.parametrizations.weight]  # type: ignore[union-attr]
        if any(issubclass(kind, WeightCompander) for kind in kinds):
            raise UsageError(f"{weight} is companded already: call fold_ on the model first")
        if any(getattr(kind, "final", False) for kind in kinds):
            raise UsageError(
                f"{weight} is quantized by {kinds[-1].__name__}: a curve would move it off its grid. Leave the module "
                "out of where=, or compand_ and fold_ before prepare_ofq_"
            )
        if allow_existing:
            return True
    if reason:
        also = ", leave the module out of where=, or pass allow_existing=True to compand on top" if on_top else ""
        raise UsageError(f"{weight} {reason}{also}")
    return False


def _sample(module: nn.Module) -> Tensor:
    """Return a parameter that tells where a parametrized module lives."""
    return next(module.parameters())


def _check(slots: list[Slot]) -> None:
    name = slots[0].name
    check_plain(name, slots[0].module, slots[0].attribute)
    if any(isinstance(slot.module, parametrize.ParametrizationList) for slot in slots):
        raise UsageError(f"{name} is tied to a tensor that is parametrized already: call fold_ on the model first")
    if any(getattr(slot.module, "sparse", False) is True for slot in slots):
        raise TypeError(
            f"{name} has sparse gradients, which a curve cannot pass on: build its Embedding with sparse=False"
        )
