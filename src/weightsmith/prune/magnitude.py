"""Magnitude pruning with rewinding: remove the smallest weights, put the others back to their first values.

    thr = percentile(|w| over nonzero entries, amount);   mask <- mask and |w| >= thr;   w <- mask * w_0

Masks live outside the model: names, ``state_dict``, DDP, mixed precision, ``torch.compile`` and optimizers see ordinary
parameters that happen to hold zeros.

Source: Frankle and Carbin, "The Lottery Ticket Hypothesis", ICLR 2019; Katraouras and Rafailidis, "Pruning
Overparameterized Multi-Task Networks for Degraded Web Image Restoration" (MIR-L), 2025, and the authors'
``pruning_utils.py``.
"""

import hashlib
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn

from weightsmith.core.errors import UsageError, WeightsmithWarning, near
from weightsmith.core.select import Where
from weightsmith.core.weights import Layout, Slot, layouts, owners
from weightsmith.prune.bits import pack_bits, unpack_bits
from weightsmith.prune.report import PruneReport, TensorDensity
from weightsmith.prune.scoring import (
    Score,
    check_amount,
    check_min_density,
    check_score,
    pattern_sizes,
    scorer,
    semi_structured,
)
from weightsmith.prune.targets import find_named, find_weights, groups_of
from weightsmith.prune.thresholds import Ranked, prune_ranked

_ELEMENTWISE = (
    torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW, torch.optim.NAdam, torch.optim.RAdam, torch.optim.Adamax,
    torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adadelta,
)  # fmt: skip


