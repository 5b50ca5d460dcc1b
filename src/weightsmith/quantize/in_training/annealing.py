"""CGA, confidence-guided annealing: a last phase in which only weights near a rounding threshold may move.

A weight far from every threshold is confident; its moves change nothing but the scale of its row. Freezing it lets the
undecided ones settle. In every step, for every StatsQ weight ``W`` with step ``s / n``:

    trains  <=>  |W / (s / n) - j| <= boundary for an integer j in -(n-1) .. n-1     clipped weights never do

The others get no gradient, and have their value written back after the step, against momentum and weight decay.
Biases, norms, activation scales, the first layer and the classifiers train on.

Source: "Oscillation-free Quantization for Low-bit Vision Transformers", ICML 2023, arXiv 2302.02210, nbasyl/OFQ.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from weightsmith.core.errors import UsageError, unknown
from weightsmith.quantize.in_training.statsq import StatsQ
from weightsmith.quantize.in_training.weight_quantizer import check_boundary, sites


class ConfidenceGuidedAnnealing:
    """Freezes the confident weights of a model around every optimizer step.

    Call `pre_step` when gradients are complete and unscaled, before they are clipped, and `post_step` after the step;
    or `attach` it to the optimizer, which does both. Use the authors' 1e-5 as constant rate for a tenth of the training
    steps; a weight needs about ``boundary * (s / n) / lr`` steps of Adam to leave the range, and a phase that is not
    much longer calms nothing.

    Args:
        model: Has StatsQ weights, see ``prepare_ofq_``.
        boundary: How close to a threshold a weight must be to train, in steps between levels, in [0, 0.5).
        qk: What happens to query and key weights whose product is quantized: ``"free"`` trains them, as the authors'
            code does in effect; ``"mask"`` drops the gradients of confident entries of the product.

    Raises:
        UsageError: An argument is out of range, or the model has no StatsQ weight.
    """

    def __init__(self, model: nn.Module, boundary: float = 0.005, *, qk: Literal["free", "mask"] = "free") -> None:
        check_boundary(boundary)
        if qk not in ("free", "mask"):
            raise unknown("qk", qk, ("free", "mask"))
        found = [site for site in sites(model) if isinstance(site.quantizer, StatsQ)]
        if not found:
            raise UsageError('model has no StatsQ weight: call prepare_ofq_(weight="statsq") first')
        self.boundary, self.qk = boundary, qk
        self._products = [site.quantizer for site in found if site.parameter is None]
        covered = {id(site.parameter): site for site in found if site.parameter is not None}
        self._sites = [site for site in covered.values() if site.parameter is not None and site.parameter.requires_grad]
        self._taken: list[tuple[Tensor, Tensor, Tensor]] = []
        self._buffers: dict[str, tuple[Tensor, Tensor]] = {}
        self._mask_products(boundary if qk == "mask" else None)

    @torch.no_grad()
    def pre_step(self) -> None:
        """Drop the gradients of confident weights and remember their values."""
        self._taken = []
        for site in self._sites:
            grad = site.parameter.grad if site.parameter is not None else None
            if grad is None:
                continue
            rows = site.latent()
            before, free = self._buffers_for(site.name, rows)
            before.copy_(rows)
            torch.le(site.quantizer.distance(rows), self.boundary, out=free)
            site.quantizer.rows(grad).mul_(free)
            self._taken.append((rows, before, free))

    @torch.no_grad()
    def post_step(self) -> None:
        """Give confident weights their value back; nothing happens without a `pre_step` before."""
        for rows, before, free in self._taken:
            torch.lerp(before, rows, free, out=rows)  # exact at both ends
        self._taken = []

    def attach(self, optimizer: torch.optim.Optimizer) -> list[RemovableHandle]:
        """Make an optimizer anneal in each of its steps.

        Args:
            optimizer: One that holds the model's parameters; one that Accelerate has wrapped will do.

        Returns:
            Handles; calling ``remove()`` on each ends the annealing.
        """
        inner = getattr(optimizer, "optimizer", optimizer)
        return [
            inner.register_step_pre_hook(lambda *_: self.pre_step()),
            inner.register_step_post_hook(lambda *_: self.post_step()),
        ]

    def close(self) -> None:
        """Let the gradients of query-key products pass again."""
        self._mask_products(None)

    def state_dict(self) -> dict[str, Any]:
        """What a resumed run needs; between steps nothing else is remembered."""
        return {"boundary": self.boundary, "qk": self.qk}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.boundary, self.qk = state["boundary"], state["qk"]
        self._mask_products(self.boundary if self.qk == "mask" else None)

    def _buffers_for(self, name: str, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Room for the values before the step, and for who may move, as 0 and 1: boolean masks are far slower."""
        held = self._buffers.get(name)
        if held is None or held[0].shape != rows.shape or held[0].device != rows.device or held[0].dtype != rows.dtype:
            held = self._buffers[name] = torch.empty_like(rows), torch.empty_like(rows)
        return held

    def _mask_products(self, boundary: float | None) -> None:
        for quantizer in self._products:
            if isinstance(quantizer, StatsQ):
                quantizer.boundary = boundary


def near_threshold(w: Tensor, bits: int, boundary: float, keep_axis: int = 0) -> Tensor:
    """Which entries of a StatsQ weight may train: those within ``boundary`` steps of an inner threshold.

    Args:
        w: Latent weight, any shape.
        bits: Bit width.
        boundary: In steps between levels, in [0, 0.5).
        keep_axis: The axis whose entries each have a scale.

    Returns:
        Bool, shaped like ``w``.

    Raises:
        UsageError: An argument is out of range.
    """
    check_boundary(boundary)
    return StatsQ(bits, keep_axis).distance(w) <= boundary
