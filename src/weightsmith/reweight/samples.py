"""Self-taught loss rescaling (STORM): train on wrong labels without clean data.

A small network, the rescaler, reads how the model behaves on a sample and gives its loss a weight in (0, 1). It learns
on the fly: the model takes a virtual step with the weighted losses, and the rescaler lowers the loss that a second
batch of the *same noisy data*, weighted by the rescaler itself, then has:

    theta'(omega) = theta - eta * grad sum_i w_i(omega) l_i(theta)
    omega <- Adam(omega, grad sum_j w'_j(omega) l_j(theta'(omega)))

Source: "Learning from Noisy Labels via Self-Taught On-the-Fly Meta Loss Rescaling", AAAI 2025, arXiv 2412.12955,
section 3. What the released code does in addition, or instead, is said at ``mode`` of `RescalingSettings`.
"""

import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from weightsmith.core.errors import UsageError, WeightsmithWarning, unknown
from weightsmith.reweight.audit import AuditLog, AuditTable
from weightsmith.reweight.meta_gradient import trainable, virtual_step_
from weightsmith.reweight.observe import Observer, Seen
from weightsmith.reweight.passes import Forward, LossFn, cross_entropy, forward_batch, same_autocast
from weightsmith.reweight.rescaler import LossRescaler
from weightsmith.reweight.settings import RescalingSettings, StepResult
from weightsmith.reweight.teach import Teacher, gradients_of

_MANY = 50
_ADAM_VIRTUAL_LR = 0.1
_HALF = (torch.float16, torch.bfloat16)


