"""What a network guarantees: bounds of its outputs over a box of inputs, and training that makes them good.

| names | what they do |
|---|---|
| `bounds`, `margins`, `trace` | ends of the outputs of any model of common layers |
| `Bounds`, `BoundOptions`, `Traced` | what they give, and how they are computed |
| `verified_error`, `pgd` | for how many examples a label is proved, and an attack beside it |
| `VerifiedError`, `Certificates` | the number, and what was found for each example |
| `CertifiedTraining`, `Recipe` | certified training as a loss in your own loop |
| `IBP`, `CrownIBP`, `SABR`, `MTLIBP` | what it minimizes |
| `EpsilonSchedule`, `BoundRegularizer` | how the box grows; what holds the warmup together |
| `add_batchnorm_`, `robust_cross_entropy` | batch norm behind every hidden layer; the loss on margins |
| `register_bound`, `Interval`, `Lines`, `Planes` | bounds of your own operations |
| `input_box`, `UnsupportedOperation` | the set of inputs; what is raised for an operation without bounds |
"""

from weightsmith.certify.attack import pgd
from weightsmith.certify.batchnorm import add_batchnorm_
from weightsmith.certify.bounding import BoundOptions, Bounds, bounds, margins
from weightsmith.certify.box import input_box
from weightsmith.certify.interval import Interval
from weightsmith.certify.losses import robust_cross_entropy
from weightsmith.certify.objectives import IBP, MTLIBP, SABR, CrownIBP
from weightsmith.certify.regularizers import BoundRegularizer
from weightsmith.certify.rules import Lines, Planes, register_bound
from weightsmith.certify.schedule import EpsilonSchedule
from weightsmith.certify.traced import Traced, trace
from weightsmith.certify.training import CertifiedTraining, Recipe
from weightsmith.certify.verify import Certificates, VerifiedError, verified_error
from weightsmith.core.graph import UnsupportedOperation

__all__ = [
    "IBP",
    "MTLIBP",
    "SABR",
    "BoundOptions",
    "BoundRegularizer",
    "Bounds",
    "Certificates",
    "CertifiedTraining",
    "CrownIBP",
    "EpsilonSchedule",
    "Interval",
    "Lines",
    "Planes",
    "Recipe",
    "Traced",
    "UnsupportedOperation",
    "VerifiedError",
    "add_batchnorm_",
    "bounds",
    "input_box",
    "margins",
    "pgd",
    "register_bound",
    "robust_cross_entropy",
    "trace",
    "verified_error",
]
