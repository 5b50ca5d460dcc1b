"""An averaged copy of the weights whose averaging weight is found anew at every step, for every tensor.

A model that is tuned on one task after another forgets. Beside the live weights an average of them is kept, which
becomes the model when the task ends. How far the average follows depends on how far the live weights have moved away
and on how much the gradient changes:

    theta*_t = (1 - alpha_t) theta*_{t-1} + alpha_t theta_t
    alpha_t  = kappa (1 + ||g_t||) / (||theta_t - theta*_{t-1}|| ||g_t - g_{t-1}||)        L1 norms, per tensor
    alpha_t  = 1 - fallback_beta, where that is not between 0 and 1

Source: Qiao et al., "Large Continual Instruction Assistant", ICML 2025, arXiv 2410.10868, section 4 and appendix E, and
the authors' code, which differs from the paper's equation 45; both are here, see `DynamicEMA`.
"""

import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from weightsmith.continual.averaged import Part
from weightsmith.continual.balance import Mode, balance_weight
from weightsmith.continual.movement import movement
from weightsmith.continual.parts import Parts
from weightsmith.continual.watching import NO_GRADIENTS, Watch
from weightsmith.core.errors import UsageError, unknown

_MODES = ("official", "paper", "fixed")


class DynamicEMA:
    """Keep an average of trainable parameters, with a balance weight per tensor and step.

    Call `step` after ``optimizer.step()`` and before ``zero_grad()``, or let `attach` do it; `copy_to_model` at the end
    of the task. Gradients must be unscaled; where ``GradScaler`` skips a step, skip this one too (`attach` does).
    Every process of DDP finds the same weights; sharded parameters are refused.

    | mode | averaging weight |
    |---|---|
    | ``"official"`` | as in the authors' code: ``kappa`` is a constant |
    | ``"paper"`` | equation 45: ``kappa`` is their distance before the step; near 0.5, so it hardly averages |
    | ``"fixed"`` | always ``1 - fallback_beta``, the usual exponential average |

    L1 norms grow with the size of a tensor, so a good ``kappa`` depends on it: 2 is the authors' for LoRA of rank 128;
    start at 0.01 for small adapters. A warning says when the median weight of 20 steps is above 0.1. The weight also
    depends on the scale of the loss: mean and sum over a batch differ.

    Args:
        params: A model, whose trainable parameters count, also ones that become trainable later; or parameters; or
            pairs of name and parameter. Parameters that share storage are averaged once. Buffers stay live.
        mode: See the table.
        kappa: Above 0.
        fallback_beta: In [0, 1): weight of the average where there is no balance weight: in the first step, for
            unused parameters, for repeated gradients.
        init: The average starts at the parameters as they are now (``"start"``), or, as in the authors' code, as they
            are after the first step (``"after_first_step"``).
        dtype: Least precision of the average: wider parameters keep their own. At least float32, because an average
            in 16 bits does not move.
        offload: ``"cpu"`` keeps the state in main memory and computes there.
        strict: Raise on numbers that are not finite, where otherwise the tensor's average stays and a warning is given.

    Attributes:
        step_count: Steps taken.

    Raises:
        UsageError: An argument is out of range, nothing is trainable, or parameters are sharded.

    Example:
        >>> model = nn.Linear(4, 2)
        >>> optimizer = torch.optim.AdamW(model.parameters())
        >>> ema = DynamicEMA(model, kappa=0.01)
        >>> for _ in range(3):
        ...     model(torch.randn(8, 4)).square().mean().backward()
        ...     optimizer.step()
        ...     ema.step()
        ...     optimizer.zero_grad()
        >>> _ = ema.copy_to_model()
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        mode: Mode = "official",
        kappa: float = 2.0,
        fallback_beta: float = 0.99,
        *,
        init: Literal["start", "after_first_step"] = "start",
        dtype: torch.dtype = torch.float32,
        offload: Literal["none", "cpu"] = "none",
        strict: bool = False,
    ) -> None:
        if mode not in _MODES:
            raise unknown("mode", str(mode), _MODES)
        if not (_is_number(kappa) and 0 < kappa < math.inf):
            raise UsageError(f"kappa must be above 0, got {kappa!r}")
        if not (_is_number(fallback_beta) and 0 <= fallback_beta < 1):
            raise UsageError(f"fallback_beta must be at least 0 and below 1, got {fallback_beta!r}")
        if init not in ("start", "after_first_step"):
            raise unknown("init", str(init), ("start", "after_first_step"))
        if offload not in ("none", "cpu"):
            raise unknown("offload", str(offload), ("none", "cpu"))
        if not dtype.is_floating_point or dtype.itemsize < 4:
            raise UsageError(f"dtype must be float32 or float64, got {dtype}: an average in 16 bits does not move")
        self.mode, self.kappa, self.fallback_beta, self.init = mode, float(kappa), float(fallback_beta), init
        self.dtype, self.offload, self.strict = dtype, offload, strict
        self._parts = Parts(params, mode=mode, dtype=dtype, cpu=offload == "cpu")
        self.step_count = 0
        self._gradient_seen = False
        smaller = f"choose a smaller kappa than {self.kappa:g}, for example 0.01 for small adapters"
        self._watch = Watch({"official": smaller, "paper": 'take mode="official"', "fixed": ""}[mode])

    @torch.no_grad()
    def step(self) -> None:
        """Move the average; parameters have been stepped, and their gradients are still there.

        Raises:
            RuntimeError: There has been no gradient yet: they are cleared before this call; or, with ``strict``,
                something is not finite.
            UsageError: Live and averaged weights are exchanged.
        """
        if self._parts.exchanged:
            raise UsageError("step must not be called while live and averaged weights are exchanged")
        self._parts.follow()
        if self.mode != "fixed" and not self._gradient_seen:
            if not any(p.grad is not None for part in self._parts for p in part.parameters if p.requires_grad):
                raise RuntimeError(NO_GRADIENTS)
            self._gradient_seen = True
        if self.strict:
            self._parts.check_finite()
        first = self.step_count == 0 and self.init == "after_first_step"
        for part in self._parts:
            self._step(part, first)
        self.step_count += 1
        self._watch.look_back(self.step_count)

    def _step(self, part: Part, first: bool) -> None:
        moved = movement(part)
        size, change, distance = moved.norms()
        change = torch.where(part.known & part.present(), change, 0)
        if part.previous is not None:
            self._watch.moved = self._watch.moved | (size != 0).any()
        moving = part.trainable()
        active = moving & size.isfinite()
        finite = active & distance.isfinite() | ~moving
        active = active & distance.isfinite()
        self._watch.check_finite(part, finite, self.step_count)
        kappa = part.lag if self.mode == "paper" else self.kappa
        alpha = balance_weight(
            distance, size, change, kappa=kappa, fallback_beta=self.fallback_beta, mode=self.mode
        )  # fmt: skip
        fell = active & (alpha == 1 - self.fallback_beta)
        alpha = torch.where(active, torch.ones_like(alpha) if first else alpha, 0)
        if part.previous is not None:
            moved.remember(active & part.present())
        part.lag = torch.where(active, (1 - alpha) * distance, part.lag)  # the average is about to move by alpha
        moved.move(alpha, active)
        part.alpha = alpha
        self._watch.count(part, alpha, active, fell)

    def attach(self, optimizer: torch.optim.Optimizer) -> Any:
        """Call `step` after every step that ``optimizer`` takes; steps that a gradient scaler skips do not count.

        Args:
            optimizer: Of torch, or wrapped by accelerate, whose accumulation counts as one step.

        Returns:
            The hook's handle; its ``remove()`` ends it.
        """
        inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
        return inner.register_step_post_hook(lambda *_: self.step())

    @property
    def last_alpha(self) -> dict[str, float]:
        """Averaging weights of the last step by parameter; 0 where the average stayed."""
        return {name: value for part in self._parts for name, value in part.by_name(part.alpha)}

    @property
    def fallback_fraction(self) -> float:
        """Share of the pairs of tensor and step so far that had the fallback weight."""
        return float(self._watch.fallbacks) / self._watch.pairs if self._watch.pairs else 0.0

    @property
    def skipped(self) -> dict[str, int]:
        """How often a parameter's average stayed because something was not finite."""
        return {name: int(n) for part in self._parts for name, n in part.by_name(part.skipped) if n}

    @property
    def average(self) -> dict[str, Tensor]:
        """The averaged parameters by name, views of the state."""
        return self._parts.average

    @property
    def nbytes(self) -> int:
        """Bytes of the state."""
        return sum(part.nbytes for part in self._parts)

    def swap(self) -> None:
        """Put the average into the model; `restore` brings the live weights back, to the last bit."""
        self._parts.swap()

    def restore(self) -> None:
        """Undo `swap`."""
        self._parts.restore()

    @contextmanager
    def swapped(self) -> Iterator[None]:
        """The model has the averaged weights inside the block, and its live ones after it, also after an error."""
        self.swap()
        try:
            yield
        finally:
            self.restore()

    def copy_to_model(self) -> nn.Module | None:
        """Make the average the model's parameters, as at the end of a task.

        Returns:
            The model, where one was given.
        """
        self._parts.copy_to_model()
        return self._parts.model

    def state_dict(self) -> dict[str, Any]:
        """The average, the previous gradients (and in paper mode distances), and the counts, as plain data."""
        return {
            "mode": self.mode,
            "step": self.step_count,
            **self._watch.state(),
            "tensors": {name: held for part in self._parts for name, held in part.state()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; the model's own weights are restored by whoever saved them.

        Raises:
            UsageError: It is of another mode, or of other parameters; nothing has been changed.
        """
        if state.get("mode") != self.mode:
            raise UsageError(f"the state is of mode {state.get('mode')!r}, and mode is {self.mode!r}")
        self._parts.load(state["tensors"])
        self.step_count = state["step"]
        self._watch.load(state)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
