"""What certified training can minimize: proved losses, and two recipes that add an attack to them."""

from dataclasses import dataclass, replace
from typing import Protocol

from torch import Tensor
from torch.nn import functional as F

from weightsmith.certify.attack import adversarial
from weightsmith.certify.bounding import BoundOptions, ends_of, run_box
from weightsmith.certify.box import margins_of
from weightsmith.certify.elision import elided
from weightsmith.certify.interval import Interval
from weightsmith.certify.losses import fused_log_bound, robust_cross_entropy
from weightsmith.certify.passes import Pass
from weightsmith.certify.traced import Traced
from weightsmith.core.errors import UsageError


@dataclass(frozen=True, slots=True)
class Step:
    """One batch on its way to a loss.

    Attributes:
        traced: The model.
        x: Inputs ``(B, ...)``.
        labels: ``(B,)``.
        box: Inputs that are allowed now.
        progress: Present size of the box over its final one, in [0, 1].
        options: How bounds are computed.
        want_clean: The clean logits are part of the loss.
    """

    traced: Traced
    x: Tensor
    labels: Tensor
    box: Interval
    progress: float
    options: BoundOptions
    want_clean: bool = True

    def run(self, box: Interval, x: Tensor) -> Pass:
        """Intervals of every operation over a box around ``x``, and the clean activations."""
        return run_box(self.traced, (box,), (x,), method="ibp", options=self.options, want_clean=self.want_clean)


class Objective(Protocol):
    """``step -> (robust loss (B,), pass)``; the pass is what the regularizers look at."""

    def __call__(self, step: Step) -> tuple[Tensor, Pass]:
        """Compute the loss."""


@dataclass(frozen=True, slots=True)
class IBP:
    """The cross-entropy of the worst margins that interval bounds allow (arXiv 1810.12715)."""

    def __call__(self, step: Step) -> tuple[Tensor, Pass]:
        """``log(1 + sum_j exp(-lower(z_y - z_j)))``."""
        done = step.run(step.box, step.x)
        return ibp_loss(done, step.labels), done


def ibp_loss(done: Pass, labels: Tensor) -> Tensor:
    """Robust cross-entropy ``(B,)`` of a pass."""
    spec = margins_of(labels, done.output.shape[1], done.output.sample)
    return robust_cross_entropy(elided(done, spec).lower, "none")


@dataclass(frozen=True, slots=True)
class CrownIBP:
    """A mix of CROWN-IBP and IBP bounds that ends as pure IBP (arXiv 1906.06316).

    Attributes:
        fused: Bound the sum over classes at once, with one backward row in place of one per class.
    """

    fused: bool = True

    def __call__(self, step: Step) -> tuple[Tensor, Pass]:
        """``w crown + (1 - w) ibp`` with ``w = 1 - progress``; a convex mix of bounds is a bound."""
        done = step.run(step.box, step.x)
        weight = 1 - step.progress
        if weight < 1e-5:
            return ibp_loss(done, step.labels), done
        if self.fused:
            return fused_log_bound(step.traced, done, step.labels, weight=weight, options=step.options), done
        spec = margins_of(step.labels, done.output.shape[1], done.output.sample)
        crown = ends_of(step.traced, done, spec, method="crown-ibp", options=step.options, both=False).lower
        mixed = weight * crown + (1 - weight) * elided(done, spec).lower
        return robust_cross_entropy(mixed, "none"), done


@dataclass(frozen=True, slots=True)
class SABR:
    """IBP over a small box around an adversarial example (arXiv 2210.04871): less regularization, no proof in training.

    Attributes:
        share: Radius of the small box, as a share of the full one's (lambda in the paper).
        steps: Of the attack.
        step_size: Of the attack, as a share of the radius.
    """

    share: float = 0.4
    steps: int = 8
    step_size: float = 0.5

    def __post_init__(self) -> None:
        if not 0 < self.share <= 1:
            raise UsageError(f"share must be above 0 and at most 1, got {self.share}")

    def __call__(self, step: Step) -> tuple[Tensor, Pass]:
        """Attack within what the small box leaves, then bound around the result."""
        small = step.box.radius * self.share
        room = Interval(step.box.lower + small, step.box.upper - small)
        found = adversarial(step.traced.model, room, step.labels, steps=self.steps, step_size=self.step_size)
        done = step.run(Interval.ball(found, small), step.x)
        return ibp_loss(done, step.labels), done


@dataclass(frozen=True, slots=True)
class MTLIBP:
    """``(1 - alpha) adversarial + alpha IBP`` loss (arXiv 2305.13991).

    Attributes:
        alpha: Weight of the IBP loss.
        steps: Of the attack.
        step_size: Of the attack, as a share of the radius.
    """

    alpha: float = 0.5
    steps: int = 8
    step_size: float = 0.5

    def __post_init__(self) -> None:
        if not 0 <= self.alpha <= 1:
            raise UsageError(f"alpha must be between 0 and 1, got {self.alpha}")

    def __call__(self, step: Step) -> tuple[Tensor, Pass]:
        """One attack and one pass of intervals."""
        found = adversarial(step.traced.model, step.box, step.labels, steps=self.steps, step_size=self.step_size)
        done = step.run(step.box, step.x)
        # running statistics are the clean pass's alone
        once = run_box(step.traced, (Interval(found, found),), (found,), method="ibp",
                       options=replace(step.options, update_statistics=False))  # fmt: skip
        attacked = F.cross_entropy(once.output.center, step.labels, reduction="none")
        return (1 - self.alpha) * attacked + self.alpha * ibp_loss(done, step.labels), done


OBJECTIVES = {"ibp": IBP, "crown-ibp": CrownIBP, "sabr": SABR, "mtl-ibp": MTLIBP}
