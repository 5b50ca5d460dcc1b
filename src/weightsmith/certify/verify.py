"""The share of examples for which robustness is proved, and how far an attack gets."""

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor, nn

from weightsmith.certify.attack import pgd
from weightsmith.certify.batch_ops import in_training
from weightsmith.certify.bounding import BoundOptions, Method, Rounding, bound_box
from weightsmith.certify.box import Eps, check_labels, input_box
from weightsmith.certify.passes import Options, working_dtype
from weightsmith.certify.precision import full_precision
from weightsmith.certify.propagate import propagate
from weightsmith.certify.traced import Traced
from weightsmith.certify.training import scaled_eps
from weightsmith.core.errors import UsageError
from weightsmith.core.graph import UnsupportedOperation
from weightsmith.core.modes import evaluating


@dataclass(frozen=True, slots=True)
class Certificates:
    """What was found for each example; all of length ``N``, in the order of the loader.

    Attributes:
        labels: The label.
        predictions: What the model says of the unchanged input.
        margins: Smallest lower bound of ``z_y - z_j``; above ``tolerance`` the label is proved for the whole box.
        verified: Whether it is.
        attacked: Whether the model is wrong on the unchanged input or on one that the attack found.
        tolerance: What a margin must exceed: an estimate of the rounding errors of its bound, 0 for outward rounding.
        method: How bounds were computed.
        rounding: Which way they were rounded.
    """

    labels: Tensor
    predictions: Tensor
    margins: Tensor
    verified: Tensor
    attacked: Tensor
    tolerance: Tensor
    method: Method
    rounding: Rounding


class VerifiedError(float):
    """The share of examples that are not proved, in [0, 1], with what belongs to it.

    Attributes:
        standard: Error on unchanged inputs.
        attacked: Error under the attack, a lower bound of the error over the box; ``None`` without an attack.
        certificates: What was found for each example.
    """

    standard: float
    attacked: float | None
    certificates: Certificates

    def __new__(cls, certificates: Certificates, attacked: bool) -> Self:
        """Count."""
        made = super().__new__(cls, 1 - certificates.verified.double().mean().item())
        made.standard = (certificates.predictions != certificates.labels).double().mean().item()
        made.attacked = certificates.attacked.double().mean().item() if attacked else None
        made.certificates = certificates
        return made

    def __getnewargs__(self) -> Any:
        """For copies and pickles."""
        return self.certificates, self.attacked is not None

    @property
    def standard_error(self) -> float:
        """Of the verified error, over examples."""
        count = len(self.certificates.labels)
        return math.sqrt(float(self) * (1 - float(self)) / count)


def verified_error(
    model: nn.Module,
    loader: Iterable[Any],
    eps: float,
    *,
    method: Method = "ibp",
    lower: Any = None,
    upper: Any = None,
    std: Eps = None,
    attack_steps: int = 40,
    restarts: int = 1,
    generator: torch.Generator | None = None,
    options: BoundOptions | None = None,
) -> VerifiedError:
    """Measure the verified error of a classifier, with the standard and the PGD error beside it.

    An example counts as proved when every margin's lower bound exceeds the tolerance of its computation. Always
    ``standard <= PGD <= verified``. The model is in evaluation mode during the call.

    Args:
        model: Gives logits ``(B, K)``.
        loader: Batches ``(x, labels)``; between both may be further inputs, which are known exactly.
        eps: Size of the box, in the units of unnormalized inputs.
        method: See `weightsmith.certify.bounds`.
        lower: Least valid input, in the units of the model's input.
        upper: Largest valid input.
        std: What inputs were divided by, per channel; ``None``: nothing.
        attack_steps: Steps of the attack; 0: none.
        restarts: Random starts of the attack.
        generator: Where they come from.
        options: How bounds are computed.

    Returns:
        The verified error as a number, with the other two and a table of all examples.

    Raises:
        UsageError: The loader is empty, an argument is out of range, or labels do not fit.
        UnsupportedOperation: The model has an operation without bounds.
        ArithmeticError: The attack broke a certificate: rounding errors are larger than estimated. Use float64.
    """
    options, found = options or BoundOptions(), []
    place = next((parameter.device for parameter in model.parameters()), torch.device("cpu"))
    with evaluating(model), torch.no_grad(), full_precision(place.type):
        traced = None
        for batch in loader:
            if not isinstance(batch, tuple | list) or len(batch) < 2:
                raise UsageError(f"loader must give (x, labels), gives {type(batch).__name__}")
            *inputs, labels = (item.to(place) if isinstance(item, Tensor) else item for item in batch)
            outward = options.rounding == "outward"
            dtype = torch.float64 if outward else working_dtype(model, inputs, options.dtype)
            inputs = [i.to(dtype) if isinstance(i, Tensor) and i.is_floating_point() else i for i in inputs]
            traced = traced or Traced(model, tuple(inputs))
            box = input_box(inputs[0], scaled_eps(eps, std, inputs[0]), lower, upper, outward=outward)
            found.append(_certify(traced, inputs, labels, box, method, options, attack_steps, restarts, generator))
    if not found:
        raise UsageError("loader gives no batches")
    columns = [torch.cat([part[index] for part in found]).cpu() for index in range(6)]
    names = ("labels", "predictions", "margins", "verified", "attacked", "tolerance")
    table: dict[str, Any] = dict(zip(names, columns, strict=True))
    return VerifiedError(Certificates(**table, method=method, rounding=options.rounding), attack_steps > 0)


def _certify(
    traced: Traced, inputs: list[Any], labels: Tensor, box: Any, method: Method, options: BoundOptions, steps: int,
    restarts: int, generator: torch.Generator | None,
) -> tuple[Tensor, ...]:  # fmt: skip
    if (norm := next(filter(in_training, traced.graph(inputs).nodes), None)) is not None:
        raise UnsupportedOperation(
            f"node {norm.name!r} normalizes by the batch in evaluation mode too, so that nothing holds for one "
            "example: give it running statistics"
        )
    found = bound_box(traced, (box, *inputs[1:]), inputs, method=method, C=labels, options=options, both=False)
    margins = found.lower.min(1).values
    logits = _logits(traced, inputs)
    check_labels(labels, logits.shape[1])
    verified, predictions = margins > found.tolerance, logits.argmax(1)
    attacked = predictions != labels
    if steps:

        def classify(x: Tensor) -> Tensor:
            return _logits(traced, [x, *inputs[1:]])

        worst = pgd(classify, box, labels, steps=steps, restarts=restarts, generator=generator)
        attacked = attacked | (classify(worst).argmax(1) != labels)
    if bool((attacked & verified).any()):
        raise ArithmeticError(
            f"{int((attacked & verified).sum())} certificates do not hold against the attack: rounding errors exceed "
            f"their estimate {found.tolerance:.3g}; use BoundOptions(dtype=torch.float64)"
        )
    tolerance = margins.new_full((len(labels),), found.tolerance)
    return labels, predictions, margins, verified, attacked, tolerance


def _logits(traced: Traced, inputs: list[Any]) -> Tensor:
    """Outputs by the traced operations, in the type that bounds are computed in."""
    graph = traced.graph(inputs)
    done = propagate(graph, inputs, options=Options(dtype=inputs[0].dtype, update=False))
    found: Tensor = done.values[graph.output]
    return found
