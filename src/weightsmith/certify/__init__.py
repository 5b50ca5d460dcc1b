"""What a network guarantees: bounds of its outputs over a box of inputs, and training for them."""

from weightsmith.certify.bounds import Bounds, BoundOptions, Traced, bounds, margins, trace
from weightsmith.certify.interval import Interval
from weightsmith.certify.rules import Lines, Planes, register_bound
from weightsmith.core.graph import UnsupportedOperation

__all__ = [
    "BoundOptions",
    "Bounds",
    "Interval",
    "Lines",
    "Planes",
    "Traced",
    "UnsupportedOperation",
    "bounds",
    "margins",
    "register_bound",
    "trace",
]
