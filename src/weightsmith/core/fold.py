"""``fold_``: bake every parametrization into plain weights, so that the model is again what the user brought.

A technique that changes how a weight is written registers a ``torch.nn.utils.parametrize`` parametrization. Folding
evaluates it once and puts the result where the weight was: same class, same keys, same outputs.
"""

from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from weightsmith.core.select import Where, select

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def fold_(model: Model, *, where: Where = None) -> Model:
    """Replace every parametrised tensor by its present value, in place.

    All values are computed before anything is replaced, so tensors that share their originals (tied weights) fold to
    the same value and stay tied. A parameter that one original stood for keeps its identity: an optimiser that was
    built on it goes on working.

    Args:
        model: Any module; one without parametrizations is returned as it is.
        where: Which parametrised modules to fold: ``None`` (all), glob(s) over module names, or a predicate.

    Returns:
        ``model`` itself.

    Raises:
        UsageError: ``where`` is given and matches no parametrised module.
        ValueError: A folded value would not be finite, or a parametrization's own ``assert_valid(name)`` raises;
            nothing has been changed then.
    """
    if (
        where is None
        and not _is_parametrized("", model)
        and not any(_is_parametrized(n, m) for n, m in model.named_modules())
    ):
        return model
    modules = select(model, where, default=_is_parametrized)
    for name, module in modules.items():
        for tensor_name, held in _of(module).items():
            for parametrization in held:
                if hasattr(parametrization, "assert_valid"):  # it may know of values that are finite and still wrong
                    cast(Any, parametrization).assert_valid(f"{name}.{tensor_name}".lstrip("."))
    values = {
        (name, tensor_name): _evaluate(module, tensor_name)
        for name, module in modules.items()
        for tensor_name in _of(module)
    }
    for (name, tensor_name), value in values.items():
        if not value.isfinite().all():
            raise ValueError(
                f"folding {f'{name}.{tensor_name}'.lstrip('.')} gives values that are not finite; "
                "the model is unchanged. Look at the parametrization's own parameters: training has probably diverged"
            )
    tied: dict[tuple[int, ...], Tensor] = {}
    for name, module in modules.items():
        for tensor_name in _of(module):
            _replace(module, tensor_name, values[name, tensor_name], tied)
    return model


def _is_parametrized(_name: str, module: nn.Module) -> bool:
    return parametrize.is_parametrized(module)


def _of(module: nn.Module) -> dict[str, parametrize.ParametrizationList]:
    return dict(cast(nn.ModuleDict, module.parametrizations).items())  # type: ignore[arg-type]


def _evaluate(module: nn.Module, tensor_name: str) -> Tensor:
    held = _of(module)[tensor_name]
    training = held.training
    try:
        held.eval()  # a parametrization with training-time state (spectral norm) must not advance it
        return getattr(module, tensor_name).detach().clone()
    finally:
        held.train(training)


def _replace(module: nn.Module, tensor_name: str, value: Tensor, tied: dict[tuple[int, ...], Tensor]) -> None:
    held = _of(module)[tensor_name]
    originals = (
        [held.original] if held.is_tensor else [getattr(held, f"original{index}") for index in range(held.ntensors)]
    )
    # deep copies share the class that holds the tensor's property, and torch deletes it there: take a class of our own
    shared = type(module)
    module.__class__ = type(shared.__name__, shared.__bases__, dict(vars(shared)))
    parametrize.remove_parametrizations(module, tensor_name, leave_parametrized=not held.is_tensor)
    key = tuple(id(original) for original in originals)
    left = tied.setdefault(key, getattr(module, tensor_name))
    left.data = value
    if not isinstance(left, nn.Parameter):
        return
    left.requires_grad_(any(original.requires_grad for original in originals))
    # weights come before biases in every torch layer; re-registering has moved them to the end
    others = {name: parameter for name, parameter in module._parameters.items() if name != tensor_name}
    module._parameters.clear()
    module._parameters[tensor_name] = left
    module._parameters.update(others)