class MetaRescaler:
    """Weighs the losses of a classifier's training samples and learns on the way which to trust.

    In a loop of one's own, either let it make the whole step:

        rescaler = MetaRescaler(model, optimizer, 10)
        for x, y, ids in loader:
            rescaler.step((x, y), ids=ids)

    or keep the loop and call ``loss`` and ``update`` around ``backward``, with gradient clipping, accumulation or loss
    scaling where they were:

        loss = rescaler.loss((x, y), ids=ids)
        loss.backward()
        rescaler.update()
        optimizer.step()

    Ask `audit` for the suspicious labels. Labels below 0 are ignored: weight 0, and no part in any statistics.
    Under DDP give the wrapped model: gradients of the validation loss and of the rescaler are averaged over processes,
    memories and the audit are each process's own.

    Args:
        model: Any classifier; frozen parameters stay out of the virtual step.
        optimizer: What trains it; its learning rates may be those of the virtual step, in which parameters that it does
            not hold stay where they are.
        rescaler: The network that weighs, or the number of classes.
        forward_fn: ``(model, batch) -> (logits (B, C), labels (B,))``; the default takes ``(inputs, labels)`` and
            mappings with ``"labels"``, and models that return logits or an object that holds them.
        loss_fn: ``(logits, labels) -> (B,)``; the default is the cross-entropy.
        val_sampler: Gives a validation batch when it is called, from the same noisy data
            (`weightsmith.reweight.RandomBatches`) or, with ``outer=False``, from clean data; ``None``: the
            training batch before takes that part.
        settings: See `RescalingSettings`.
        **changes: Options of ``settings`` by name, for example ``meta_grad="head"``.

    Raises:
        UsageError: An option does not exist, is out of range, or does not fit the model.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        rescaler: LossRescaler | int,
        forward_fn: Forward = forward_batch,
        *,
        loss_fn: LossFn = cross_entropy,
        val_sampler: Callable[[], Any] | None = None,
        settings: RescalingSettings | None = None,
        **changes: Any,
    ) -> None:
        known = [field.name for field in fields(RescalingSettings)]
        for name in changes:
            if name not in known:
                raise unknown("option", name, known)
        self.settings = replace(settings or RescalingSettings(), **changes)
        self.model, self.optimizer = model, optimizer
        self.forward_fn, self.loss_fn, self.val_sampler = forward_fn, loss_fn, val_sampler
        self.module = _unwrapped(model)
        params = trainable(self.module)
        if not params:
            raise UsageError("model has no trainable parameter: nothing could be learned from weighted losses")
        # frozen ones too: activations rounded to half precision drown the difference of two passes
        half = next((p.dtype for p in self.module.parameters() if p.dtype in _HALF), None)
        if half is not None and self.settings.meta_grad == "finite_difference":
            raise UsageError(
                f"meta_grad='finite_difference' needs weights in float32, got {half}: keep them in float32 and use "
                "autocast, or take meta_grad='jvp', 'head' or 'none'"
            )
        if not self._trained().intersection(map(id, params)):
            raise UsageError("optimizer holds none of the model's trainable parameters: make it from this model's")
        first = params[0]
        if isinstance(rescaler, int):
            rescaler = LossRescaler(rescaler, self.settings.n_features)
        if not isinstance(rescaler, LossRescaler):
            raise UsageError(f"rescaler must be a LossRescaler or the number of classes, got {type(rescaler).__name__}")
        if rescaler.n_features != self.settings.n_features:
            raise UsageError(
                f"rescaler must take {self.settings.n_features} features (features={self.settings.features!r}), "
                f"it takes {rescaler.n_features}"
            )
        if rescaler.class_separation and rescaler.num_classes > _MANY:
            warnings.warn(
                f"with {rescaler.num_classes} classes each class's rescaler sees few samples; consider "
                "LossRescaler(num_classes, class_separation=False)",
                WeightsmithWarning,
                stacklevel=2,
            )
        self.rescaler = rescaler.to(first.device, torch.float64 if first.dtype == torch.float64 else torch.float32)
        self._observer = Observer(
            self.module,
            self.rescaler,
            forward_fn,
            loss_fn,
            self.settings,
            self.settings.normalize or ("mean" if _is_sgd(optimizer) else "none"),
        )
        self._teacher = Teacher(self._observer, self._virtual_lrs)
        self._log = AuditLog()
        self._pending: list[Seen] = []
        self._previous: Any = None
        self._steps = self._epoch = 0
        self._last = torch.zeros(0)

    # training

    def step(
        self,
        batch: Any,
        val_batch: Any = None,
        *,
        ids: Tensor | None = None,
        scaler: "torch.amp.GradScaler | None" = None,
    ) -> StepResult:
        """Make one step of training and one of the rescaler.

        Args:
            batch: As ``forward_fn`` takes it.
            val_batch: Validation batch; ``None``: that of ``val_sampler``, or else the batch before.
            ids: ``(B,)``, whole numbers that identify the samples in the audit.
            scaler: For float16 autocast; it scales the real step only.

        Returns:
            What happened.

        Raises:
            UsageError: Labels or logits are not those of a classifier.
            FloatingPointError: A loss is not finite; the message names the samples.
        """
        self.optimizer.zero_grad()
        self._pending.clear()  # what an error cut off before its update
        loss = self.loss(batch, ids=ids)
        if scaler is None:
            loss.backward()
        else:
            scaler.scale(loss).backward()
            scaler.unscale_(self.optimizer)
        seen = self._pending[-1]
        meta_loss = self.update(val_batch)
        if self.settings.mode != "official":  # that one keeps the virtual step
            self.optimizer.step() if scaler is None else scaler.step(self.optimizer)
        if scaler is not None:
            scaler.update()
        whole = torch.zeros(len(seen.labels), dtype=seen.weights.dtype, device=seen.labels.device)
        return StepResult(
            loss.detach(),
            whole.to(seen.losses.dtype).index_put((seen.rows,), seen.losses.detach()),
            whole.index_put((seen.rows,), seen.weights.detach()),
            whole.index_put((seen.rows,), seen.signals.agreement.to(whole.dtype)),
            meta_loss,
        )

    def loss(self, batch: Any, *, ids: Tensor | None = None, model: nn.Module | None = None) -> Tensor:
        """Weighted loss of a batch, to call ``backward`` on; several calls before an update accumulate.

        Args:
            batch: As ``forward_fn`` takes it.
            ids: ``(B,)``, whole numbers that identify the samples in the audit.
            model: The wrapper to train through where a library has put one around the model; ``None``: the model.

        Returns:
            ``()``: the mean over the samples that have a label; in official mode the sum.

        Raises:
            UsageError: Labels or logits are not those of a classifier.
            FloatingPointError: A loss is not finite; the message names the samples.
        """
        outer = self.model if model is None else model
        self._teacher.sync = isinstance(_compiled_from(outer), DistributedDataParallel)
        self._teacher.autocast = same_autocast(self.rescaler.first.device)
        if ids is not None and (not isinstance(ids, Tensor) or _no_numbers(ids) or ids.dim() != 1):
            raise UsageError(f"ids must be whole numbers (B,), got {getattr(ids, 'dtype', type(ids).__name__)}")
        seen = self._observer.look(batch, "training", through=outer, ids=ids, autocast=self._teacher.autocast)
        self._pending.append(seen)
        self._last = seen.weights.detach()
        if ids is not None and len(seen.rows):
            found = seen.signals
            columns = (seen.labels[seen.rows], seen.suggested, seen.weights, found.loss, found.agreement)
            self._log.add(ids.to(seen.rows.device)[seen.rows], columns, self._epoch)
        weights = seen.factor * seen.weights.detach() if self.settings.apply else torch.ones_like(seen.weights)
        return (weights * seen.losses).sum() / self._teacher.divisor(len(seen.rows))

    @property
    def last_weights(self) -> Tensor:
        """Weights of the samples of the latest batch that have a label, ``(n,)``, before any normalization."""
        return self._last

    def update(self, val_batch: Any = None, *, scale: float = 1.0) -> Tensor | None:
        """Make a step of the rescaler; call it when the gradients are complete, before they are clipped.

        In official mode the model takes its step here and its gradients are removed.

        Args:
            val_batch: See `step`.
            scale: What the loss was multiplied by before ``backward``, where that was not undone.

        Returns:
            The validation loss after the virtual step; ``None`` where there was no step of the rescaler: at most steps
            with ``meta_every``, where gradients overflowed, or where no batch had two samples.

        Raises:
            UsageError: There is no gradient.
            FloatingPointError: A validation loss is not finite.
        """
        pending, self._pending = self._pending, []
        if not pending:
            raise UsageError("call loss(batch) and backward before update()")
        params: list[Tensor] = [*trainable(self.module)]
        if all(p.grad is None for p in params):
            raise UsageError("there are no gradients: call backward on the loss before update()")
        official = self.settings.mode == "official"
        due = self._steps % self.settings.meta_every == 0 and (
            self._teacher.sync or any(seen.rescaled for seen in pending)
        )
        self._steps += 1
        meta_loss = None
        if due or official:
            if self._observer.head is not None:
                params = self._observer.head.parameters()
            gradients = gradients_of(params, scale, self._trained())
            if due and gradients is not None:
                meta_loss = self._teacher.step(pending, self._validation(val_batch, pending), params, gradients)
            if official and gradients is not None:
                virtual_step_(params, gradients, self._virtual_lrs(params), sign=True)
                for p in params:
                    p.grad = None
        if self.val_sampler is None:
            self._previous = pending[-1].batch
        return meta_loss

    def _validation(self, given: Any, pending: Sequence[Seen]) -> Any:
        if given is not None:
            return given
        if self.val_sampler is not None:
            return self.val_sampler()
        return pending[0].batch if self._previous is None else self._previous

    # numbers

    def _trained(self) -> set[int]:
        return {id(p) for group in self.optimizer.param_groups for p in group["params"]}

    def _virtual_lrs(self, params: Sequence[Tensor]) -> list[float]:
        """Step sizes; 0 for what the optimizer does not train, which must not move in a virtual step either."""
        one = self.settings.virtual_lr
        if one is None and self.settings.mode != "official" and not _is_sgd(self.optimizer):
            one = _ADAM_VIRTUAL_LR
        rates = {
            id(p): float(group["lr"] if one is None else one)
            for group in self.optimizer.param_groups
            for p in group["params"]
        }
        return [rates.get(id(p), 0.0) for p in params]

    # results and state

    def start_epoch(self) -> None:
        """Say that an epoch starts: the memories of recent samples start anew, as in the paper."""
        for memory in self._observer.memories.values():
            memory.reset()
        if self._steps:
            self._epoch += 1

    @property
    def steps(self) -> int:
        """How often `update` was called."""
        return self._steps

    @property
    def weights_by_id(self) -> dict[int, float]:
        """The latest weight of every sample that was seen with an identifier."""
        return self._log.weights()

    def audit(self, class_names: Sequence[str] = ()) -> AuditTable:
        """What is known of the labels, the most suspicious first; under DDP of this process's samples.

        Args:
            class_names: Names of the labels, for files and plots.

        Raises:
            UsageError: No sample was seen with an identifier.
        """
        return self._log.table(class_names)

    def state_dict(self) -> dict[str, Any]:
        """Everything that a run needs to resume exactly, as plain data; take it between two steps.

        The generators of torch belong to the training and are not in it.
        """
        state = {
            "rescaler": {name: value.clone() for name, value in self.rescaler.state_dict().items()},
            "optimizer": deepcopy(self._teacher.optimizer.state_dict()),  # torch's shares memory with the optimizer
            "memories": {name: memory.state_dict() for name, memory in self._observer.memories.items()},
            "log": self._log.state_dict(),
            "steps": self._steps,
            "epoch": self._epoch,
            "previous": self._previous,
        }
        if self.val_sampler is not None and hasattr(self.val_sampler, "state_dict"):
            state["val_sampler"] = self.val_sampler.state_dict()
        return state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from a saved state.

        Raises:
            UsageError: It is that of another rescaler.
        """
        own, saved = self.rescaler.state_dict(), state["rescaler"]
        if {name: value.shape for name, value in own.items()} != {name: value.shape for name, value in saved.items()}:
            raise UsageError(
                f"the saved rescaler has weights {tuple(saved['first'].shape)}, this one {tuple(own['first'].shape)}: "
                "give it the same number of classes and the same features"
            )
        device = self.rescaler.first.device
        self.rescaler.load_state_dict(saved)
        self._teacher.optimizer.load_state_dict(deepcopy(state["optimizer"]))
        for name, memory in self._observer.memories.items():
            memory.load_state_dict(state["memories"][name], device)
        self._log.load_state_dict(state["log"])
        self._steps, self._epoch, self._previous = state["steps"], state["epoch"], _moved(state["previous"], device)
        self._pending = []
        if "val_sampler" in state and self.val_sampler is not None and hasattr(self.val_sampler, "load_state_dict"):
            self.val_sampler.load_state_dict(state["val_sampler"])


def _unwrapped(model: nn.Module) -> nn.Module:
    wrapper = _compiled_from(model)
    inner = wrapper.module if isinstance(wrapper, DistributedDataParallel | nn.DataParallel) else model
    assert isinstance(inner, nn.Module)
    return inner


def _compiled_from(model: nn.Module) -> nn.Module:
    inner = getattr(model, "_orig_mod", model)  # where torch.compile keeps it
    assert isinstance(inner, nn.Module)
    return inner


def _no_numbers(ids: Tensor) -> bool:
    return ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool


def _is_sgd(optimizer: Any) -> bool:
    plain = getattr(optimizer, "optimizer", optimizer)  # Accelerate and schedulers wrap it
    return "SGD" in type(plain).__name__


def _moved(value: Any, device: torch.device) -> Any:
    if hasattr(value, "to"):  # a tensor, or a batch class such as that of transformers
        return value.to(device)
    if isinstance(value, dict):
        return {name: _moved(item, device) for name, item in value.items()}
    if isinstance(value, tuple | list):
        items = [_moved(item, device) for item in value]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    return value
