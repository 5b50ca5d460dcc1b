"""``weightsmith quantize``: the command, and what only it needs."""

from weightsmith.tools.quantize.command import REPORT, quantize

__all__ = ["REPORT", "quantize"]
