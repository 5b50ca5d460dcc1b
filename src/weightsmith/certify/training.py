"""Certified training with a short warmup, as a loss in one's own loop (arXiv 2103.17268)."""

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weightsmith.certify.batchnorm import add_batchnorm_
from weightsmith.certify.bounding import BoundOptions
from weightsmith.certify.box import Eps, check_labels, input_box
from weightsmith.certify.objectives import OBJECTIVES, Objective, Step
from weightsmith.certify.passes import working_dtype
from weightsmith.certify.regularizers import BoundRegularizer, Regularization
from weightsmith.certify.schedule import EpsilonSchedule
from weightsmith.certify.traced import Traced
from weightsmith.core.errors import UsageError, unknown
from weightsmith.core.modes import evaluating
from weightsmith.init import ibp_

_SMALLEST = 1e-6
"""Size of the box by which the regularizers see anything while the box itself is still a point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """The parts of certified training, each of which can be left out.

    Attributes:
        objective: ``"ibp"``, ``"crown-ibp"``, ``"sabr"``, ``"mtl-ibp"``, or an instance such as ``SABR(share=0.1)``.
        initialize: Draw first weights by `weightsmith.init.ibp_`.
        batchnorm: Put batch norm behind every hidden layer that has none.
        regularizer: Used until the box has its full size; ``None``: none.
        weight: Of the regularizers at first (lambda_0); it falls with the box's size to 0.
        kappa_start: Weight of the clean cross-entropy while the box is a point.
        kappa_end: Its weight at full size, linear in between; the robust loss has the rest.
    """

    objective: str | Objective = "ibp"
    initialize: bool = True
    batchnorm: bool = True
    regularizer: BoundRegularizer | None = field(default_factory=BoundRegularizer)
    weight: float = 0.5
    kappa_start: float = 0.0
    kappa_end: float = 0.0

    def __post_init__(self) -> None:
        if isinstance(self.objective, str) and self.objective not in OBJECTIVES:
            raise unknown("objective", self.objective, OBJECTIVES)
        for name in ("kappa_start", "kappa_end"):
            if not 0 <= getattr(self, name) <= 1:
                raise UsageError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
        if not 0 <= self.weight < float("inf"):
            raise UsageError(f"weight must be at least 0 and finite, got {self.weight}")


@dataclass(frozen=True, slots=True)
class Parts:
    """What one loss was made of, without gradients.

    Attributes:
        eps: Size of the box.
        clean: Clean cross-entropy; ``None`` where the loss did not need it.
        robust: Robust loss; ``None`` while the box is a point.
        regularization: The regularizers; ``None`` after the warmup.
    """

    eps: float
    clean: float | None
    robust: float | None
    regularization: Regularization | None


class CertifiedTraining:
    """The loss of certified training; the loop, the optimizer and the data stay yours.

    ``kappa CE + (1 - kappa) robust + lambda (tightness + balance)`` with ``lambda = lambda_0 (1 - eps / eps_target)``
    while the box grows. While the box is still a point, the clean cross-entropy takes the place of the robust loss.

    Preparing the model (batch norm, first weights) happens here, so make the optimizer afterwards, and load a state
    dict afterwards to go on from one. Clip gradients to norm 10, as the paper does.

    Args:
        model: Gives logits ``(B, K)``; changed in place as ``recipe`` says.
        eps: Final size of the box, in the units of unnormalized inputs.
        schedule: How the box grows; it must end at ``eps``.
        example: An example input ``(B, ...)``.
        recipe: See `Recipe`; ``None``: its defaults, the paper's.
        std: What inputs were divided by, per channel (or a number): the box is ``eps / std``.
        lower: Least valid input, in the units of the model's input; a number or a tensor that broadcasts.
        upper: Largest valid input.
        options: How bounds are computed.

    Raises:
        UsageError: An argument is out of range.
        UnsupportedOperation: The model has an operation without bounds.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from weightsmith.certify import CertifiedTraining, EpsilonSchedule
        >>> net = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> x, y = torch.rand(32, 1, 4, 4), torch.randint(3, (32,))
        >>> schedule = EpsilonSchedule(0.1, steps_per_epoch=1, length=5)
        >>> training = CertifiedTraining(net, 0.1, schedule, x, lower=0.0, upper=1.0)
        >>> optimizer = torch.optim.Adam(net.parameters(), lr=5e-4)
        >>> for step in range(10):
        ...     optimizer.zero_grad()
        ...     training.loss(x, y).backward()
        ...     _ = nn.utils.clip_grad_norm_(net.parameters(), 10.0)
        ...     optimizer.step()
        ...     training.step()
    """

    def __init__(
        self,
        model: nn.Module,
        eps: float,
        schedule: EpsilonSchedule,
        example: Tensor,
        *,
        recipe: Recipe | None = None,
        std: Eps = None,
        lower: Any = None,
        upper: Any = None,
        options: BoundOptions | None = None,
    ) -> None:
        self.recipe, self.schedule = recipe or Recipe(), schedule
        if schedule.eps_target != eps:
            raise UsageError(f"schedule must end at eps={eps}, ends at {schedule.eps_target}")
        self.model, self.eps_target = model, eps
        self._std, self._lower, self._upper = std, lower, upper
        self._options = options or BoundOptions()
        self._box(example, eps)  # refuse bad limits before anything is changed
        Traced(model, example)
        if self.recipe.batchnorm:
            add_batchnorm_(model, example)
        if self.recipe.initialize:
            ibp_(model, example=example)
        self._traced = Traced(model, example)
        with torch.no_grad(), evaluating(model):
            self._classes = model(example[:1].to(working_dtype(model, (example,), None))).shape[-1]
        objective = self.recipe.objective
        self._objective: Objective = OBJECTIVES[objective]() if isinstance(objective, str) else objective
        self.last: Parts | None = None

    @property
    def eps(self) -> float:
        """Present size of the box."""
        return self.schedule.eps

    def loss(self, x: Tensor, labels: Tensor, reduction: str = "mean") -> Tensor:
        """The loss of a batch, to call ``backward`` on; batch norm updates its running statistics once.

        Args:
            x: ``(B, ...)``.
            labels: ``(B,)``.
            reduction: ``"mean"``, or ``"none"`` for one per example ``(B,)``, each with the whole regularizer.

        Raises:
            UsageError: Inputs are not finite, or labels out of range.
        """
        eps, recipe = self.eps, self.recipe
        warm = recipe.regularizer is not None and self.schedule.warming_up
        progress = eps / self.eps_target
        box = self._box(x, eps if eps > 0 else (_SMALLEST if warm else 0.0))
        x = x.to(box.sample.dtype)
        check_labels(labels, self._classes)
        labels = labels.long()
        kappa = recipe.kappa_start + (recipe.kappa_end - recipe.kappa_start) * progress
        step = Step(self._traced, x, labels, box, progress, self._options, want_clean=kappa > 0 or eps == 0)
        if eps > 0:
            robust, done = self._objective(step)
        else:
            robust, done = None, step.run(box, x)
        logits = done.clean.get(done.graph.output)
        clean = None if logits is None else F.cross_entropy(logits, labels, reduction="none")
        total = _mixed(clean, robust, kappa)
        found = None
        if warm and recipe.regularizer is not None:
            found = recipe.regularizer(done)
            total = total + recipe.weight * (1 - progress) * (found.tightness + found.balance)
        self.last = Parts(
            eps, _number(clean), _number(robust),
            None if found is None else Regularization(*(part.detach() for part in found)),
        )  # fmt: skip
        return total if reduction == "none" else total.mean()

    def step(self) -> None:
        """Count one training batch; call it after the optimizer's step."""
        self.schedule.step()

    def state_dict(self) -> dict[str, Any]:
        """What is needed to go on, beside the model's and the optimizer's own states."""
        return {"schedule": self.schedule.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        self.schedule.load_state_dict(state["schedule"])

    def _box(self, x: Tensor, eps: float) -> Any:
        x = x.to(working_dtype(self.model, (x,), self._options.dtype))
        return input_box(x, scaled_eps(eps, self._std, x), self._lower, self._upper)


def _mixed(clean: Tensor | None, robust: Tensor | None, kappa: float) -> Tensor:
    if robust is None or kappa == 1:
        assert clean is not None
        return clean
    if kappa == 0:
        return robust
    assert clean is not None
    return kappa * clean + (1 - kappa) * robust


def _number(losses: Tensor | None) -> float | None:
    return None if losses is None else losses.detach().mean().item()


def scaled_eps(eps: float, std: Eps, x: Tensor) -> Eps:
    """``eps / std``, with one ``std`` per channel ``(C,)`` brought to ``(C, 1, 1)``.

    Raises:
        UsageError: ``std`` is not above 0.
    """
    if std is None:
        return eps
    scale = torch.as_tensor(std, dtype=x.dtype, device=x.device)
    if not bool((scale > 0).all()):
        raise UsageError(f"std must be above 0, got {std}")
    return eps / (scale.view(-1, *[1] * (x.dim() - 2)) if scale.dim() == 1 and x.dim() > 2 else scale)
