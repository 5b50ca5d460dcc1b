"""The classifier at the end of a model: which layers can be one, and how it grows with the classes."""

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, WeightsmithWarning, unknown
from weightsmith.core.weights import owners, why_computed

Head = nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d
HeadInit = Literal["reinit", "grow"]


def rows(head: Head) -> Tensor:
    """The weight as ``(n, d)``, a view: one row per class."""
    return head.weight.flatten(1)


def check_head(head: nn.Module) -> Head:
    """Refuse what is no linear classifier.

    Raises:
        TypeError: It is neither ``nn.Linear`` nor a convolution of size 1.
    """
    if isinstance(head, nn.Linear):
        return head
    if isinstance(head, nn.Conv1d | nn.Conv2d | nn.Conv3d) and set(head.kernel_size) == {1} and head.groups == 1:
        return head
    raise TypeError(f"head must be nn.Linear or a convolution of kernel size 1 and one group, got {head!r}")


def check_own_weight(model: nn.Module, head: Head) -> None:
    """Refuse a head whose weight is used elsewhere in the model, or computed from other tensors.

    Raises:
        UsageError: Names the other user of the weight.
    """
    if reason := why_computed(head):
        raise UsageError(f"the head's weight {reason}; or measure alone, with fold=False or apply='logits'")
    others = [slot.name for slot in owners(model)[id(head.weight)] if slot.module is not head]
    if others:
        raise UsageError(f"the head's weight is tied to {others[0]!r}, which would change with it: untie them first")


def find_head(model: nn.Module, name: str) -> Head:
    """The head by its dotted name.

    Raises:
        UsageError: There is no such module.
        TypeError: It is no linear classifier.
    """
    modules = dict(model.named_modules())
    if name not in modules:
        heads = [key for key, module in modules.items() if isinstance(module, nn.Linear | nn.Conv2d)]
        raise unknown("head", name, reversed(heads))
    return check_head(modules[name])


def head_name(model: nn.Module, head: str | Callable[[nn.Module], nn.Module]) -> str:
    """The dotted name of a head that is given by it, or by a function that takes it out of the model.

    Raises:
        UsageError: What the function returns is not part of the model.
    """
    if isinstance(head, str):
        return head
    found = head(model)
    names = [name for name, module in model.named_modules() if module is found]
    if not names:
        raise UsageError(f"head must return a module of the model, got {type(found).__name__} from elsewhere")
    return str(names[0])


def fresh_head(head: Head, n_classes: int, *, bias: bool | None = None) -> Head:
    """A head like this one with new weights: same class, device, dtype, training mode, and frozen if it is frozen."""
    options: dict[str, Any] = {
        "bias": head.bias is not None if bias is None else bias,
        "device": head.weight.device,
        "dtype": head.weight.dtype,
    }
    made: Head
    if isinstance(head, nn.Linear):
        made = nn.Linear(head.in_features, n_classes, **options)
    else:
        made = type(head)(head.in_channels, n_classes, 1, head.stride, head.padding, **options)  # type: ignore[arg-type]
    made.requires_grad_(head.weight.requires_grad)
    return made.train(head.training)


def expand_head(head: nn.Module, n_classes: int, *, init: HeadInit = "reinit", bias: bool | None = None) -> Head:
    """Make a head for more classes; the given one stays as it is.

    Args:
        head: ``nn.Linear`` or 1x1 convolution, weight ``(n, d, ...)``, one row per class in order of arrival.
        n_classes: Rows of the new head, at least ``n``.
        init: ``"reinit"``: all rows start anew, as in the authors' code; ``"grow"``: the old rows are copied.
        bias: Whether the new head has a bias; ``None``: as the old one.

    Returns:
        A head of the same class, device, dtype and training mode, with torch's default initialization.

    Raises:
        UsageError: ``n_classes`` is smaller than now, or ``init`` is not known.
        TypeError: The head is no linear classifier.

    Source: the authors' ``main.py`` (reinit), PyCIL's ``inc_net.py`` (grow).
    """
    head = check_head(head)
    n = head.weight.shape[0]
    if init not in ("reinit", "grow"):
        raise unknown("init", init, ["reinit", "grow"])
    if isinstance(n_classes, bool) or not isinstance(n_classes, int) or n_classes < n:
        raise UsageError(f"n_classes must be an integer of at least the {n} classes of the head, got {n_classes!r}")
    made = fresh_head(head, n_classes, bias=bias)
    if init == "grow":
        with torch.no_grad():
            made.weight[:n] = head.weight
            if made.bias is not None:
                made.bias[:n] = head.bias if head.bias is not None else 0.0
    return made


