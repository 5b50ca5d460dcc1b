"""Finished blocks on disk: a quantization that was killed goes on there, and memory is left to the next block."""

import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import nn

from weightsmith.core.errors import UsageError, reason
from weightsmith.core.files import write_atomically
from weightsmith.core.json_files import parse_json
from weightsmith.quantize.formats.native import FACTS
from weightsmith.quantize.grid import QuantizedWeight, attach_quantized_
from weightsmith.quantize.report import BlockReport, LayerReport

_REPORT = {"name": str, "layers": [dict]}
_PARTS = ("codes", "scale", "zero_point")


class Partial:
    """A folder ``<out>.partial/<key>`` with a file per finished block: its values, its codes and its report.

    Args:
        out: Where the finished model will be.
        settings: Everything that the result depends on, as JSON; other settings have another folder.
    """

    def __init__(self, out: Path, settings: Mapping[str, Any]) -> None:
        key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:12]
        self.folder = out.with_name(f"{out.name}.partial") / key

    def load(self) -> tuple[dict[str, dict[str, QuantizedWeight]], dict[str, BlockReport]]:
        """Weights and reports of the blocks that are there, by block name; tensors are views of the files."""
        weights, reports = {}, {}
        for path in sorted(self.folder.glob("*.safetensors")):
            try:
                found, report = _read(path)
            except (SafetensorError, LookupError, TypeError, ValueError, OSError) as error:
                raise UsageError(
                    f"{path} is damaged: {reason(error)}; remove {self.folder.parent} to quantize from the start"
                ) from error
            weights[report.name], reports[report.name] = found, report
        return weights, reports

    def keep_(self, model: nn.Module, name: str, weights: Mapping[str, QuantizedWeight], report: BlockReport) -> None:
        """Write a finished block if it is not there, and give the model views of its file instead of memory.

        Args:
            model: Holds the block's values already.
            name: Of the block.
            weights: Its quantized weights by parameter name.
            report: What became of it.
        """
        path = self.folder / f"{hashlib.sha256(name.encode()).hexdigest()[:16]}.safetensors"
        if not path.is_file():
            facts = {weight: {fact: getattr(of, fact) for fact in FACTS} for weight, of in weights.items()}
            tensors = {f"{weight}.{part}": getattr(of, part) for weight, of in weights.items() for part in _PARTS}
            tensors |= {weight: model.get_parameter(weight).detach() for weight in weights}
            metadata = {"block": json.dumps({"facts": facts, "report": asdict(report)})}
            write_atomically(path, save(tensors, metadata))
        with safe_open(path, framework="pt") as file:
            for weight, of in weights.items():
                owner, _, tensor = weight.rpartition(".")
                model.get_parameter(weight).data = file.get_tensor(weight)
                parts = {part: file.get_tensor(f"{weight}.{part}") for part in _PARTS}
                attach_quantized_(model.get_submodule(owner), replace(of, **parts), tensor)

    def remove(self) -> None:
        """Forget everything that was kept for this output folder."""
        shutil.rmtree(self.folder.parent, ignore_errors=True)


def _read(path: Path) -> tuple[dict[str, QuantizedWeight], BlockReport]:
    with safe_open(path, framework="pt") as file:
        block = parse_json((file.metadata() or {}).get("block", ""), path, {"facts": {str: dict}, "report": _REPORT})
        found = {
            name: QuantizedWeight(**facts, **{part: file.get_tensor(f"{name}.{part}") for part in _PARTS})
            for name, facts in block["facts"].items()
        }
    layers = tuple(LayerReport(**layer) for layer in block["report"].pop("layers"))
    return found, BlockReport(**block["report"], layers=layers)
