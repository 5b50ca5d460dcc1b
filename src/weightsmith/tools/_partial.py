"""Finished blocks on disk, so that a quantisation that was killed goes on where it was."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save

from weightsmith.core.files import write_atomically
from weightsmith.quantize import _native
from weightsmith.quantize.grid import QuantizedWeight
from weightsmith.quantize.report import BlockReport, LayerReport


class Partial:
    """A folder ``<out>.partial/<key>`` with a file per finished block.

    Args:
        out: Where the finished model will be.
        settings: Everything that the result depends on, as JSON; other settings have another folder.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = out.with_name(f"{out.name}.partial") / key

    def load(self) -> tuple[dict[str, dict[str, QuantizedWeight]], dict[str, BlockReport]]:
        """Weights and reports of the blocks that are there, by block name."""
        weights, reports = {}, {}
        for path in sorted(self.folder.glob("*.safetensors")):
            with safe_open(path, framework="pt") as file:
                block = json.loads(file.metadata()["block"])
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            layers = tuple(LayerReport(**layer) for layer in block["report"].pop("layers"))
            report = BlockReport(**block["report"], layers=layers)
            weights[report.name], reports[report.name] = _native.unpack(block["facts"], tensors), report
        return weights, reports

    def save(self, name: str, weights: Mapping[str, QuantizedWeight], report: BlockReport) -> None:
        """Keep a finished block."""
        facts, tensors = _native.pack(weights)
        metadata = {"block": json.dumps({"facts": facts, "report": asdict(report)})}
        file = hashlib.sha256(name.encode()).hexdigest()[:16]
        write_atomically(self.folder / f"{file}.safetensors", save(tensors, metadata))

    def remove(self) -> None:
        """Forget everything that was kept for this output folder."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)
