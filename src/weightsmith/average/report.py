"""What was merged and how."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weightsmith.average.adapters import LoraMode
from weightsmith.average.checkpoints import RunCheckpoint


@dataclass(frozen=True, slots=True)
class Share:
    """What one checkpoint contributes.

    Attributes:
        checkpoint: Which.
        value: Its metric; ``None`` when the weights were given by hand.
        weight: Its weight; all sum to 1.
    """

    checkpoint: RunCheckpoint
    value: float | None
    weight: float


@dataclass(frozen=True, slots=True)
class MergeReport:
    """What was merged and how; also written to ``merge_report.json`` in the new folder.

    Attributes:
        out: The new folder.
        shares: Checkpoints with their metrics and weights, oldest first.
        distances: ``||theta_i - theta_n|| / ||theta_n||`` of each from the newest, over the floating-point tensors of
            equal shape in the files; ``None`` where there are none.
        lora_mode: How LoRA factors were averaged; ``None`` for full models and other adapters.
        gaps: ``"factors"``: share of each module's average update that averaging its factors loses.
        discarded: ``"svd"``: share of it that the rank cannot hold.
        notes: What the user should know; also issued as warnings.
        settings: Metric, scheme, penalty and the like.
    """

    out: Path
    shares: list[Share]
    distances: list[float | None]
    lora_mode: LoraMode | None = None
    gaps: dict[str, float] = field(default_factory=dict)
    discarded: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    settings: dict[str, Any] = field(default_factory=dict)
