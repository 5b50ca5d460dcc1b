"""What a probe found between two moments of a model."""

import dataclasses
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from weightsmith.diagnose.options import KernelPlan


@dataclass(frozen=True, slots=True, kw_only=True)
class LazinessReport:
    """How far a model has moved; NaN where something cannot be said.

    Attributes:
        weight_change: ``|W1 - W0|`` over all chosen parameters; large is rich.
        relative_weight_change: Divided by ``|W0|``.
        weight_changes: By parameter: both of these.
        representation_alignment: By layer; 1 is lazy, towards 0 rich. Not centered, as in the paper.
        centered_alignment: The same of centered activity: linear CKA.
        sign_similarity: By layer: share of activities that have kept their sign.
        kernel_alignment: Of the tangent kernel of all chosen parameters; 1 is lazy.
        kernel_alignment_error: Its standard error; 0 unless the kernel is a sketch.
        per_layer: By layer: the alignment of the part of the kernel that its parameters give.
        kernel_target_alignment: Before and after; ``None`` without targets.
        effective_rank: By matrix: before and after.
        rank_kind: How that is measured.
        samples: Probe inputs.
        parameters: Names of the chosen parameters.
        plan: How the kernel was computed, and of how many samples; ``None`` without one.
    """

    weight_change: float
    relative_weight_change: float
    weight_changes: Mapping[str, tuple[float, float]]
    representation_alignment: Mapping[str, float]
    centered_alignment: Mapping[str, float]
    sign_similarity: Mapping[str, float]
    kernel_alignment: float
    kernel_alignment_error: float
    per_layer: Mapping[str, float]
    kernel_target_alignment: tuple[float, float] | None
    effective_rank: Mapping[str, tuple[float, float]]
    rank_kind: str
    samples: int
    parameters: tuple[str, ...]
    plan: KernelPlan | None

    @property
    def not_finite(self) -> list[str]:
        """Names of the entries that are NaN or infinite: after divergence, or where a layer is silent."""
        found = [
            name
            for name in ("weight_change", "relative_weight_change", "kernel_alignment")
            if not math.isfinite(getattr(self, name)) and (name != "kernel_alignment" or self.plan is not None)
        ]
        for field in ("weight_changes", "representation_alignment", "sign_similarity", "per_layer", "effective_rank"):
            for name, value in getattr(self, field).items():
                # what started at zero has no relative change, and nothing is wrong with it
                values = value[:1] if field == "weight_changes" else value if isinstance(value, tuple) else (value,)
                if not all(map(math.isfinite, values)):
                    found.append(f"{field} of {name or 'the model'}")
        return found

    def to_dict(self) -> dict[str, Any]:
        """Give everything as plain data."""
        found = dataclasses.asdict(self)
        found["plan"] = None if self.plan is None else str(self.plan)
        return found

    def curves(self) -> dict[str, float]:
        """Give the measures as one row of numbers, for curves over training."""
        row = {"weight_change": self.weight_change, "relative_weight_change": self.relative_weight_change}
        if self.plan is not None:
            row |= {"kernel_alignment": self.kernel_alignment}
        for field in ("representation_alignment", "sign_similarity"):
            row |= {f"{field}/{name or 'model'}": value for name, value in getattr(self, field).items()}
        if self.kernel_target_alignment is not None:
            row["kernel_target_alignment"] = self.kernel_target_alignment[1]
        return row

    def __str__(self) -> str:
        lines = [f"weight change {self.weight_change:.4g}, relative {self.relative_weight_change:.4g}"]
        if self.plan is not None:
            error = f" ± {self.kernel_alignment_error:.2g}" if self.kernel_alignment_error else ""
            lines += [f"kernel alignment {self.kernel_alignment:.4f}{error}", f"  {self.plan}"]
        if self.kernel_target_alignment is not None:
            first, second = self.kernel_target_alignment
            lines.append(f"kernel-target alignment {first:.4f} before, {second:.4f} after")
        for name, value in self.representation_alignment.items():
            more = f", kernel {self.per_layer[name]:.4f}" if name in self.per_layer else ""
            lines.append(
                f"{name or 'model'}: representation alignment {value:.4f}, centered "
                f"{self.centered_alignment[name]:.4f}, equal signs {self.sign_similarity[name]:.4f}{more}"
            )
        for name, (first, second) in self.effective_rank.items():
            lines.append(f"{name}: effective rank ({self.rank_kind}) {first:.4g} before, {second:.4g} after")
        lines.append(f"{self.samples} samples; {len(self.parameters)} parameters")
        if odd := self.not_finite:
            lines.append(f"not a number: {', '.join(odd)}")
        return "\n".join(lines)
