"""Oscillation: how often integer weights go back and forth.

A code that changes in the direction opposite to its last change has oscillated; an exponential average of that is its
frequency ``f``, about one over the period.

    d_t = sign(k_{t-1} - k_t);   o_t = [d_t is opposite to the last d that was not 0];   f_t = m o_t + (1 - m) f_{t-1}

Source: "Overcoming Oscillations in Quantization-Aware Training", Markus Nagel, Marios Fournarakis, Yelysei Bondarenko,
Tijmen Blankevoort, ICML 2022, arXiv 2203.11086.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from weightsmith.core.errors import UsageError
from weightsmith.quantize.in_training.weight_quantizer import check_boundary, low_bit_sites


class Oscillation:
    """Follows the codes of one tensor.

    Args:
        codes: The codes before the first step, integers.
        momentum: ``m``, in (0, 1].
        dtype: Of the averages.

    Attributes:
        frequency: ``f``, shaped like the codes.
        total: How often each has oscillated, int32.
    """

    _kept: tuple[str, ...] = ("previous", "direction", "frequency", "total")

    def __init__(self, codes: Tensor, momentum: float = 0.01, *, dtype: torch.dtype = torch.float32) -> None:
        if not 0 < momentum <= 1:
            raise UsageError(f"momentum must be above 0 and at most 1, got {momentum}")
        self.momentum = momentum
        self.previous = codes.detach().to(torch.int8)
        self.direction = torch.zeros_like(self.previous)
        self.frequency = torch.zeros_like(self.previous, dtype=dtype)
        self.total = torch.zeros_like(self.previous, dtype=torch.int32)

    @torch.no_grad()
    def step(self, codes: Tensor) -> Tensor:
        """Take the next codes.

        Args:
            codes: Shaped like the first ones.

        Returns:
            Which of them have oscillated now, bool.
        """
        codes = codes.detach().to(torch.int8)
        direction = (self.previous > codes).to(torch.int8) - (self.previous < codes).to(torch.int8)
        oscillated = (direction != 0) & (direction == -self.direction)
        self.direction = torch.where(direction != 0, direction, self.direction)
        self.previous = codes
        self.frequency.lerp_(oscillated.to(self.frequency.dtype), self.momentum)
        self.total += oscillated
        return oscillated

    def state_dict(self) -> dict[str, Tensor]:
        """All that a resumed run needs."""
        return {name: getattr(self, name) for name in self._kept if getattr(self, name) is not None}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over what `state_dict` returned."""
        for name in self._kept:
            value = state.get(name)
            setattr(self, name, None if value is None else value.to(self.previous.device, copy=True))


class OscillationTracker:
    """Measures oscillation while a model trains: call `update` after every optimizer step, or `attach` it.

    Weights of the smallest bit width are followed; with a query-key product, the product. Nothing is recorded while
    the model is in evaluation mode.

    Args:
        model: What ``prepare_ofq_`` returned.
        momentum: Of the frequency.

    Raises:
        UsageError: The model has no quantized weight, or ``momentum`` is out of range.
    """

    def __init__(self, model: nn.Module, *, momentum: float = 0.01) -> None:
        self._model, self.momentum = model, momentum
        self._sites = {site.name: site for site in low_bit_sites(model)}
        self.reset()

    def reset(self) -> None:
        """Restart from the current codes."""
        self.steps, self._jitter = 0, 0.0
        self._states: dict[str, Oscillation] = {}
        self._scales: dict[str, Tensor] = {}
        for name, site in self._sites.items():
            rows = site.latent()
            self._states[name] = Oscillation(site.quantizer.codes(rows), self.momentum)
            self._scales[name] = site.quantizer.step(rows).detach().clone()

    @torch.no_grad()
    def update(self) -> None:
        """Take the codes and scales that the last step has left."""
        if not self._model.training:
            return
        self.steps += 1
        jitter = []
        for name, site in self._sites.items():
            rows = site.latent()
            self._states[name].step(site.quantizer.codes(rows))
            scale = site.quantizer.step(rows).detach().clone()
            jitter.append((scale - self._scales[name]).abs().mean() / scale.mean())
            self._scales[name] = scale
        self._jitter += float(torch.stack(jitter).mean())

    def attach(self, optimizer: torch.optim.Optimizer) -> RemovableHandle:
        """Update after each step of an optimizer, until the returned handle's ``remove()``."""
        return getattr(optimizer, "optimizer", optimizer).register_step_post_hook(lambda *_: self.update())

    def report(self, threshold: float = 0.005) -> dict[str, float]:
        """Summarize what has been seen since the last `reset`, over all weights, each counted equally.

        Args:
            threshold: The frequency from which a weight counts as oscillating.

        Returns:
            ``events``: oscillations per weight and 100 steps; ``oscillating``: % of weights with a frequency above the
            threshold; ``scale_jitter``: mean change of a scale in one step relative to the mean scale.
        """
        weights = sum(state.total.numel() for state in self._states.values())
        events = sum(int(state.total.sum()) for state in self._states.values())
        above = sum(int((state.frequency > threshold).sum()) for state in self._states.values())
        steps = max(1, self.steps)
        return {
            "events": 100 * events / weights / steps,
            "oscillating": 100 * above / weights,
            "scale_jitter": self._jitter / steps,
        }

    def frequencies(self) -> dict[str, Tensor]:
        """Frequency of every weight, by weight name."""
        return {name: state.frequency.clone() for name, state in self._states.items()}

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs."""
        states = {name: state.state_dict() for name, state in self._states.items()}
        return {"steps": self.steps, "jitter": self._jitter, "states": states, "scales": dict(self._scales)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` returned."""
        self.steps, self._jitter = state["steps"], state["jitter"]
        for name, oscillation in self._states.items():
            oscillation.load_state_dict(state["states"][name])
            self._scales[name] = state["scales"][name].to(self._scales[name].device, copy=True)


@torch.no_grad()
def boundary_occupancy(model: nn.Module, boundary: float = 0.005) -> float:
    """Measure how many of the low-bit weights lie near a rounding threshold.

    Args:
        model: What ``prepare_ofq_`` returned.
        boundary: How near, in steps between levels, in [0, 0.5).

    Returns:
        Per cent of all weights.
    """
    check_boundary(boundary)
    found = low_bit_sites(model)
    near = [site.quantizer.distance(site.latent()) <= boundary for site in found]
    return 100 * sum(int(mask.sum()) for mask in near) / sum(mask.numel() for mask in near)