def expand_head_(
    model: nn.Module,
    n_classes: int,
    head: str | Callable[[nn.Module], nn.Module],
    *,
    init: HeadInit = "reinit",
    bias: bool | None = None,
) -> nn.Module:
    """Replace the head of a model by one for more classes.

    A transformers model's config learns the number of labels: ``num_labels``, ``id2label`` and ``label2id``. Optimizers
    have to be made anew, since they hold the parameters of the old head.

    Args:
        model: Changed in place.
        n_classes: Classes of the new head.
        head: Dotted name of the head, or a function that takes it out of the model.
        init: See `expand_head`.
        bias: See `expand_head`.

    Returns:
        The model.

    Raises:
        UsageError: See `expand_head`; or the head's weight is tied or parametrized.
        TypeError: The head is no linear classifier.
    """
    name = head_name(model, head)
    old = find_head(model, name)
    check_own_weight(model, old)
    return replace_head_(model, name, expand_head(old, n_classes, init=init, bias=bias))


def replace_head_(model: nn.Module, name: str, head: Head) -> nn.Module:
    """Put another head into a model; transformers models that hold it learn the number of labels."""
    n_classes = head.weight.shape[0]
    old = model.get_submodule(name)
    for module in list(model.modules()):
        for attribute, child in module._modules.items():
            if child is old:  # under all its names
                module._modules[attribute] = head
    parts = name.split(".")
    for depth in range(len(parts)):  # the transformers model may be inside a PEFT model or a module of the user
        holder: Any = model.get_submodule(".".join(parts[:depth]))
        config = holder.__dict__.get("config")
        if not isinstance(getattr(config, "id2label", None), dict):
            continue
        named = {index: config.id2label.get(index, f"LABEL_{index}") for index in range(n_classes)}
        config.id2label, config.label2id = named, {label: index for index, label in named.items()}
        if getattr(config, "problem_type", None) == "regression":  # what a model with one label has made of itself
            config.problem_type = None
        if "num_labels" in holder.__dict__:
            holder.num_labels = n_classes
    return model


@torch.no_grad()
def clip_head_(head: nn.Module) -> nn.Module:
    """Set negative weights of a head to 0: ``W <- max(W, 0)``; the bias stays.

    For features that are never negative, such as those behind a ReLU: then the norm of a row says how large its logit
    can be.

    Args:
        head: ``nn.Linear`` or 1x1 convolution, changed in place.

    Returns:
        The head.

    Raises:
        TypeError: The head is no linear classifier.

    Source: the authors' code, "restriction" of ``iLearn.train_model``.
    """
    check_head(head).weight.clamp_(min=0)
    return head


@contextmanager
def warning_of_negative(head: nn.Module) -> Iterator[None]:
    """Warn if a head is given negative features."""

    def look(_: nn.Module, inputs: tuple[Any, ...]) -> None:
        if bool((inputs[0] < 0).any()):
            warnings.warn(
                "restrict=True keeps the head's weights at 0 or above, but its features have negative entries: a row's "
                "norm then says little about its logits; leave restrict off without a final ReLU",
                WeightsmithWarning,
                stacklevel=2,
            )

    handle = head.register_forward_pre_hook(look)
    try:
        yield
    finally:
        handle.remove()