class MagnitudePruner:
    """Masks over a model's weights.

    Args:
        model: Any module; it is not changed until `prune_`.
        scope: What shares a threshold: ``"global"`` (the paper), ``"layerwise"``, or globs over parameter names, one
            group each.
        where: Which modules; ``None``: all linear layers, convolutions, packed projections and expert stacks.
            Normalization gains, biases, embeddings and free parameters are exempt.
        score: ``"magnitude"`` (the paper), ``"magnitude_normalized"``, which survives short training,
            ``"magnitude_times_init"``, ``|w * w_init|`` with the values of ``snapshot()``, or ``"random"``.
        min_density: Every tensor keeps at least this share, so that no layer dies.
        frozen: Also prune weights that do not train.
        faithful: The rules of the authors' code instead: prune every parameter with "weight" in its name, normalization
            gains among them; half the amount for names with "output" when layerwise; no least density; rewind only
            weights and biases.
        seed: Of the score ``"random"`` and of `shuffle_`.

    Attributes:
        masks: Boolean masks by parameter name; ``True``: kept.
        round: How often `prune_` has pruned.
        left_out: Why weights of chosen modules are not pruned, by name.

    Raises:
        UsageError: An option is not known or out of range, or no weight is left to prune.
        TypeError: ``where`` names a weight that is integer, packed or sharded.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        scope: Literal["global", "layerwise"] | Sequence[str] = "global",
        where: Where = None,
        score: Score = "magnitude",
        min_density: float = 0.005,
        frozen: bool = False,
        faithful: bool = False,
        seed: int = 0,
    ) -> None:
        check_score(score)
        check_min_density(min_density)
        if faithful and where is not None:
            raise UsageError("where must be None with faithful=True, which chooses parameters by their names")
        self.model, self.scope, self.score, self.seed, self.faithful = model, scope, score, seed, faithful
        self.min_density = 0.0 if faithful else min_density
        self.left_out: dict[str, str] = {}
        if faithful:
            self._slots = find_named(model, lambda name: "weight" in name)
        else:
            self._slots, self.left_out = find_weights(model, where, frozen=frozen)
        self._groups = groups_of(self._slots, scope if isinstance(scope, str) else list(scope))
        self.masks = {name: torch.ones_like(w, dtype=torch.bool) for name, w in self._weights()}
        self._start = (
            {name: _root_mean_square(w) for name, w in self._weights()} if score == "magnitude_normalized" else {}
        )
        self.round = 0
        self._snapshots: dict[str, dict[str, Tensor]] = {}
        self._digests: dict[str, str] = {}

    def snapshot(self, label: str = "init") -> None:
        """Keep a copy of all parameters and buffers, on the CPU, to rewind to.

        Args:
            label: Its name: ``"init"`` before any training; another for late rewinding.
        """
        state = {name: _copied(tensor) for name, tensor in _tensors(self.model)}
        self._snapshots[label], self._digests[label] = state, _digest(state)

    def digest(self, label: str = "init") -> str:
        """Fingerprint of a snapshot: names, shapes and values.

        Raises:
            UsageError: There is no such snapshot.
        """
        if label not in self._digests:
            raise UsageError(f"snapshot {label!r} is missing: call snapshot() first; {near(label, self._digests)}")
        return self._digests[label]

    def load_snapshot(self, state: Mapping[str, Tensor], label: str = "init") -> None:
        """Take a ``state_dict`` as what to rewind to, for example of another initialization.

        Raises:
            UsageError: Its names or shapes are not those of the model; the first difference is named.
        """
        own = dict(_tensors(self.model))
        for name, tensor in own.items():
            if name not in state:
                raise UsageError(f"snapshot {label!r} lacks {name!r}; {near(name, state)}")
            if state[name].shape != tensor.shape:
                shapes = f"{tuple(state[name].shape)} instead of {tuple(tensor.shape)}"
                raise UsageError(f"snapshot {label!r}: {name} has shape {shapes}")
        kept = {name: _copied(state[name]) for name in own}
        self._snapshots[label], self._digests[label] = kept, _digest(kept)

    @torch.no_grad()
    def prune_(
        self, amount: float = 0.2, *, pattern: Literal["2:4", "4:8"] | None = None, exact: bool = False
    ) -> PruneReport:
        """Remove the smallest of the weights that are left, in every group.

        Args:
            amount: Share of the nonzero entries; 0: none.
            pattern: Instead: keep 2 of every 4 (or 4 of 8) neighbors along the inputs, as GPU kernels for
                semi-structured sparsity want it.
            exact: Break ties by position, so that the share is met; else entries that equal the threshold stay.

        Returns:
            Densities; ``.model`` is the model.

        Raises:
            UsageError: The amount is out of range, a weight is not finite, a pattern does not fit, or the score needs
                a snapshot that is missing.
        """
        amount = check_amount(amount)
        if self.score == "magnitude_times_init":
            self.digest()  # refuses where there is no snapshot
        for name, weight in self._weights():
            # a sum is several times faster, and finite only if all its terms are
            if not (weight.sum().isfinite() or weight.isfinite().all()):
                raise UsageError(f"{name} holds NaN or infinite values: nothing has been pruned")
        self.apply_()  # what was pruned does not count, also if training moved it
        if pattern is not None:
            self._prune_pattern(pattern)
        elif amount:
            for members in self._groups.values():
                halved = self.faithful and self.scope == "layerwise" and "output" in members[0]
                self._prune_group(members, amount / 2 if halved else amount, exact)
        if pattern is not None or amount:
            self.round += 1
        self.apply_()
        found = self.report()
        if found.empty:
            names = ", ".join(found.empty[:5])
            warnings.warn(
                f"nothing is left of {names}: these layers pass nothing on; use scope='layerwise', "
                "score='magnitude_normalized' or min_density",
                WeightsmithWarning,
                stacklevel=2,
            )
        return found

    @torch.no_grad()
    def rewind_(self, to: str = "init") -> nn.Module:
        """Put what is left back to an earlier state: every parameter and buffer, weights times their masks.

        With ``faithful=True`` only parameters with "weight" or "bias" in their names. Values are copied into the
        parameters, never the other way round; the snapshot is checked to be what was taken.

        Args:
            to: Label of a snapshot; ``"last"``: stay where training ended.

        Returns:
            The model.

        Raises:
            UsageError: There is no such snapshot, or it has been changed.
        """
        if to == "last":
            return self.apply_()
        if to not in self._snapshots:
            raise UsageError(f"snapshot {to!r} is missing: call snapshot() first; {near(to, self._snapshots)}")
        state = self._snapshots[to]
        if _digest(state) != self._digests[to]:
            raise UsageError(f"snapshot {to!r} has been changed since it was taken")
        for name, tensor in _tensors(self.model):
            if not self.faithful or "weight" in name or "bias" in name:
                tensor.copy_(state[name])
        return self.apply_()

    @torch.no_grad()
    def apply_(self) -> nn.Module:
        """Set pruned weights to zero. Returns the model."""
        weights = dict(self._weights())
        # as bytes: torch converts truth values to floats ten times more slowly
        masks = [self._mask(name, weight).view(torch.uint8) for name, weight in weights.items()]
        torch._foreach_mul_(list(weights.values()), masks)
        return self.model

    @torch.no_grad()
    def mask_gradients_(self) -> nn.Module:
        """Set the gradients of pruned weights to zero; before gradients are clipped, for example. Returns the model."""
        for name, weight in self._weights():
            if weight.grad is not None:
                weight.grad.mul_(self._mask(name, weight))
        return self.model

    def attach(self, optimizer: torch.optim.Optimizer, *, mask_gradients: bool | None = None) -> None:
        """Keep pruned weights at zero through every step of an optimizer.

        Args:
            optimizer: Any; it may hold the parameters in any groups.
            mask_gradients: Also set their gradients to zero before the step. ``None``: only for optimizers that are not
                elementwise, where a gradient changes more than its own weight.
        """
        if mask_gradients is None:
            mask_gradients = self.wants_masked_gradients(optimizer)
        if mask_gradients:

            def before(*_: Any) -> None:
                self.mask_gradients_()

            optimizer.register_step_pre_hook(before)

        def after(*_: Any) -> None:
            self.apply_()

        optimizer.register_step_post_hook(after)

    @staticmethod
    def wants_masked_gradients(optimizer: torch.optim.Optimizer) -> bool:
        """Whether a gradient may change other weights than its own: all but torch's elementwise optimizers."""
        return type(optimizer) not in _ELEMENTWISE

    @torch.no_grad()
    def shuffle_(self) -> nn.Module:
        """Put every mask's kept entries in random places of the same tensor: a control. Returns the model."""
        generator = torch.Generator().manual_seed(self.seed)
        for mask in self.masks.values():
            order = torch.randperm(mask.numel(), generator=generator).to(mask.device)
            mask.copy_(mask.reshape(-1)[order].reshape(mask.shape))
        return self.apply_()

    def report(self) -> PruneReport:
        """Densities of all parameters as the masks have them."""
        found = []
        for held in owners(self.model).values():
            name, parameter = held[0].name, held[0].module._parameters[held[0].attribute]
            assert parameter is not None
            mask = self.masks.get(name)
            if mask is None:
                found.append(TensorDensity(name, tuple(parameter.shape), parameter.numel(), prunable=False))
            else:
                found.append(TensorDensity(name, tuple(mask.shape), _count(mask), _dead_rows(held[0], mask)))
        return PruneReport(self.model, tuple(found), dict(self.left_out))

    def state_dict(self) -> dict[str, Any]:
        """Masks as bits, the round, and the snapshots."""
        return {
            "masks": {name: pack_bits(mask) for name, mask in self.masks.items()},
            "round": self.round,
            "start": dict(self._start),
            "snapshots": {label: dict(state) for label, state in self._snapshots.items()},
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` gave; weights are masked at the next `apply_` or step.

        Raises:
            UsageError: The masks are those of another model; the first difference is named.
        """
        packed = state["masks"]
        for name in self.masks:
            if name not in packed:
                raise UsageError(f"the state has no mask for {name!r}; {near(name, packed)}")
        strange = [name for name in packed if name not in self.masks]
        if strange:
            raise UsageError(
                f"the state has a mask for {strange[0]!r}, which is not pruned here; {near(strange[0], self.masks)}"
            )
        fresh = {name: unpack_bits(packed[name], tuple(mask.shape)) for name, mask in self.masks.items()}
        for name, mask in fresh.items():
            self.masks[name].copy_(mask)
        self.round, self._start = int(state["round"]), dict(state["start"])
        for label, snapshot in state["snapshots"].items():
            self.load_snapshot(snapshot, label)

    def _weights(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name, slot in self._slots.items():
            weight = slot.module._parameters[slot.attribute]
            assert weight is not None
            yield name, weight

    def _mask(self, name: str, weight: Tensor) -> Tensor:
        mask = self.masks[name]
        if mask.device != weight.device:
            mask = self.masks[name] = mask.to(weight.device)
        return mask

    def _prune_group(self, members: list[str], amount: float, exact: bool) -> None:
        weights = {name: weight.detach() for name, weight in self._weights()}
        if self.score == "magnitude_times_init":
            first = self._snapshots["init"]
            # half precision would make small products zero
            wide = {name: weights[name].to(torch.promote_types(weights[name].dtype, torch.float32)) for name in members}
            weights = {name: weight * first[name].to(weight.device) for name, weight in wide.items()}
        ranked = [
            Ranked(
                weights[name],
                self.masks[name],
                scorer(self.score, self._start.get(name, 1.0), self._seed(name)),
            )
            for name in members
        ]
        fresh = prune_ranked(ranked, amount, exact=exact, min_density=self.min_density)
        if fresh is None:
            names = ", ".join(members[:3])
            warnings.warn(f"{names}: all weights are zero already, nothing to prune", WeightsmithWarning, stacklevel=4)
            return
        for name, mask in zip(members, fresh, strict=True):
            self.masks[name].copy_(mask)

    def _seed(self, name: str) -> int:
        # a number per tensor that does not depend on which others are pruned
        return self.seed + int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")

    def _prune_pattern(self, pattern: str) -> None:
        keep, of = pattern_sizes(pattern)
        fresh = {}
        for name, weight in self._weights():
            try:
                layout = _layout(self._slots[name])
                axis, stacked = (layout.axis, layout.stacked) if layout is not None else (0, False)
                fresh[name] = semi_structured(weight * self._mask(name, weight), keep, of, axis=axis, stacked=stacked)
            except UsageError as error:
                raise UsageError(f"{name}: {error}; leave it out of where=") from error
        for name, mask in fresh.items():
            self.masks[name].logical_and_(mask)


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Every parameter and every buffer of the state dict once, under its first name."""
    saved = model.state_dict(keep_vars=True)
    seen: set[int] = set()
    for name, tensor in saved.items():
        if isinstance(tensor, Tensor) and id(tensor) not in seen:
            seen.add(id(tensor))
            yield name, tensor


def _copied(tensor: Tensor) -> Tensor:
    # row-major also where the model is in channels_last, as files want it
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _count(mask: Tensor) -> int:
    return int(np.count_nonzero(mask.numpy())) if mask.device.type == "cpu" else int(mask.count_nonzero())


def _root_mean_square(weight: Tensor) -> float:
    return weight.detach().double().square().mean().sqrt().item()


def _digest(state: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name, tensor in state.items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _layout(slot: Slot) -> Layout | None:
    return next((layout for layout in layouts(slot.module) if layout.attribute == slot.attribute), None)


def _dead_rows(slot: Slot, mask: Tensor) -> int:
    layout = _layout(slot)
    if layout is None or mask.dim() < 2:
        return 0
    rows = mask.movedim(layout.axis, 0).reshape(mask.shape[layout.axis], -1)
    return len(rows) - int(np.count_nonzero(rows.cpu().numpy().any(1)))
