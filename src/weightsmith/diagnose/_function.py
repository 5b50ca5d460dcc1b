"""A model as a function from some of its parameters to ``(N, O)`` real outputs, one row per sample."""

import dataclasses
import hashlib
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_flatten, tree_unflatten

from weightsmith.core.errors import UsageError
from weightsmith.core.modes import evaluating, untouched
from weightsmith.core.parameters import WhereParameter, select_parameters
from weightsmith.core.weights import why_empty

Outputs = Callable[[Any], Tensor] | None
_FIELDS = ("logits", "prediction_logits", "last_hidden_state", "start_logits")


@dataclass
class Function:
    """What is differentiated.

    Attributes:
        model: The model.
        params: The chosen parameters by first name; a tied one counts once.
        inputs: What the model is called with.
        outputs: Maps what the model returns to ``(N, O)``; ``None``: found.
        batch_dim: Where inputs, and outputs that are found, count samples.
        combine: ``(N, O)``, fixed numbers that combine the outputs of a sample into one; ``None``: all outputs.
    """

    model: nn.Module
    params: dict[str, nn.Parameter]
    inputs: Any
    outputs: Outputs
    batch_dim: int
    combine: Tensor | None = None

    def __post_init__(self) -> None:
        self.leaves, self.spec = tree_flatten(as_call(self.inputs))
        self.samples = count(self.inputs, self.batch_dim)
        self.mapped = [self._is_mapped(leaf) for leaf in self.leaves]

    def _is_mapped(self, leaf: Any) -> bool:
        return isinstance(leaf, Tensor) and leaf.dim() > self.batch_dim and leaf.shape[self.batch_dim] == self.samples

    @property
    def device(self) -> torch.device:
        """Where the parameters are."""
        return next(iter(self.params.values())).device

    def batch(self, params: Mapping[str, Tensor] | None = None) -> Tensor:
        """Outputs of all samples, ``(N, O)``."""
        return self._call(self.leaves, params, self.combine, self.samples)

    def sample(self, params: Mapping[str, Tensor], *varying: Tensor) -> Tensor:
        """Outputs ``(O,)`` of one sample; ``varying`` are its parts of the mapped inputs, and of ``combine``."""
        own = iter(varying)
        leaves = [
            next(own).unsqueeze(self.batch_dim) if mapped else leaf
            for leaf, mapped in zip(self.leaves, self.mapped, strict=True)
        ]
        combine = next(own)[None] if self.combine is not None else None
        return self._call(leaves, params, combine, 1)[0]

    def varying(self, first: int, last: int) -> tuple[list[Tensor], list[int]]:
        """What ``sample`` takes for a range of samples, stacked, and along which dimension."""
        pieces = [leaf for leaf, mapped in zip(self.leaves, self.mapped, strict=True) if mapped]
        found = [piece.narrow(self.batch_dim, first, last - first) for piece in pieces]
        dims = [self.batch_dim] * len(found)
        return (found, dims) if self.combine is None else ([*found, self.combine[first:last]], [*dims, 0])

    def part(self, first: int, last: int) -> "Function":
        """The same for a range of samples."""
        leaves = [
            leaf.narrow(self.batch_dim, first, last - first) if mapped else leaf
            for leaf, mapped in zip(self.leaves, self.mapped, strict=True)
        ]
        combine = None if self.combine is None else self.combine[first:last]
        return dataclasses.replace(self, inputs=tree_unflatten(leaves, self.spec), combine=combine)

    def _everywhere(self, params: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Parameters by all places that hold them; a module that is used under two names is one place.

        Torch's own ``tie_weights`` counts it twice, and leaves the module with what it was called with.
        """
        known = {id(parameter): name for name, parameter in self.params.items() if name in params}
        places = {
            f"{prefix}.{name}" if prefix else name: known.get(id(parameter))
            for prefix, module in self.model.named_modules()
            for name, parameter in module._parameters.items()
        }
        return {place: params[name] for place, name in places.items() if name is not None}

    def _call(
        self, leaves: list[Any], params: Mapping[str, Tensor] | None, combine: Tensor | None, samples: int
    ) -> Tensor:
        args, kwargs = tree_unflatten(leaves, self.spec)
        returned = (
            self.model(*args, **kwargs)
            if params is None
            else functional_call(self.model, self._everywhere(params), args, kwargs, tie_weights=False)
        )
        found = rows(returned, self.outputs, self.batch_dim, samples)
        return found if combine is None else (found * combine.to(found)).sum(1, keepdim=True)


def as_call(inputs: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Positional and keyword arguments that some inputs stand for."""
    if isinstance(inputs, Mapping):
        return (), dict(inputs)
    if isinstance(inputs, tuple) and len(inputs) == 2 and isinstance(inputs[0], tuple) and isinstance(inputs[1], dict):
        return inputs
    return (tuple(inputs), {}) if isinstance(inputs, tuple | list) else ((inputs,), {})


def count(inputs: Any, batch_dim: int) -> int:
    """Number of samples of some inputs."""
    tensors = [leaf for leaf in tree_flatten(as_call(inputs))[0] if isinstance(leaf, Tensor)]
    if not tensors or tensors[0].dim() <= batch_dim or not tensors[0].shape[batch_dim]:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        raise UsageError(f"inputs must hold samples along dimension {batch_dim} of their first tensor, got {shapes}")
    return tensors[0].shape[batch_dim]


def take(inputs: Any, batch_dim: int, most: int) -> Any:
    """The first samples of some inputs."""
    samples = count(inputs, batch_dim)
    leaves, spec = tree_flatten(inputs)
    return tree_unflatten(
        [
            leaf.narrow(batch_dim, 0, min(most, samples))
            if isinstance(leaf, Tensor) and leaf.dim() > batch_dim and leaf.shape[batch_dim] == samples
            else leaf
            for leaf in leaves
        ],
        spec,
    )


def digest(inputs: Any) -> str:
    """Changes with any bit of some inputs."""
    total = hashlib.sha256()
    for leaf in tree_flatten(inputs)[0]:
        if isinstance(leaf, Tensor):
            total.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            total.update(leaf.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
        else:
            total.update(repr(leaf).encode())
    return total.hexdigest()[:16]


def rows(returned: Any, outputs: Outputs, batch_dim: int, samples: int) -> Tensor:
    """What a model returns as real numbers ``(N, O)``."""
    if outputs is not None:
        found = outputs(returned)
        if not isinstance(found, Tensor) or found.dim() < 1 or len(found) != samples:
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UsageError(f"outputs must return (N, O) for N = {samples} samples, got {shape}")
    else:
        first = first_tensor(returned)
        if first is None:
            raise UsageError(
                f"the model returns {type(returned).__name__}, in which no tensor is found: "
                "give outputs=, a function that maps it to (N, O)"
            )
        if first.dim() <= batch_dim or first.shape[batch_dim] != samples:
            raise UsageError(
                f"the model returns shape {tuple(first.shape)}, without the {samples} samples along dimension "
                f"{batch_dim}: give outputs=, a function that maps it to (N, O)"
            )
        found = first.movedim(batch_dim, 0)
    if found.is_complex():
        found = torch.view_as_real(found)
    if not found.is_floating_point():
        raise UsageError(f"outputs must be floating-point numbers, got {found.dtype}: they have no derivative")
    return found.reshape(samples, -1)


def first_tensor(returned: Any) -> Tensor | None:
    """The main tensor of what a module returns: logits where there are any, else the first that is found."""
    if isinstance(returned, Tensor):
        return returned
    if dataclasses.is_dataclass(returned) and not isinstance(returned, Mapping | type):
        returned = {field.name: getattr(returned, field.name) for field in dataclasses.fields(returned)}
    if isinstance(returned, Mapping):
        named = [returned[name] for name in _FIELDS if isinstance(returned.get(name), Tensor)]
        rest = [value for name, value in returned.items() if name != "loss"]
        return next((tensor for value in [*named, *rest] if (tensor := first_tensor(value)) is not None), None)
    if isinstance(returned, tuple | list):
        return next((tensor for value in returned if (tensor := first_tensor(value)) is not None), None)
    return None


def chosen(model: nn.Module, where: WhereParameter) -> dict[str, nn.Parameter]:
    """Parameters by first name; ``None``: all that are trained.

    Raises:
        UsageError: The model is wrapped or sharded, nothing matches, or a parameter has no values.
    """
    if isinstance(model, DistributedDataParallel):
        raise UsageError("model is wrapped for several processes: probe model.module, on one of them")
    found = select_parameters(model, where, default=lambda _, parameter: parameter.requires_grad)
    for name, (parameter, _) in found.items():
        if hasattr(parameter, "placements") or "FlatParam" in type(parameter).__name__:
            raise UsageError(f"{name} is sharded over processes: gather the whole model on one of them and probe that")
        if reason := why_empty(parameter):
            raise UsageError(f"{name} {reason}")
    floats = {
        name: parameter
        for name, (parameter, _) in found.items()
        if parameter.is_floating_point() or parameter.is_complex()
    }
    if not floats:
        raise UsageError(f"params={where!r} matches integer parameters alone, which have no derivative")
    return floats


@contextmanager
def quietly(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, gradients for all parameters, random generators and buffers as they were afterwards."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    fast = torch.backends.mha.get_fastpath_enabled()
    try:
        torch.backends.mha.set_fastpath_enabled(False)  # it passes by the layers inside
        with (
            untouched(model),
            evaluating(model),
            torch.random.fork_rng(devices),
            torch.enable_grad(),
            torch.backends.cudnn.flags(enabled=False),  # its recurrent layers have no second or forward derivative
            sdpa_kernel(SDPBackend.MATH),  # nor have fused attentions
            warnings.catch_warnings(),
        ):
            warnings.filterwarnings("ignore", ".*performance drop.*batching rule")
            for parameter, _ in flags:
                if parameter.is_floating_point() or parameter.is_complex():
                    parameter.requires_grad_(True)
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
        for parameter, flag in flags:
            parameter.requires_grad_(flag)
