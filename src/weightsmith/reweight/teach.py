"""One step of the rescaler: a virtual step of the model, a validation loss there, and its gradient back to the weights.

The weights of a batch reach the validation loss in two ways: through the virtual weights of the model (``grad_meta``),
and, as weights of the validation losses, directly (``grad_outer``). Both are kept.
"""

from collections.abc import Callable, Container, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from weightsmith.reweight.meta_gradient import (
    directional_derivatives,
    head_derivatives,
    hessian_vector,
    restoring,
    virtual_step_,
)
from weightsmith.reweight.observe import Observer, Seen
from weightsmith.reweight.passes import repeatable, without_traces


class Teacher:
    """Trains the rescaler of an observer.

    Args:
        observer: Looks at batches.
        virtual_lrs: Gives the step size of the virtual step of every parameter.

    Attributes:
        optimizer: The rescaler's.
        sync: Whether gradients are averaged over processes.
        autocast: Precision of the validation passes.
    """

    def __init__(self, observer: Observer, virtual_lrs: Callable[[Sequence[Tensor]], list[float]]) -> None:
        self.observer, self.settings = observer, observer.settings
        self.optimizer = torch.optim.Adam(observer.rescaler.parameters(), lr=self.settings.rescaler_lr)
        self.sync = False
        self.autocast: Callable[[], Any] = nullcontext
        self._lrs = virtual_lrs

    def step(
        self, pending: Sequence[Seen], val_batch: Any, params: Sequence[Tensor], gradients: Sequence[Tensor]
    ) -> Tensor:
        """Make a step of the rescaler; the model is as before afterwards.

        Args:
            pending: The training batches whose gradients these are.
            val_batch: The validation batch.
            params: Weights of the virtual step.
            gradients: Of the training loss by these.

        Returns:
            The validation loss after the virtual step.
        """
        settings, lrs = self.settings, self._lrs(params)
        if not settings.apply:  # the gradients are those of a loss without weights
            gradients = self._weighted_gradients(pending, params)
        points = []
        with restoring(params):
            slopes = virtual_step_(params, gradients, lrs, sign=settings.mode == "official")
            for _ in range(settings.inner_steps - 1):
                points.append([p.detach().clone() for p in params])
                virtual_step_(params, self._weighted_gradients(pending, params), lrs)
            with self.autocast():
                back = settings.meta_grad not in ("none", "head")
                with torch.set_grad_enabled(back), without_traces(self.observer.module):
                    val = self.observer.look(val_batch, "validation")
                weights = val.factor * val.weights
                constant = weights.detach() if settings.outer else torch.ones_like(weights)
                divisor = self.divisor(len(val.rows))
                meta_loss = (constant * val.losses).sum() / divisor
                v = self._direction(val, constant / divisor, meta_loss, params)
        objective = torch.zeros((), dtype=weights.dtype, device=weights.device)
        if settings.outer:
            objective = objective + (weights * val.losses.detach()).sum() / divisor
        if v is not None:
            objective = objective + self._through_points(pending, params, points, v, slopes)
        self._update(objective)
        return meta_loss.detach()

    def divisor(self, samples: int) -> int:
        """What the loss of a batch is divided by."""
        return 1 if self.settings.mode == "official" else max(1, samples)

    def _update(self, objective: Tensor) -> None:
        self.optimizer.zero_grad()
        if objective.requires_grad:
            objective.backward()
        if self.sync:
            for p in self.observer.rescaler.parameters():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
                _average(p.grad)
        self.optimizer.step()

    def _through_points(
        self,
        pending: Sequence[Seen],
        params: Sequence[Tensor],
        points: list[list[Tensor]],
        v: list[Tensor],
        slopes: list[Tensor | float],
    ) -> Tensor:
        """``sum_i w_i dM/dw_i`` with constant derivatives, over all virtual steps from the last to the first.

        With ``v`` the gradient of the meta loss after a step, that before it is ``v - H (eta v)``, ``H`` the Hessian
        of the weighted loss where the step began.
        """
        total = pending[0].weights.new_zeros(())
        for point in reversed(points):
            along = [direction * slope for direction, slope in zip(v, slopes, strict=True)]
            with restoring(params):
                with torch.no_grad():
                    for p, value in zip(params, point, strict=True):
                        p.copy_(value)
                total = total + self._through(pending, along)
                curved = self._curved(pending, params, along)
            v = [direction - bend for direction, bend in zip(v, curved, strict=True)]
        return total + self._through(
            pending, [direction.mul_(slope) for direction, slope in zip(v, slopes, strict=True)]
        )

    def _through(self, pending: Sequence[Seen], along: list[Tensor]) -> Tensor:
        """The same for the virtual step that begins at the weights that the model has now."""
        total = pending[0].weights.new_zeros(())
        for seen in pending:
            if seen.rescaled:
                share = -seen.factor * self._share(pending, seen)
                total = total + (seen.weights * (share * self._along(seen, along)).detach()).sum()
        return total

    def _share(self, pending: Sequence[Seen], seen: Seen) -> float:
        """Part of a sample in the loss of all batches that an update stands for."""
        return 1 / (self.divisor(len(seen.rows)) * len(pending))

    def _weighted(self, pending: Sequence[Seen]) -> Tensor:
        """The weighted training loss at the weights that the model has now."""
        parts = []
        for seen in pending:
            weights = seen.factor * seen.weights.detach()
            parts.append((weights * self._losses(seen)).sum() * self._share(pending, seen))
        return torch.stack(parts).sum()

    def _weighted_gradients(self, pending: Sequence[Seen], params: Sequence[Tensor]) -> list[Tensor]:
        with torch.enable_grad(), repeatable(self.observer.module):
            found = torch.autograd.grad(self._weighted(pending), params, allow_unused=True)
        return self._averaged([torch.zeros_like(p) if g is None else g for p, g in zip(params, found, strict=True)])

    def _curved(self, pending: Sequence[Seen], params: Sequence[Tensor], along: list[Tensor]) -> list[Tensor]:
        with repeatable(self.observer.module):
            exact = self.settings.meta_grad != "finite_difference"
            return self._averaged(hessian_vector(lambda: self._weighted(pending), params, along, exact=exact))

    def _direction(
        self, val: Seen, constant: Tensor, meta_loss: Tensor, params: Sequence[Tensor]
    ) -> list[Tensor] | None:
        """The gradient of the meta loss at the virtual weights."""
        if self.settings.meta_grad == "none":
            return None
        if val.logit_gradients is not None and val.head_inputs is not None:
            outer = constant[:, None] * val.logit_gradients
            v = [outer.mT @ val.head_inputs, outer.sum(0)][: len(params)]
        else:
            # small gradients would vanish in float16
            half = torch.is_autocast_enabled("cuda") and torch.get_autocast_dtype("cuda") == torch.float16
            up = 1024.0 if half else 1.0
            found = torch.autograd.grad(up * meta_loss, params, allow_unused=True)
            v = [torch.zeros_like(p) if g is None else g / up for p, g in zip(params, found, strict=True)]
        return self._averaged(v)

    def _along(self, seen: Seen, v: list[Tensor]) -> Tensor:
        """``<grad l_i, v>`` of the samples that have a label."""
        if seen.logit_gradients is not None and seen.head_inputs is not None:
            return head_derivatives(seen.logit_gradients, seen.head_inputs, v[0], v[1] if len(v) > 1 else None)
        with repeatable(self.observer.module):
            return directional_derivatives(lambda: self._losses(seen), self.observer.module, v, self.settings.meta_grad)

    def _losses(self, seen: Seen) -> Tensor:
        logits, labels = self.observer.forward_fn(self.observer.module, seen.batch)
        return self.observer.loss_fn(logits[seen.rows], labels[seen.rows])

    def _averaged(self, tensors: list[Tensor]) -> list[Tensor]:
        if self.sync:
            for tensor in tensors:
                _average(tensor)
        return tensors


def _average(tensor: Tensor) -> None:
    torch.distributed.all_reduce(tensor)
    tensor /= torch.distributed.get_world_size()


def gradients_of(params: Sequence[Tensor], scale: float, trained: Container[int]) -> list[Tensor] | None:
    """The gradients that ``backward`` left, ``None`` where one is not finite.

    Those of parameters that are not ``trained``, by ``id``, count as 0: nobody removes them after a step.
    """
    found = [p.grad.detach() if p.grad is not None and id(p) in trained else torch.zeros_like(p) for p in params]
    if scale != 1.0:
        found = [g / scale for g in found]
    norms = torch.stack([g.float().norm().to(found[0].device) for g in found])
    return found if bool(norms.isfinite().all()) else None
