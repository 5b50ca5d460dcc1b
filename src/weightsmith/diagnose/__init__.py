"""What weights tell: how many directions they use, and whether training moved features or only the readout.

| name | what it is |
|---|---|
| ``LazinessProbe`` | look at any model before and after training |
| ``Snapshot``, ``LazinessReport`` | what it remembers, and what it finds |
| ``tangent_kernel``, ``plan_kernel`` | the tangent kernel within a memory budget, and what it will take |
| ``KernelOptions``, ``KernelPlan``, ``TangentKernel`` | how, how much, and the kernel |
| ``kernel_alignment``, ``representation_alignment`` | angle between kernels, and between activities |
| ``weight_change``, ``sign_similarity``, ``kernel_target_alignment`` | further measures |
| ``effective_rank`` | how many directions a weight uses, by several definitions |
"""

from weightsmith.diagnose.alignment import (
    kernel_alignment,
    kernel_target_alignment,
    representation_alignment,
    sign_similarity,
    weight_change,
)
from weightsmith.diagnose.kernels import TangentKernel, plan_kernel, tangent_kernel
from weightsmith.diagnose.options import KernelOptions, KernelPlan
from weightsmith.diagnose.probe import LazinessProbe
from weightsmith.diagnose.rank import effective_rank
from weightsmith.diagnose.report import LazinessReport
from weightsmith.diagnose.snapshot import Snapshot

__all__ = [
    "KernelOptions",
    "KernelPlan",
    "LazinessProbe",
    "LazinessReport",
    "Snapshot",
    "TangentKernel",
    "effective_rank",
    "kernel_alignment",
    "kernel_target_alignment",
    "plan_kernel",
    "representation_alignment",
    "sign_similarity",
    "tangent_kernel",
    "weight_change",
]
